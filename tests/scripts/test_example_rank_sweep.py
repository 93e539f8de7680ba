"""The demo, in small."""

import signal
import subprocess
import sys

import pytest
from conftest import ROOT, files_of, processes_in, read_table, wait_for


def test_the_demo_runs_from_any_folder_and_prints_where_the_pictures_are(run, tmp_path):
    done = run("example_rank_sweep.py", "--ranks", 2, 4, "--num_epochs", 1, "--num_samples", 200)
    assert done.returncode == 0, done.stderr
    study = tmp_path / "demo_rank_sweep_results"
    assert (study / "rank_sweep_loss_curves.png").exists()
    assert str(study) in done.stdout


def test_the_demo_passes_a_failure_on(run):
    done = run("example_rank_sweep.py", "--ranks", 0)
    assert done.returncode == 2
    assert "rank_sweep_study.py ended with exit code 2" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_writes_a_summary_and_leaves_no_process(tmp_path, sent):
    command = [sys.executable, str(ROOT / "example_rank_sweep.py"), "--output_dir", "demo", "--ranks", "2"]
    process = subprocess.Popen([*command, "--num_epochs", "100000"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    wait_for(files_of(tmp_path / "demo", 2).curves_csv.exists)
    process.send_signal(sent)
    assert process.wait(60) == 130
    assert read_table(tmp_path / "demo" / "rank_sweep_summary.csv")[0]["status"].startswith("interrupted (after epoch ")
    assert not processes_in(tmp_path)
