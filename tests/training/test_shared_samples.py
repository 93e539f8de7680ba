"""Samples that the trainings of a sweep share: the same bits as their own, and never believed blindly."""

import os

import pytest
import torch
from layer_rows import layer_rows

from ks.cli.flags import TrainerConfig
from ks.cli.parser import Parser
from ks.product.passes import ChainPasses
from ks.training import shared_samples as module
from ks.training.problem import resolve
from ks.training.samples import Samples
from ks.training.shared_samples import SHARED_SAMPLES, make_samples, shared_samples


@pytest.fixture
def setting(tmp_path):
    """Returns a function from flags to (config, problem, order of the outputs of a rank)."""
    torch.save(torch.randn(16, 24, generator=torch.Generator().manual_seed(0)), tmp_path / "w.pth")
    for number in range(2):
        torch.save(layer_rows("regular", 400, seed=number), tmp_path / f"{number}.pth")

    def make(*flags):
        flags = [str(tmp_path / flag) if flag in ("0.pth", "1.pth") else flag for flag in flags]
        arguments = ["--weight_path", str(tmp_path / "w.pth"), "--num_samples", "1600", "--device", "cpu", *flags]
        config = Parser(TrainerConfig, "").parse(arguments)
        problem = resolve(config)

        def output_rows(rank):
            patterns = problem.chain.patterns(rank)
            passes = {"device": problem.device, "dtype": torch.float32, "block_order": True}
            return lambda batch: ChainPasses(patterns, batch, **passes).output_rows

        return config, problem, output_rows

    return make


def inherit(descriptor, monkeypatch):
    monkeypatch.setenv(SHARED_SAMPLES, str(os.dup(descriptor)))


def all_tensors(samples: Samples):
    return [tensor for one in samples.sets for tensor in one]


def same(samples, others):
    pairs = zip(all_tensors(samples), all_tensors(others), strict=True)
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)


MEASURED = ["--inputs", "0.pth"]
FLAGS = {
    "default": [],
    "fixed": ["--sampling", "fixed"],
    "features first": ["--bs_last"],
    "bfloat16": ["--dtype", "bfloat16"],
    "measured": MEASURED,
    "measured, with a bias": [*MEASURED, "--fit_bias", "--bs_last"],
    "given rows": [*MEASURED, "--sampling", "fixed"],
    "another order for another rank": ["--chain", "butterfly", "--num_factors", "4", "--batch_size", "256"],
}


@pytest.mark.parametrize("case", FLAGS)
def test_shared_samples_have_the_bits_of_own_ones(case, setting, monkeypatch, capsys):
    config, problem, output_rows = setting(*FLAGS[case])
    weight = problem.internal_weight()
    own = {rank: make_samples(config, problem, weight, output_rows(rank)) for rank in (8, 1)}
    with shared_samples(config, problem, 8, config.seed) as descriptor:
        monkeypatch.setattr(Samples, "_draw_sets", None)  # nothing is drawn from here on
        for rank in (8, 1):
            inherit(descriptor, monkeypatch)
            assert same(make_samples(config, problem, weight, output_rows(rank)), own[rank])
            assert SHARED_SAMPLES not in os.environ
    assert capsys.readouterr().err == ""


def test_a_training_that_writes_to_its_samples_does_not_reach_the_others(setting, monkeypatch):
    config, problem, output_rows = setting()
    weight = problem.internal_weight()
    with shared_samples(config, problem, 2, config.seed) as descriptor:
        inherit(descriptor, monkeypatch)
        make_samples(config, problem, weight, output_rows(2)).inputs.zero_()
        inherit(descriptor, monkeypatch)
        assert make_samples(config, problem, weight, output_rows(2)).inputs.any()


@pytest.mark.parametrize("flags", [["--seed", "1"], ["--input_std", "2"], ["--batch_size", "16"], ["--bs_last"]])
def test_samples_of_other_settings_are_not_believed(flags, setting, monkeypatch, capsys):
    config, problem, output_rows = setting()
    with shared_samples(config, problem, 2, config.seed) as descriptor:
        config, problem, output_rows = setting(*flags)
        inherit(descriptor, monkeypatch)
        found = make_samples(config, problem, problem.internal_weight(), output_rows(2))
    if "--input_std" not in flags:  # in internal units, σ is 1
        assert "other settings" in capsys.readouterr().err
    assert same(found, make_samples(config, problem, problem.internal_weight(), output_rows(2)))


@pytest.mark.parametrize(
    "flags", [[], ["--inputs", "1.pth"], [*MEASURED, "--fit_bias"], [*MEASURED, "--chain", "lowrank"]], ids=str
)
@pytest.mark.parametrize("sampling", ["whitened", "fixed"])
def test_samples_of_other_inputs_are_not_believed(flags, sampling, setting, monkeypatch, capsys):
    """Samples have the second moment of the inputs, in coordinates that depend on the column groups of the chain."""
    config, problem, _ = setting(*MEASURED, "--sampling", sampling)
    with shared_samples(config, problem, 2, config.seed) as descriptor:
        config, problem, output_rows = setting(*flags, "--sampling", sampling)
        inherit(descriptor, monkeypatch)
        found = make_samples(config, problem, problem.internal_weight(), output_rows(2))
    assert "other settings" in capsys.readouterr().err
    assert same(found, make_samples(config, problem, problem.internal_weight(), output_rows(2)))


def damaged(file):
    os.pwrite(file, b"\x01", module.HEAD_BYTES + 1000)


def cut_short(file):
    os.ftruncate(file, module.HEAD_BYTES + 64)


def without_head(file):
    os.pwrite(file, b"?" * module.HEAD_BYTES, 0)


def empty(file):
    os.ftruncate(file, 0)


def another_layout(file):
    head = os.pread(file, module.HEAD_BYTES, 0)
    os.pwrite(file, head.replace(b'"float32"', b'"nothing"'), 0)


@pytest.mark.parametrize("fault", [damaged, cut_short, without_head, empty, another_layout])
def test_a_damaged_file_is_not_believed(fault, setting, monkeypatch, capsys):
    config, problem, output_rows = setting()
    weight = problem.internal_weight()
    with shared_samples(config, problem, 2, config.seed) as descriptor:
        fault(descriptor)
        inherit(descriptor, monkeypatch)
        found = make_samples(config, problem, weight, output_rows(2))
    assert "drawn here" in capsys.readouterr().err
    assert same(found, make_samples(config, problem, weight, output_rows(2)))


@pytest.mark.parametrize("value", ["no number", "987", "-1", ""])
def test_a_descriptor_that_is_none_is_not_believed(value, setting, monkeypatch, capsys):
    config, problem, output_rows = setting()
    monkeypatch.setenv(SHARED_SAMPLES, value)
    assert make_samples(config, problem, problem.internal_weight(), output_rows(2)).inputs.any()
    assert ("drawn here" in capsys.readouterr().err) is bool(value)


def test_samples_that_cannot_be_shared_are_left_to_the_trainings(setting, monkeypatch, capsys):
    config, problem, _ = setting()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_nameless_file", full)
    with shared_samples(config, problem, 2, config.seed) as descriptor:
        assert descriptor is None
    assert "No space left on device" in capsys.readouterr().err


def test_fresh_samples_are_not_shared(setting):
    config, problem, _ = setting("--sampling", "fresh")
    with shared_samples(config, problem, 2, config.seed) as descriptor:
        assert descriptor is None


def test_a_system_without_files_in_memory_uses_its_temporary_folder(setting, monkeypatch, tmp_path):
    config, problem, output_rows = setting()
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    with shared_samples(config, problem, 2, config.seed) as descriptor:
        assert sorted(tmp_path.iterdir()) == before
        inherit(descriptor, monkeypatch)
        found = make_samples(config, problem, problem.internal_weight(), output_rows(2))
    assert same(found, make_samples(config, problem, problem.internal_weight(), output_rows(2)))


def test_samples_do_not_depend_on_the_number_of_threads(setting):
    config, problem, output_rows = setting()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(make_samples(config, problem, problem.internal_weight(), output_rows(2)))
    finally:
        torch.set_num_threads(before)
    assert same(*found)
