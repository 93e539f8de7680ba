"""Kills, a full disk, a read-only folder, a second sweep, a rank that hangs: no result is lost.

`make test-faults` kills twenty times where `make test` kills three times.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import KILLS, ROOT, files_of, processes_in, wait_for
from warm import FileSizeLimit

from ks.files.atomic import read_json
from ks.files.curves import curves_if_any, read_curves
from ks.files.layout import RunFiles

EPOCHS = str(100 * KILLS)
TRAINING = ("--num_samples", "80", "--batch_size", "16", "--num_epochs", EPOCHS, "--rank", "2")
SWEEP = (*TRAINING[:6], "--ranks", "1", "2", "4", "--jobs", "2")
FEW = ("--num_samples", "80", "--num_epochs", "3", "--ranks", "1", "2")


def start(script, tmp_path, *arguments, before=(), env=None, **options):
    command = [*before, sys.executable, str(ROOT / script), "--weight_path", "weight.pth", *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, cwd=tmp_path, text=True, env=os.environ | (env or {}), **options)


def finish(process, timeout=120):
    stdout, stderr = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def sweep(tmp_path, *arguments, **options):
    return finish(start("rank_sweep_study.py", tmp_path, *arguments, **options))


def epochs_in(folder) -> int:
    """Return the number of epochs that all runs of a folder have."""
    return sum(len(curves_if_any(path)) for path in folder.rglob("*_loss_curves.csv"))


def kill_at_random(start_again, folder) -> None:
    """Start and kill -9, `KILLS` times, each at a random moment while it trains."""
    chance = random.Random(0)
    for _ in range(KILLS):
        before = epochs_in(folder)
        process = start_again()
        wait_for(lambda p=process, b=before: epochs_in(folder) > b or p.poll() is not None)
        time.sleep(chance.uniform(0, 0.3))
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        finish(process)


def losses(path):
    """Everything in a curves file but the seconds."""
    return [{name: str(cell) for name, cell in row.items() if name != "epoch_seconds"} for row in read_curves(path)]


def assert_same_run(ours: RunFiles, theirs: RunFiles):
    assert losses(ours.curves_csv) == losses(theirs.curves_csv)
    for one, other in ((ours.final, theirs.final), (ours.best, theirs.best)):
        one, other = (torch.load(path)["state_dict"] for path in (one, other))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("extra", [(), ("--scheduler", "plateau", "--scheduler_patience", "2", "--sampling", "fresh")])
def test_a_run_killed_again_and_again_ends_as_if_undisturbed(weight_path, tmp_path, extra):
    assert finish(start("train_with_random.py", tmp_path, *TRAINING, *extra, "--output_dir", "whole")).returncode == 0
    whole, killed = (RunFiles(tmp_path / name, "ks_chain", 2) for name in ("whole", "killed"))

    def resume():
        return start("train_with_random.py", tmp_path, *TRAINING, *extra, "--output_dir", "killed", "--resume")

    kill_at_random(resume, tmp_path / "killed")
    done = finish(resume())
    assert done.returncode == 0, done.stderr
    assert_same_run(killed, whole)
    assert "finished before" in finish(resume()).stdout


def test_a_sweep_killed_again_and_again_ends_as_if_undisturbed(weight_path, tmp_path):
    assert sweep(tmp_path, *SWEEP, "--output_dir", "whole").returncode == 0
    kill_at_random(
        lambda: start("rank_sweep_study.py", tmp_path, *SWEEP, "--output_dir", "killed"), tmp_path / "killed"
    )
    wait_for(lambda: not processes_in(tmp_path), seconds=15)  # the runs stop by themselves
    done = sweep(tmp_path, *SWEEP, "--output_dir", "killed")
    assert done.returncode == 0, done.stderr
    for rank in (1, 2, 4):
        assert_same_run(*(files_of(tmp_path / name, rank) for name in ("killed", "whole")))
    assert not list((tmp_path / "killed").glob(".*"))


def test_any_number_of_jobs_and_of_threads_and_a_run_alone_agree(weight_path, tmp_path):
    """Alone, a run draws the samples that a sweep shares."""
    flags = ("--num_samples", "200", "--num_epochs", "3")
    for jobs, threads in (("1", "2"), ("2", "1")):
        places = ("--jobs", jobs, "--output_dir", jobs + threads)
        done = sweep(tmp_path, *flags, "--ranks", "2", "4", *places, env={"OMP_NUM_THREADS": threads})
        assert done.returncode == 0, done.stderr
    for rank in (2, 4):
        alone = RunFiles(tmp_path / "alone", "ks_chain", rank)
        arguments = (*flags, "--rank", rank, "--output_dir", "alone")
        assert finish(start("train_with_random.py", tmp_path, *arguments)).returncode == 0
        for folder in ("12", "21"):
            assert_same_run(files_of(tmp_path / folder, rank), alone)
            assert "samples" not in files_of(tmp_path / folder, rank).log.read_text().replace("samples suffice", "")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_leaves_no_samples(weight_path, tmp_path, sent):
    """After a kill, the next sweep in the folder deletes them, also one that needs other seeds or none."""
    folder = tmp_path / "out"
    process = start("rank_sweep_study.py", tmp_path, *SWEEP, "--seeds", 0, 1, "--output_dir", "out")
    wait_for(lambda: epochs_in(folder) > 0 or process.poll() is not None)
    samples = [folder / f".rank_sweep_samples_{seed}.pth" for seed in (0, 1)]
    assert all(path.exists() for path in samples)
    process.send_signal(sent)
    finish(process)
    wait_for(lambda: not processes_in(tmp_path), seconds=15)
    assert all(path.exists() is (sent == signal.SIGKILL) for path in samples)
    if sent == signal.SIGKILL:
        (folder / ".rank_sweep_samples_7.pth").touch()  # one of the user's
        done = sweep(tmp_path, *FEW, "--seed", 2, "--output_dir", "out", "--overwrite")
        assert done.returncode == 0, done.stderr
        assert [path.name for path in folder.glob(".*")] == [".rank_sweep_samples_7.pth"]


def test_two_sweeps_in_one_folder(weight_path, tmp_path):
    first = start("rank_sweep_study.py", tmp_path, "--ranks", 2, "--num_samples", 80, "--num_epochs", 100000)
    wait_for(files_of(tmp_path / "rank_sweep_results", 2).curves_csv.exists)
    second = sweep(tmp_path, *FEW)
    assert second.returncode == 2
    assert f"in use by another sweep (process {first.pid} on" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    first.kill()
    finish(first)
    third = sweep(tmp_path, *FEW, "--overwrite")  # the lock died with its holder
    assert third.returncode == 0, third.stderr


def test_a_rank_that_hangs_is_stopped(weight_path, tmp_path):
    flags = ("--ranks", 2, "--num_samples", 80, "--num_epochs", 100000, "--timeout_per_rank", 4)
    done = sweep(tmp_path, *flags)
    assert done.returncode == 1, done.stderr
    assert "rank 2: timed out" in done.stderr
    assert not processes_in(tmp_path)


def test_a_full_disk_loses_nothing(weight_path, tmp_path):
    """Curves and records still fit, checkpoints do not."""
    torch.save(torch.randn(64, 96), tmp_path / "wide.pth")
    flags = ("--weight_path", "wide.pth", "--num_samples", 80, "--num_epochs", 6, "--rank", 2, "--output_dir", "out")
    full = finish(start("train_with_random.py", tmp_path, *flags, preexec_fn=FileSizeLimit(4500)))
    assert full.returncode == 1
    assert "File too large" in full.stderr.splitlines()[-1]
    assert "Traceback" not in full.stderr
    files = RunFiles(tmp_path / "out", "ks_chain", 2)
    assert read_curves(files.curves_csv)  # of the epochs until the resume state did not fit
    assert not list((tmp_path / "out").glob(".*"))
    assert finish(start("train_with_random.py", tmp_path, *flags, "--resume")).returncode == 0
    assert read_json(files.training_log)["status"] == "ok"


def test_a_disk_that_is_full_for_samples_alone_changes_nothing(weight_path, tmp_path):
    flags = ("--num_samples", 20000, "--num_epochs", 1, "--ranks", 1, 2, "--quiet", "--output_dir", "out")
    full = sweep(tmp_path, *flags, preexec_fn=FileSizeLimit(2_500_000))
    assert full.returncode == 0, full.stderr
    (line,) = full.stderr.splitlines()
    assert line.startswith("every run draws its own samples, because they cannot be kept in a file: ")
    assert "File too large" in line
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize("script", ["train_with_random.py", "rank_sweep_study.py"])
def test_a_disk_that_is_full_at_the_start_is_one_line_and_then_the_same_command_goes_on(weight_path, tmp_path, script):
    flags = ("--num_samples", 80, "--num_epochs", 2, "--output_dir", "out", "--quiet")
    flags += ("--ranks", 2) if script == "rank_sweep_study.py" else ("--rank", 2, "--resume")
    full = finish(start(script, tmp_path, *flags, preexec_fn=FileSizeLimit(0)))
    assert full.returncode == 1
    lock = ".sweep.lock" if script == "rank_sweep_study.py" else ".ks_chain.lock"
    line = f"{script}: File too large: {tmp_path / 'out' / lock}; fix the cause, then rerun the same command"
    assert full.stderr.splitlines() == [line]
    done = finish(start(script, tmp_path, *flags))
    assert done.returncode == 0, done.stderr


# What lets root write where the permissions forbid it.
LIKE_A_USER = ("setpriv", "--inh-caps", "-dac_override", "--bounding-set", "-dac_override") if os.getuid() == 0 else ()


@pytest.mark.skipif(bool(LIKE_A_USER) and not shutil.which("setpriv"), reason="root, and no setpriv (util-linux)")
class TestReadOnlyFolders:
    @pytest.mark.parametrize("script", ["train_with_random.py", "rank_sweep_study.py"])
    def test_refused_at_the_start(self, weight_path, tmp_path, script):
        (tmp_path / "out").mkdir(mode=0o555)
        done = finish(start(script, tmp_path, "--output_dir", "out", before=LIKE_A_USER))
        assert done.returncode == 2
        assert f"output folder {tmp_path / 'out'} cannot be written: Permission denied" in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_one_that_becomes_read_only_loses_nothing(self, weight_path, tmp_path):
        flags = (*TRAINING[:4], "--num_epochs", 400, "--ranks", 1, 2, "--jobs", 2)
        process = start("rank_sweep_study.py", tmp_path, *flags, before=LIKE_A_USER)
        files = files_of(tmp_path / "rank_sweep_results", 2)
        wait_for(files.resume.exists)
        files.directory.chmod(0o555)
        done = finish(process)
        assert done.returncode == 3, done.stderr
        assert "rank 2: failed (exit 1)" in done.stderr
        assert "Permission denied" in done.stderr
        assert "Traceback" not in done.stderr
        assert "Traceback" not in files.log.read_text()
        kept = len(read_curves(files.curves_csv))
        files.directory.chmod(0o755)
        assert 0 < kept < 400
        assert sweep(tmp_path, *flags).returncode == 0
        assert sweep(tmp_path, *flags[:-5], "--ranks", 2, "--output_dir", "whole").returncode == 0
        assert_same_run(files, files_of(tmp_path / "whole", 2))


JUMPING_CLOCK = """
import random, time
true_time, chance = time.time, random.Random(0)
time.time = lambda: true_time() + chance.uniform(-1e6, 1e6)
"""


def test_a_clock_that_jumps_disturbs_nothing(weight_path, tmp_path):
    """Of the wall clock there are only the dates in the files; what is timed goes by another one."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    env = {"PYTHONPATH": str(tmp_path)}
    flags = (*FEW, "--timeout_per_rank", 100)
    jumping = sweep(tmp_path, *flags, "--output_dir", "jumping", env=env)
    assert jumping.returncode == 0, jumping.stderr
    assert sweep(tmp_path, *flags, "--output_dir", "steady").returncode == 0
    for rank in (1, 2):
        ours, theirs = (files_of(tmp_path / name, rank) for name in ("jumping", "steady"))
        assert_same_run(ours, theirs)
        assert 0 < read_json(ours.training_log)["train_seconds"] < 100
        assert read_json(ours.config)["peak_host_mib"] > 50
        days = [read_json(files.config)["ended"][:10] for files in (ours, theirs)]
        assert days[0] != days[1]  # the clock did jump
