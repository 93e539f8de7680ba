"""Places: which cores and GPUs each run is given."""

from types import SimpleNamespace

import pytest
import torch

from ks.errors import UsageError
from ks.study.placement import choose_gpus, cpu_cores, cpu_slots, gpu_slots, slots_of


@pytest.fixture(autouse=True)
def no_inherited_place(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("jobs", "runs", "cores", "threads"),
    [(None, 9, 4, ["1"] * 4), (None, 2, 4, ["2"] * 2), (1, 9, 4, ["4"]), (3, 9, 4, ["1"] * 3), (8, 9, 4, ["1"] * 8)],
)
def test_cores_are_split_among_runs(jobs, runs, cores, threads):
    assert [slot["OMP_NUM_THREADS"] for slot in cpu_slots(jobs, runs, cores)] == threads


def test_every_gpu_gets_one_run():
    slots = gpu_slots(["0", "1"], jobs=None, runs=3, cores=6)
    assert slots == [{"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "3"} for gpu in ("0", "1")]
    assert len(gpu_slots(["0", "1"], jobs=1, runs=3, cores=6)) == 1


@pytest.mark.parametrize(
    ("inherited", "flag", "chosen"),
    [
        ("", "auto", ["0", "1", "2"]),
        ("", "2,0", ["2", "0"]),
        ("5,GPU-abc,7", "auto", ["5", "GPU-abc", "7"]),
        ("5,GPU-abc,7", "1", ["GPU-abc"]),
    ],
)
def test_an_inherited_choice_of_gpus_is_honoured(monkeypatch, inherited, flag, chosen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", inherited)
    assert choose_gpus(flag, device_count=3) == chosen


@pytest.mark.parametrize("flag", ["3", "0,0", "-1", "", "all", "0 1"])
def test_bad_gpus_are_refused(flag):
    with pytest.raises(UsageError, match=f"--gpus {flag}: auto, none, or different numbers below 3"):
        choose_gpus(flag, device_count=3)


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cuda", {}, ["0", "1"]),
        ("cuda", {"gpus": "1"}, ["1"]),
        ("cuda", {"jobs": 1}, ["0"]),
        ("cuda:1", {}, [None]),  # the runs are given --device cuda:1
        ("cpu", {"jobs": 2}, [None, None]),
    ],
    ids=str,
)
def test_places_of_a_sweep(monkeypatch, device, flags, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = SimpleNamespace(**{"jobs": "auto", "gpus": "auto", "device": device} | flags)
    slots = slots_of(config, torch.device(device), runs=9)
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots] == expected


def test_the_number_of_cores_can_be_given(monkeypatch):
    available = cpu_cores()
    assert available >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert cpu_cores() == 7
    for nonsense in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nonsense)
        assert cpu_cores() == available
