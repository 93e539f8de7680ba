"""Samples in a file of a sweep: the same bits as a run's own, and never believed blindly."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from layer_rows import layer_rows, problem_of

from ks.chain.passes import ChainPasses
from ks.training.samples import FILES_OF_SEEDS, Samples, make_samples, samples_in_files


@pytest.fixture
def setting(tmp_path):
    """Return a function from flags to (config, problem, order of the outputs of a rank)."""
    for number in range(2):
        torch.save(layer_rows("regular", 400, seed=number), tmp_path / f"{number}.pth")

    def make(*flags):
        flags = [tmp_path / flag if flag in ("0.pth", "1.pth") else flag for flag in flags]
        config, problem = problem_of(tmp_path, "--num_samples", 1600, *flags)

        def output_rows(rank):
            return ChainPasses(problem.chain.patterns(rank), block_order=True).output_rows

        return config, problem, output_rows

    return make


def draw(config, problem, output_rows, rank=2):
    return make_samples(config, problem, problem.internal_weight(), output_rows(rank))


@contextlib.contextmanager
def shared(config, problem, path):
    """Keep samples in a file of a sweep, drawn before any run asks for them."""
    with samples_in_files(config, problem, {config.seed: path}) as drawing:
        assert path.read_bytes() == b""
        next(drawing)
        yield


def tensors(samples):
    return [samples.inputs, samples.targets, *(tensor for one in samples.validation for tensor in one)]


def same(samples, others):
    """Whether values, and places between two multiples of 64 bytes, are equal: products may depend on both."""
    pairs = [*zip(tensors(samples), tensors(others), strict=True)]
    places = all(one.data_ptr() % 64 == other.data_ptr() % 64 for one, other in pairs)
    return places and all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs)


MEASURED = ["--inputs", "0.pth"]
FLAGS = {
    "default": [],
    "bfloat16": ["--dtype", "bfloat16", "--batch_size", "7"],
    "measured, with a bias": [*MEASURED, "--fit_bias", "--bs_last"],
    "given rows": [*MEASURED, "--sampling", "fixed", "--batch_size", "7"],
    "another order for another rank": ["--chain", "butterfly", "--num_factors", "4", "--batch_size", "256"],
}


@pytest.mark.parametrize("case", FLAGS)
def test_samples_of_a_file_have_the_bits_of_own_ones(case, setting, tmp_path, monkeypatch, capsys):
    config, problem, output_rows = setting(*FLAGS[case])
    own = {rank: draw(config, problem, output_rows, rank) for rank in (8, 1)}
    with shared(config, problem, tmp_path / "s.pth"):
        monkeypatch.setattr(Samples, "_draw_sets", None)  # nothing is drawn from here on
        for rank in (8, 1):
            assert same(draw(config, problem, output_rows, rank), own[rank])
    assert not (tmp_path / "s.pth").exists()
    assert capsys.readouterr().err == ""


def test_runs_share_the_pages_of_a_file_and_what_one_writes_stays_its_own(setting, tmp_path):
    config, problem, output_rows = setting()
    with shared(config, problem, tmp_path / "s.pth"):
        content = (tmp_path / "s.pth").read_bytes()
        samples = draw(config, problem, output_rows)
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(tmp_path / "s.pth") in maps.read_text()
        samples.inputs.zero_()
        assert (tmp_path / "s.pth").read_bytes() == content
        assert draw(config, problem, output_rows).inputs.any()


OTHERS = [
    *([[], other] for other in (["--sampling", "fixed"], ["--bs_last"])),
    *([MEASURED, other] for other in (["--inputs", "1.pth"], [*MEASURED, "--chain", "lowrank"])),
]


@pytest.mark.parametrize(("flags", "others"), OTHERS, ids=str)
def test_samples_of_other_settings_are_not_believed(flags, others, setting, tmp_path, capsys):
    """Measured samples have the second moment of their inputs, in coordinates that depend on the chain's groups."""
    config, problem, _ = setting(*flags)
    other = setting(*others)
    with shared(config, problem, tmp_path / "s.pth"):
        found = draw(*other)
    assert "other settings" in capsys.readouterr().err
    assert same(found, draw(*other))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_content(path):
    torch.save([torch.zeros(2)], path)


FAULTS = {
    "damaged": flip,
    "missing": Path.unlink,
    "other content": other_content,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_file_is_one_line_and_not_believed(fault, setting, tmp_path, capsys):
    case = config, problem, _ = setting()
    with shared(config, problem, tmp_path / "s.pth"):
        FAULTS[fault](tmp_path / "s.pth")
        found = draw(*case)
    (line,) = capsys.readouterr().err.splitlines()
    assert "drawn here" in line
    assert same(found, draw(*case))


@pytest.mark.parametrize("value", ["no JSON", "{}"])
def test_any_value_of_the_variable_is_one_line_at_most(value, setting, monkeypatch, capsys):
    monkeypatch.setenv(FILES_OF_SEEDS, value)
    assert draw(*setting()).inputs.any()
    assert capsys.readouterr().err.count("drawn here") == (value != "{}")


def test_a_run_waits_while_its_samples_are_drawn(setting, tmp_path):
    config, problem, _ = case = setting()
    with samples_in_files(config, problem, {config.seed: tmp_path / "s.pth"}) as drawing, ThreadPoolExecutor() as pool:
        found = pool.submit(draw, *case)
        with pytest.raises(TimeoutError):
            found.result(timeout=0.2)
        next(drawing)
        assert same(found.result(), draw(*case))


def test_samples_that_cannot_be_written_are_left_to_the_runs(setting, tmp_path, monkeypatch, capsys):
    config, problem, _ = case = setting()
    monkeypatch.setattr("ks.training.samples.save_tensors", Mock(side_effect=OSError(28, "full")))
    with samples_in_files(config, problem, {0: tmp_path / "s.pth", 1: tmp_path / "t.pth"}) as drawing:
        list(drawing)
        assert "every run draws its own samples" in capsys.readouterr().err
        assert draw(*case).inputs.any()
    assert not (tmp_path / "s.pth").exists()
    assert capsys.readouterr().err == ""


def test_fresh_samples_are_in_no_file(setting, tmp_path):
    config, problem, _ = setting("--sampling", "fresh")
    with samples_in_files(config, problem, {0: tmp_path / "s.pth"}):
        assert not (tmp_path / "s.pth").exists()


def test_samples_do_not_depend_on_the_number_of_threads(setting):
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(draw(*setting()))
    finally:
        torch.set_num_threads(before)
    assert same(*found)
