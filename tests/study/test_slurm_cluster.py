"""The SLURM launcher beside a stand-in for SLURM; test_slurm.py has a real one."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import QUICK, ROOT, wait_for
from fake_slurm import FakeSlurm

import rank_sweep_study
from ks.cli.flags import SweepConfig
from ks.errors import UsageError
from ks.files.atomic import read_json_object, write_json
from ks.study import slurm_cluster, slurm_queue
from ks.study.processes import Exit, Task
from ks.study.slurm_cluster import SlurmLauncher, cancel_left

OK = Exit(0, 1.5)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    for name, value in {"QUEUE": 0.0, "GRACE": 0.0}.items():
        monkeypatch.setattr(slurm_queue, f"{name}_SECONDS", value)
    for name, value in {"CANCEL": 0.1, "POLL": 0.01}.items():
        monkeypatch.setattr(slurm_cluster, f"{name}_SECONDS", value)
    monkeypatch.setattr(slurm_cluster, "POLLS", 1)
    monkeypatch.setenv("SBATCH_JOB_NAME", "")
    return FakeSlurm(tmp_path / "bin", monkeypatch)


@pytest.fixture
def tasks(tmp_path):
    return [Task(f"rank {rank}", ("true",), tmp_path / f"rank_{rank}" / "train.log") for rank in (4, 2, 1)]


def end(path, ended=None, started=True):
    """Write what a job leaves in the record of a run."""
    exit = ended and dataclasses.asdict(ended)
    write_json(path, read_json_object(path) | {"started": "n1" if started else None, "exit": exit})


def leave(part, ended=None, state="COMPLETED"):
    """End a job in this state, after its first run has begun and ended so, if at all."""
    end(part[0][1], ended)
    return state


def run_all(tmp_path, tasks, poll=lambda running: None, **options):
    """Return the exit of each task by its name, in the order in which they ended."""
    config = SweepConfig(weight_path="w.pth", output_dir=str(tmp_path), launcher="slurm", **options)
    with SlurmLauncher(config, len(tasks)) as launcher:
        return {task.name: exit for task, exit in launcher.run(tasks, poll)}


def test_runs_are_one_array_and_end_as_their_records_have_it(slurm, tmp_path, tasks, capsys):
    def job(number, part):
        for ended, (_task, record) in zip([OK, Exit(1, 2.0)], part):
            end(record, ended)
        return "COMPLETED"

    slurm.job = job
    ended = run_all(tmp_path, tasks, runs_per_job=2, jobs=7)
    assert ended == {"rank 4": OK, "rank 2": Exit(1, 2.0), "rank 1": OK}
    [(parameters, parts)] = slurm.submitted
    assert parts == [["rank 4", "rank 2"], ["rank 1"]]
    assert parameters["array_parallelism"] == 7
    assert capsys.readouterr().err == "SLURM job 1: 3 runs in 2 array elements\n"
    assert not (tmp_path / ".ks_slurm").exists()
    assert not (slurm.folder / "cancelled").exists()


@pytest.mark.parametrize("reason", ["Resources", "None", "JobArrayTaskLimit"])
def test_only_runs_that_have_begun_are_polled_and_the_reason_for_waiting_is_printed_once(
    slurm, tmp_path, tasks, capsys, reason
):
    seen, records = [], {}

    def job(number, part):
        records[part[0][0].name] = part[0][1]
        return f"PENDING|{reason}"

    def poll(running):
        seen.append([task.name for task in running])
        if len(seen) == 3:
            end(records["rank 2"])
            slurm.set("1_1", "RUNNING")
        if len(seen) == 9:
            for index, record in enumerate(records.values()):
                end(record, OK)
                slurm.set(f"1_{index}", "COMPLETED")

    slurm.job = job
    assert set(run_all(tmp_path, tasks, poll).values()) == {OK}
    assert seen[:3] == [[]] * 3
    assert ["rank 2"] in seen[4:]
    assert {tuple(names) for names in seen} == {(), ("rank 2",)}
    assert capsys.readouterr().err.count("waiting for SLURM (Resources)") == (reason == "Resources")


@pytest.mark.parametrize("state", ["NODE_FAIL", "TIMEOUT", "PREEMPTED", "COMPLETED"])
def test_a_lost_run_is_submitted_again_twice(slurm, tmp_path, tasks, capsys, state):
    slurm.job = lambda number, part: leave(part, None if part[0][0].name == "rank 2" else OK, state)
    ended = run_all(tmp_path, tasks)
    assert ended["rank 4"] == ended["rank 1"] == OK
    assert ended["rank 2"].error == "SLURM job 3_0 was lost, as 2 before it"
    assert [parts for _, parts in slurm.submitted[1:]] == [[["rank 2"]]] * 2
    assert f"rank 2: SLURM job 1_1 was lost ({state})" in capsys.readouterr().err
    assert f"SLURM job 3_0: {state}" in tasks[1].log.read_text()


def test_a_job_that_is_held_after_a_failed_start_is_cancelled_and_submitted_again(slurm, tmp_path, tasks):
    held = "PENDING|launch failed requeued held"
    slurm.job = lambda number, part: held if number == 1 else leave(part, OK)
    assert run_all(tmp_path, tasks[:1]) == {"rank 4": OK}
    assert (slurm.folder / "cancelled").read_text() == "1_0\n"


def test_the_jobs_of_a_driver_that_is_a_job_do_not_inherit_its_resources(slurm, tmp_path, tasks, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_CONF"):
        monkeypatch.setenv(name, "9")
    seen = []

    def job(number, part):
        seen.extend(name for name in os.environ if name.startswith(("SLURM", "SRUN")))
        return leave(part, OK)

    slurm.job = job
    run_all(tmp_path, tasks[:1])
    assert seen == ["SLURM_CONF"]


def test_an_interrupted_run_is_submitted_as_often_as_it_gets_on(slurm, tmp_path, tasks):
    curves = tmp_path / "rank_4" / "rank_4_rank_4_loss_curves.csv"
    curves.parent.mkdir()
    curves.touch()

    def job(number, part):
        if number <= 6:
            curves.write_text(f"{curves.read_text()}epoch\n")
        return leave(part, Exit(130, 1.0))

    slurm.job = job
    assert "was lost" in run_all(tmp_path, tasks[:1])["rank 4"].error
    assert len(slurm.submitted) == 9


def test_runs_that_a_lost_job_did_not_reach_lose_nothing(slurm, tmp_path, tasks):
    slurm.job = lambda number, part: leave(part, OK if number > 1 else None, "NODE_FAIL")
    assert set(run_all(tmp_path, tasks, runs_per_job=3).values()) == {OK}
    names = ["rank 4", "rank 2", "rank 1"]
    assert [parts for _, parts in slurm.submitted] == [[names], [names], [names[1:]], [names[2:]]]


@pytest.mark.parametrize(
    ("state", "error"), [("FAILED", "python: command not found"), ("CANCELLED", ""), ("OUT_OF_MEMORY", "")]
)
def test_a_job_that_fails_is_not_submitted_again_and_shows_the_words_of_slurm(slurm, tmp_path, tasks, state, error):
    def job(number, part):
        if error:
            (tmp_path / ".ks_slurm" / "1_0_0_log.err").write_text(error)
        return state

    slurm.job = job
    ended = run_all(tmp_path, tasks, runs_per_job=3)
    assert {exit.error for exit in ended.values()} == {f"SLURM job 1_0: {state}"}
    assert len(slurm.submitted) == 1
    expected = error or f"it left no output; is {tmp_path} on a file system that the nodes share?"
    assert all(expected in task.log.read_text() for task in tasks)


@pytest.mark.parametrize(
    ("state", "error"), [("OUT_OF_MEMORY", "SLURM job 1_0: OUT_OF_MEMORY"), ("COMPLETED", "killed by signal 9")]
)
def test_a_killed_run_waits_for_the_words_of_slurm(slurm, tmp_path, tasks, state, error):
    def job(number, part):
        (tmp_path / ".ks_slurm" / "1_0_0_log.err").write_text("slurmstepd: error: Detected 1 oom_kill event\n")
        return leave(part, Exit(-9, 3.0), state)

    slurm.job = job
    assert run_all(tmp_path, tasks[:1]) == {"rank 4": Exit(-9, 3.0, error=error)}
    assert "Detected 1 oom_kill event" in tasks[0].log.read_text()


def test_a_job_that_left_the_queue_without_a_word_is_lost_and_a_queue_that_does_not_answer_is_no_news(
    slurm, tmp_path, tasks
):
    polls = []

    def poll(running):
        polls.append(len(slurm.submitted))
        if len(polls) == 1:
            (slurm.folder / f"queue_{slurm.name}").unlink()  # squeue fails
        if len(polls) == 10:
            slurm.states.clear()
            (slurm.folder / f"queue_{slurm.name}").touch()

    slurm.job = lambda number, part: leave(part, OK if number > 1 else None, "RUNNING")
    assert run_all(tmp_path, tasks[:1], poll) == {"rank 4": OK}
    assert polls[:10] == [1] * 10
    assert len(slurm.submitted) == 2


def test_a_queue_that_is_silent_for_long_counts_as_empty(slurm, tmp_path, tasks, monkeypatch):
    monkeypatch.setattr(slurm_queue, "SILENT_SECONDS", 0.05)

    def job(number, part):
        if number == 2:
            raise RuntimeError("sbatch: error: Unable to contact slurm controller")
        return "RUNNING"

    slurm.job = job
    ended = run_all(tmp_path, tasks[:1], lambda running: (slurm.folder / f"queue_{slurm.name}").unlink(True))
    assert ended["rank 4"].error == "sbatch: Unable to contact slurm controller"


def test_leaving_cancels_what_is_in_the_queue(slurm, tmp_path, tasks, capsys):
    slurm.job = lambda number, part: "RUNNING"

    def interrupt(running):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path, tasks, interrupt)
    assert capsys.readouterr().err.splitlines()[-1] == "cancelled SLURM job 1"
    assert (slurm.folder / "cancelled").read_text() == f"--name={slurm.name}\n"
    assert not (tmp_path / ".ks_slurm").exists()


@pytest.fixture
def left(slurm, tmp_path):
    """A results folder whose sweep was killed while job 7 ran."""
    (tmp_path / ".ks_slurm").mkdir()
    write_json(tmp_path / ".ks_slurm" / "sweep.json", {"job_name": "ks_left"})
    slurm.name = "ks_left"
    slurm.set("7_1", "RUNNING")
    return tmp_path


def test_the_next_sweep_cancels_the_jobs_of_one_that_was_killed(slurm, left, weight_path, capsys, blank_pictures):
    arguments = ["--weight_path", str(weight_path), "--output_dir", str(left), "--ranks", "2", *QUICK]
    assert rank_sweep_study.main(arguments) == 0
    assert "cancelled SLURM job 7 of an earlier sweep" in capsys.readouterr().err
    assert (slurm.folder / "cancelled").read_text() == "--name=ks_left\n"
    assert not (left / ".ks_slurm").exists()


@pytest.mark.parametrize("program", ["squeue", "scancel"])
def test_jobs_that_cannot_be_cancelled_keep_the_folder(slurm, left, program):
    (slurm.folder / program).write_text("#!/bin/sh\nexit 1\n" if program == "squeue" else "#!/bin/sh\n")
    with pytest.raises(UsageError, match="in use by SLURM jobs of an earlier sweep.*scancel --name=ks_left"):
        cancel_left(left)
    assert (left / ".ks_slurm" / "sweep.json").exists()


def test_flags_that_do_not_go_together_are_refused(slurm, tmp_path, weight_path, capsys, monkeypatch):
    def line(*flags):
        arguments = ["--weight_path", str(weight_path), "--output_dir", str(tmp_path / "out"), "--ranks", "2"]
        assert rank_sweep_study.main([*arguments, "--quiet", *flags]) == 2
        assert not (tmp_path / "out").exists()
        [printed] = capsys.readouterr().err.splitlines()
        return printed.removeprefix("rank_sweep_study.py: error: ")

    assert line("--slurm", "partition=a") == "--slurm and --runs_per_job are for --launcher slurm, not for local"
    assert line("--runs_per_job", "2", "--launcher", "ray").endswith("not for ray")
    on_slurm = ("--launcher", "slurm")
    assert line(*on_slurm, "--slurm", "array=1-9").startswith("--slurm array: the launcher chooses it")
    assert line(*on_slurm, "--gpus", "0").startswith("--launcher slurm chooses GPUs itself")
    (slurm.folder / "refusal").write_text(
        "sbatch: error: invalid partition specified: nowhere\nsbatch: error: failed\n"
    )
    expected = "sbatch refuses --slurm partition=nowhere: invalid partition specified: nowhere"
    assert line(*on_slurm, "--slurm", "partition=nowhere") == expected
    assert line(*on_slurm, "--slurm", "partition=nowhere", "--dry_run") == expected
    monkeypatch.setattr(slurm_cluster, "call", lambda *_: None)
    assert line(*on_slurm).startswith("--launcher slurm: sbatch does not answer")
    assert rank_sweep_study.main(["--weight_path", str(weight_path), "--ranks", "2", "--dry_run", *on_slurm]) == 0
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "submitit.slurm.slurm", None)
    assert line(*on_slurm) == "--launcher slurm needs submitit: pip install -r requirements-slurm.txt"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert line(*on_slurm).startswith("--launcher slurm: sbatch is not on PATH")


@pytest.mark.parametrize("text", ["partition", "a=b=c", "mem=4G", "gpus-per-node=2", "constraint=a,b&c"])
def test_settings_reach_sbatch_and_a_dry_run_prints_them(slurm, tmp_path, weight_path, capsys, text):
    arguments = ["--weight_path", str(weight_path), "--ranks", "2", "--launcher", "slurm", "--dry_run", "--slurm", text]
    assert rank_sweep_study.main(arguments) == 0
    name, equals, value = text.replace("-", "_").partition("=")
    assert repr({name: value if equals else True})[1:-1] in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "=a", "Partition=a", "partition=", "partition=a\nsrun", "time 5"])
def test_what_is_no_setting_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        rank_sweep_study.main(["--weight_path", "w.pth", "--launcher", "slurm", "--slurm", text])
    assert "is not KEY=VALUE" in capsys.readouterr().err


@pytest.fixture
def job(tmp_path):
    """Start run_in_job as a node does, with two tasks; the first one sleeps until it is told to end."""
    code = (
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
        "print('threads', os.environ['OMP_NUM_THREADS'], flush=True)\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.02)\n"
    )
    (tmp_path / "sleep.py").write_text(code)
    tasks = [
        (Task(name, (sys.executable, "sleep.py"), tmp_path / f"{name}.log"), tmp_path / f"{name}.json")
        for name in ("first", "second")
    ]
    for _, record in tasks:
        write_json(record, {"lost": 0, "started": None, "exit": None})

    def start(timeout=None):
        call = "import sys; from pathlib import PosixPath; from ks.study.slurm_cluster import Task, run_in_job; "
        call += f"run_in_job({tasks!r}, {timeout}); assert 'torch' not in sys.modules"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "9", "SLURM_CPUS_PER_TASK": "3"}
        return subprocess.Popen([sys.executable, "-c", call], cwd=tmp_path, env=environment)

    return start


def records(tmp_path):
    return [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_interrupts_the_run_and_a_requeued_job_goes_on(job, tmp_path, number):
    process = job()
    wait_for(lambda: (tmp_path / "first.log").exists() and (tmp_path / "first.log").read_text())
    process.send_signal(number)
    assert process.wait(20) == 0
    first, second = records(tmp_path)
    assert first["exit"]["code"] == 130
    assert second["started"] is None
    (tmp_path / "go").touch()
    assert job().wait(20) == 0
    assert [(record["exit"]["code"], record["lost"]) for record in records(tmp_path)] == [(0, 0), (0, 0)]
    assert (tmp_path / "first.log").read_text() == "threads 3\n" * 2
    assert job().wait(20) == 0  # requeued after its end
    assert (tmp_path / "first.log").read_text() == "threads 3\n" * 2


def test_a_job_that_is_requeued_without_an_end_of_its_run_has_lost_it(job, tmp_path):
    log = tmp_path / "first.log"
    for _ in range(3):
        log.unlink(missing_ok=True)
        process = job()
        wait_for(lambda: log.exists() and log.read_text())
        process.kill()
        process.wait()
    (tmp_path / "go").touch()
    assert job().wait(20) == 0
    first, second = records(tmp_path)
    assert first["exit"]["error"] == "SLURM job 9 was lost, as 2 before it"
    assert second["exit"]["code"] == 0


def test_a_run_that_takes_too_long_is_stopped_on_its_node_and_the_next_one_begins(job, tmp_path):
    assert job(timeout=0.5).wait(20) == 0
    assert [record["exit"]["timed_out"] for record in records(tmp_path)] == [True, True]
