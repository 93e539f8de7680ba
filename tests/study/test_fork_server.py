"""Runs as forks: what a script sees and how it ends are as in a fresh interpreter, and torch is imported once."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import QUICK, ROOT, files_of, processes_in, read_table, wait_for
from test_survival import start

from ks.study.fork_server import ForkServer, unsafe_to_fork
from ks.study.processes import wait_for_one

BOTH = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch
from ks.study.fork_server import ForkServer
from ks.study.processes import start_afresh, wait_for_one
server, found = ForkServer(), []
os.environ["OMP_NUM_THREADS"] = "2"
for start in (server.start, start_afresh):
    found.append({{}})
    for path in sys.argv[1:]:
        read, write = os.pipe()
        with open(path + ".log", "wb") as log:
            process = start([sys.executable, path, "--a", "b"], dict(os.environ), log.fileno(), log.fileno(), [read])
        wait_for_one([process], 60)
        os.close(read), os.close(write)
        found[-1][os.path.basename(path)] = process.returncode, open(path + ".log").read()
server.close()
print(json.dumps(found))
"""
SEEN = """
import gc, inspect, json, os, signal, sys, threading, torch
with open(__file__) as file:
    text = file.read()
print(json.dumps({
    "arguments": [sys.argv, sys.orig_argv, __name__, __file__, sys.modules["__main__"].__dict__ is globals()],
    "path": sys.path, "folder": os.getcwd(), "environment": {**os.environ}, "leader": os.getsid(0) == os.getpid(),
    "files": sorted(os.listdir("/proc/self/fd")), "in": sys.stdin.read(), "threads": torch.get_num_threads(),
    "signals": {str(n): str(signal.getsignal(n)) for n in signal.valid_signals() if n != signal.SIGINT},
    "streams": [(s.encoding, s.errors, s.line_buffering, s.write_through, s.fileno()) for s in
                (sys.__stdin__, sys.stdout, sys.stderr)],
    "source": inspect.getsource(sys.modules["__main__"]) == text, "gc": gc.isenabled(), "umask": os.umask(0),
    "limits": open("/proc/self/limits").read(), "alive": len(threading.enumerate()),
}, indent=1))
"""
SCRIPTS = {
    "seen.py": SEEN,
    "code.py": "raise SystemExit(7)",
    "text.py": "raise SystemExit('not well')",
    "negative.py": "raise SystemExit(-1)",
    "error.py": "def f():\n    1 / 0\nprint('before')\nf()",
    "syntax.py": "def f(:\n",
    "killed.py": "import os; print('lost'); os.kill(os.getpid(), 9)",
    "terminated.py": "import os; os.kill(os.getpid(), 15)",
    "buffered.py": "import os, sys; print('first'); sys.stderr.write('second\\n'); os.write(1, b'zero\\n')",
    "at_exit.py": "import atexit; atexit.register(print, 'at the exit')",
    "seed.py": "import torch; print(torch.initial_seed())",
    "another.py": "import torch; print(torch.initial_seed())",
    "thread.py": "import threading, time; threading.Timer(0.2, print, ['late']).start()",
}


@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "latin-1"}], ids=str)
def test_a_fork_runs_a_script_as_a_fresh_interpreter_does(tmp_path, cold, environment):
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "both.py").write_text(BOTH.format(root=str(ROOT)))
    command = [sys.executable, "both.py", *(str(tmp_path / name) for name in SCRIPTS)]
    variables = {name: os.environ[name] for name in os.environ if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=tmp_path, env=variables | environment, capture_output=True, text=True)
    assert done.stderr == ""
    forked, fresh = json.loads(done.stdout)
    assert fresh["code.py"][0] == 7
    assert fresh["killed.py"][0] == -9
    assert forked.pop("seed.py") != forked.pop("another.py")
    for name in forked:
        assert forked[name] == fresh[name], name


NOTES = """
import os, sys

def write(name, text):
    with open(os.path.join(os.path.dirname(__file__), name), "a") as file:
        print(text, file=file)

write("began", "an interpreter")
tasks = "/proc/self/task"
sys.addaudithook(lambda event, _: event == "os.fork" and write("forked", f"{len(os.listdir(tasks))} thread"))
"""


def test_torch_is_imported_once_and_the_results_are_those_of_fresh_interpreters(weight_path, tmp_path, cold):
    (tmp_path / "sitecustomize.py").write_text(NOTES)
    results = []
    for name, options, how in (("fork", (), "runs are forks"), ("fresh", ("-B",), "Python was given options")):
        command = [sys.executable, *options, str(ROOT / "rank_sweep_study.py"), "--weight_path", str(weight_path)]
        command += ["--ranks", "1", "2", "4", *QUICK, "--verbose", "--output_dir", str(tmp_path / name)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert how in done.stderr
        curves = [read_table(files_of(tmp_path / name, rank).curves_csv) for rank in (1, 2, 4)]
        results.append([{**row, "epoch_seconds": ""} for table in curves for row in table])
    assert results[0] == results[1]
    assert len((tmp_path / "began").read_text().splitlines()) == 1 + 4
    assert set((tmp_path / "forked").read_text().splitlines()) == {"1 thread"}  # a lock has one, and so has a lifeline


def test_the_server_ends_with_its_sweep_and_the_run_of_a_dead_server_starts_afresh(tmp_path, capfd):
    server, script = ForkServer(), tmp_path / "script.py"
    script.write_text("print('ran')")
    for note in ("", "a run imports torch itself", "a run imports torch itself"):
        with open(tmp_path / "log", "wb") as log:
            process = server.start([sys.executable, str(script)], {**os.environ}, log.fileno(), log.fileno(), [])
        wait_for_one([process], 60)
        assert (process.returncode, (tmp_path / "log").read_text()) == (0, "ran\n")
        assert note in capfd.readouterr().err
        if not note:
            os.kill(server._pid, signal.SIGKILL)
            wait_for(lambda: server._socket.recv(1) == b"")
    server.close()


def test_a_killed_sweep_leaves_neither_server_nor_run(weight_path, tmp_path):
    process = start("rank_sweep_study.py", tmp_path, "--ranks", 2, "--num_samples", 80, "--num_epochs", 100000)
    wait_for(files_of(tmp_path / "rank_sweep_results", 2).curves_csv.exists)
    others = {*processes_in(tmp_path)} - {process.pid}
    assert len(others) == 2
    for other in others:
        os.kill(other, signal.SIGSTOP)
    process.kill()
    process.communicate()
    wait_for(lambda: not processes_in(tmp_path), seconds=15)


@pytest.mark.parametrize(
    ("place", "name", "value", "reason"),
    [
        (sys, "byteorder", sys.byteorder, ""),
        (sys, "platform", "darwin", "only on Linux"),
        (sys, "orig_argv", [sys.executable, "-B", sys.argv[0]], "Python was given options"),
        (sys, "gettrace", lambda: print, "a debugger"),
        (os, "listdir", lambda path: ["1", "2"], "threads"),
    ],
)
def test_where_a_fork_is_not_safe_the_reason_is_given(monkeypatch, place, name, value, reason):
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, sys.argv[0]])
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setattr(os, "listdir", lambda path: ["1"])
    monkeypatch.setattr(place, name, value)
    found = unsafe_to_fork(is_script=True)
    assert reason in found
    assert bool(found) == bool(reason)
    assert unsafe_to_fork(is_script=False)
