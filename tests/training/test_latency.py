"""What is measured, and how often; never how long anything takes."""

import time

import pytest
import torch
from conftest import QUICK

import ks
import train_with_random
from ks.files.columns import BATCHES, LATENCIES, names
from ks.files.layout import RunFiles
from ks.files.schema import Latency, TrainingLog, read_json_as
from ks.model.timing import ROUNDS, interleaved_medians
from ks.training import latency, recorder
from ks.training.latency import measure_latency

CPU = torch.device("cpu")


@pytest.fixture
def readings(monkeypatch):
    """Replace the measurement: every call takes as many seconds as the batch has samples, over `per_second`."""
    seen = []

    def measure(functions, device, seconds):
        outputs = [function() for function in functions.values()]
        seen.append([tuple(output.shape) for output in outputs])
        return dict.fromkeys(functions, len(outputs[0]) / measure.per_second)

    measure.per_second, measure.seen = 1e9, seen
    monkeypatch.setattr(latency, "interleaved_medians", measure)
    return measure


@pytest.mark.parametrize("batch_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chain_and_dense_are_measured_on_the_same_batches(readings, batch_last, dtype):
    model = ks.KSLinear(24, 16, rank=2, batch_last=batch_last)
    found = measure_latency(model, torch.randn(16, 24).double(), dtype, "auto", torch.get_num_threads(), 1.0)
    shapes = [(16, batch) if batch_last else (batch, 16) for batch in BATCHES]
    assert readings.seen == [[shape] * 3 for shape in shapes]
    assert (found.threads, found.dtype, found.device, found.launched) == (1, str(dtype)[6:], "cpu", "eager")
    assert all(getattr(found, name) > 0 for name in names(LATENCIES))


def test_a_batch_that_would_take_too_long_is_left_out(readings):
    readings.per_second = 200  # a round takes 10 ms at batch 1, 0.32 s at batch 32, 10 s at batch 1024
    found = measure_latency(ks.KSLinear(24, 16, rank=2), torch.randn(16, 24), torch.float32, "auto", 1, 1.0)
    assert found.latency_ms_batch_32 == pytest.approx(160)
    assert found.latency_ms_batch_1024 is None is found.dense_latency_ms_batch_1024


def test_the_functions_take_turns_and_the_first_call_does_not_count(monkeypatch):
    calls, clock = [], iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    functions = {name: lambda name=name: calls.append(name) for name in ("slow", "fast")}
    assert interleaved_medians(functions, CPU, 0.0, clock=time.perf_counter) == {"slow": 1.0, "fast": 1.0}
    assert calls == ["slow", "fast", "slow", "slow", "fast", "fast"] + ["slow", "fast"] * ROUNDS[0]


@pytest.mark.parametrize("works", [True, False])
def test_on_a_gpu_graphs_are_timed_beside_eager_calls_and_a_failed_capture_leaves_those(readings, monkeypatch, works):
    captured = []

    def capture(function):
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing")
        captured.append(function)
        return function

    monkeypatch.setattr(latency, "launches", lambda device: {"eager": lambda function: function, "CUDA graph": capture})
    found = measure_latency(ks.KSLinear(24, 16, rank=2), torch.randn(16, 24), torch.float32, "auto", 1, 1.0)
    assert found.launched == ("CUDA graph" if works else "eager")
    assert set(found.eager) == (set(names(LATENCIES)) if works else set())
    assert len(captured) == (3 * len(BATCHES) if works else 0)
    assert all(getattr(found, name) > 0 for name in names(LATENCIES))


def test_one_thread_is_measured_and_no_global_random_number_drawn(readings, monkeypatch):
    used = []
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    model, weight = ks.KSLinear(24, 16, rank=2, chain="butterfly"), torch.randn(16, 24)
    before = torch.get_rng_state()
    measure_latency(model, weight, torch.float32, "auto", 3, 1.0)
    assert torch.equal(before, torch.get_rng_state())
    assert used == [1, 3]


def test_the_values_of_the_measured_chain_stay(readings):
    model = ks.KSLinear(24, 16, rank=2)
    before = [factor.detach().clone() for factor in model.factors]
    measure_latency(model, torch.randn(16, 24), torch.float32, "auto", 1, 1.0)
    assert all(torch.equal(old, new) and new.requires_grad for old, new in zip(before, model.factors))


def test_a_training_keeps_its_latency(run, weight_path, tmp_path):
    command = ("train_with_random.py", "--weight_path", weight_path, *QUICK, "--output_dir", "out")
    files = RunFiles(tmp_path / "out", "ks_chain", 4)
    assert run(*command).returncode == 0
    assert read_json_as(files.training_log, TrainingLog).latency is None
    done = run(*command, "--latency_seconds", 0.01)
    assert done.returncode == 0, done.stderr
    assert isinstance(read_json_as(files.training_log, TrainingLog).latency, Latency)


def test_a_resumed_run_does_not_measure_again_and_the_measurement_does_not_count(weight_path, tmp_path, monkeypatch):
    clock, later, measured = time.perf_counter, [0.0], []

    def measure(*_):
        later[0] += 1000.0
        measured.append(Latency(threads=1 + len(measured), dtype="float32", device="cpu"))
        return measured[-1]

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + later[0])
    monkeypatch.setattr(recorder, "measure_latency", measure)
    arguments = ["--weight_path", str(weight_path), *QUICK[:4], "--output_dir", str(tmp_path), "--quiet"]
    log = RunFiles(tmp_path, "ks_chain", 4).training_log
    for flags, kept in ((["--num_epochs", "2"], 0), (["--num_epochs", "3", "--resume"], 0), (["--num_epochs", "2"], 1)):
        assert train_with_random.main([*arguments, *flags]) == 0
        found = read_json_as(log, TrainingLog)
        assert found.latency == measured[kept]
        assert found.train_seconds < 500
