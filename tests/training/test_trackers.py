"""The last run of a tracker holds each epoch once, whatever stopped others; make test-trackers takes the real ones."""

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys

import pytest
from conftest import QUICK, ROOT, interrupt_in_epoch

import train_with_random
from ks.cli.flags import TRACKERS
from ks.errors import UsageError
from ks.files.curves import read_curves
from ks.training import trackers

VALUES = ("train_loss", "val_loss", "population_loss", "lr", "grad_norm")


class StandIn:
    """A tracker in memory; it survives a run as a database would."""

    def __init__(self, fails_at=None):
        self.opened, self.rows, self.closed, self.fails_at = [], [], 0, fails_at

    def open(self, files, settings):
        self.opened.append((files.prefix, settings))
        return lambda *row: self.log(*row), self.close

    def log(self, epoch, values):
        if epoch == self.fails_at:
            raise ConnectionError("no\nnetwork")
        self.rows.append((epoch, values))

    def close(self):
        self.closed += 1


@pytest.fixture
def stand_in(monkeypatch):
    """Put a stand-in into the place of trackio."""

    def place(**options):
        tracker = StandIn(**options)
        monkeypatch.setitem(trackers.OPENERS, "trackio", tracker.open)
        monkeypatch.setattr("ks.training.problem.check_installed", lambda name: None)
        return tracker

    return place


def train(weight_path, folder, *flags, tracker="trackio", code=0):
    arguments = ["--weight_path", weight_path, "--output_dir", folder, *QUICK, *flags]
    arguments += ["--log_to", tracker] if tracker else []
    assert train_with_random.main([*map(str, arguments)]) == code


def curves_of(folder):
    return read_curves(folder / "ks_chain_rank_4_loss_curves.csv")


def expected_of(folder):
    """What a tracker must hold: the finite values of the curves."""
    return [(row["epoch"], {name: row[name] for name in VALUES if row[name] == row[name]}) for row in curves_of(folder)]


def test_every_epoch_is_logged_with_the_values_of_the_curves(weight_path, tmp_path, stand_in, capsys):
    tracker = stand_in()
    train(weight_path, tmp_path / "out")
    assert tracker.rows == expected_of(tmp_path / "out")
    assert len(tracker.rows) == 3
    assert set(tracker.rows[-1][1]) == set(VALUES)
    [(name, settings)] = tracker.opened
    assert (name, settings["rank"]) == ("ks_chain", 4)
    assert tracker.closed == 1
    assert f"log_to trackio: {tmp_path / 'out' / 'trackio'}" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("before", ["trackio", None])
def test_a_resumed_run_logs_all_its_epochs(weight_path, tmp_path, stand_in, monkeypatch, before):
    tracker = stand_in()
    with monkeypatch.context() as patched:
        interrupt_in_epoch(patched, 2)
        train(weight_path, tmp_path / "out", tracker=before, code=130)
    assert [epoch for epoch, _ in tracker.rows] == ([1, 2] if before else [])
    tracker.rows.clear()
    train(weight_path, tmp_path / "out", "--resume")
    logged = [(epoch, values["val_loss"]) for epoch, values in tracker.rows]
    assert logged == [(row["epoch"], row["val_loss"]) for row in curves_of(tmp_path / "out")]


def test_a_tracker_that_fails_costs_only_its_log(weight_path, tmp_path, stand_in, capsys):
    tracker = stand_in(fails_at=2)
    train(weight_path, tmp_path / "out", "--quiet")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "WARNING: --log_to trackio is switched off (ConnectionError: no network)"
    assert [epoch for epoch, _ in tracker.rows] == [1]
    assert len(curves_of(tmp_path / "out")) == 3


def test_a_tracker_is_no_setting_of_a_run(weight_path, tmp_path, stand_in, capsys):
    train(weight_path, tmp_path / "out", tracker=None)
    stand_in()
    train(weight_path, tmp_path / "out", "--resume")
    assert "finished before" in capsys.readouterr().out


def test_the_output_of_a_tracker_stays_out_of_the_results(weight_path, tmp_path, stand_in, monkeypatch, capsys):
    tracker = stand_in()
    monkeypatch.setattr(tracker, "log", lambda epoch, values: print("* Trackio says"))
    train(weight_path, tmp_path / "out")
    shown = capsys.readouterr()
    assert shown.err.count("* Trackio says") == 3
    assert "Trackio" not in shown.out
    train(weight_path, tmp_path / "quiet", "--quiet")
    assert capsys.readouterr().err == ""


def test_every_tracker_of_the_flag_can_be_opened():
    assert tuple(trackers.OPENERS) == TRACKERS


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_missing_package_is_one_line_with_its_command(monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(UsageError, match=f"--log_to {tracker} needs the package {tracker}; .*: pip install {tracker}$"):
        trackers.check_installed(tracker)


def test_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UsageError, match="pip install wandb"):
        trackers.check_installed("wandb")


# The real packages, in processes of their own: trackio reads its folder when it is imported.

INSTALLED = all(importlib.util.find_spec(name) is not None for name in TRACKERS)
real = [pytest.mark.trackers, pytest.mark.skipif(not INSTALLED, reason="tensorboard, wandb or trackio is missing")]
STOPPED_AT = 3
SESSION = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_with_random
from ks.training.resume_state import ResumeState
offer = ResumeState.offer
def stop(self, threads, curves, *state):
    if len(curves) == {STOPPED_AT} and sys.argv[1] == "interrupted":
        raise KeyboardInterrupt
    if len(curves) == {STOPPED_AT} and sys.argv[1] == "killed":
        time.sleep(2)  # trackio writes twice a second
        os.kill(os.getpid(), 9)
    offer(self, threads, curves, *state)
ResumeState.offer = stop
sys.exit(train_with_random.main(sys.argv[2:]))
"""


def tensorboard_runs(folder):
    """Return the epochs that TensorBoard shows, with their values, by run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "ks_chain"))
    events.Reload()
    rows = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            rows.setdefault(event.step, []).append((name, event.value))
    return {"ks_chain": sorted(rows.items())}


def trackio_runs(folder):
    (database,) = (folder / "trackio").glob("*.db")
    runs = {}
    with sqlite3.connect(database) as connection:
        for run, name, step, metrics in connection.execute("SELECT run_id, run_name, step, metrics FROM metrics"):
            assert name == "ks_chain"
            runs.setdefault(run, []).append((step, list(json.loads(metrics).items())))
    return runs


def wandb_runs(folder):
    from wandb.proto import wandb_internal_pb2

    runs = {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, position = path.read_bytes(), 7  # a header, then records with their checksum, size and kind
        while position < len(data):
            _, size, kind = struct.unpack("<IHB", data[position : position + 7])
            assert kind == 1  # all in one piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data[position + 7 : position + 7 + size])
            position += 7 + size
            if record.HasField("run"):
                assert record.run.display_name == "ks_chain"
                rows = runs.setdefault(record.run.run_id, [])
            if record.HasField("history"):
                values = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append((values["_step"], [(name, values[name]) for name in VALUES if name in values]))
    return runs


READ = {"tensorboard": tensorboard_runs, "wandb": wandb_runs, "trackio": trackio_runs}


@pytest.mark.parametrize("how", ["interrupted", "killed"])
@pytest.mark.parametrize("tracker", [pytest.param(name, marks=real) for name in TRACKERS])
def test_the_run_after_a_resume_has_every_epoch_once(weight_path, tmp_path, tracker, how):
    def session(how, *flags):
        arguments = ["--weight_path", weight_path, *QUICK[:4], "--num_epochs", 5, "--output_dir", "out"]
        arguments += ["--log_to", tracker, *flags]
        command = [sys.executable, "-c", SESSION, how, *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    folder = tmp_path / "out"
    assert session(how).returncode == {"interrupted": 130, "killed": -9}[how]
    if (tracker, how) != ("wandb", "killed"):  # wandb writes every 15 seconds
        [rows] = READ[tracker](folder).values()
        assert [epoch for epoch, _ in rows] == [1, 2, 3]
    done = session("whole", "--resume")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert done.stdout.startswith("rank 4: validation loss")
    *_, found = READ[tracker](folder).values()
    assert [epoch for epoch, _ in found] == [1, 2, 3, 4, 5]
    for (_, logged), (_, expected) in zip(found, expected_of(folder), strict=True):
        assert dict(logged) == pytest.approx(expected, rel=1e-6)
    assert session("whole").returncode == 0  # anew
    runs = [[epoch for epoch, _ in rows] for rows in READ[tracker](folder).values()]
    assert runs[-1] == [1, 2, 3, 4, 5]
    assert tracker == "wandb" or len(runs) == 1  # wandb keeps the earlier runs, the others replace them
