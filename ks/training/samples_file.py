"""Samples in a file of a sweep: drawn once, mapped into memory by its runs, deleted when it ends.

A run that finds no such file, a damaged one, or samples of other settings, draws its own, with the same bits.
"""

import contextlib
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ks import signals
from ks.cli.console import note
from ks.cli.flags import TrainingFlags
from ks.errors import one_line
from ks.files.atomic import save_tensors
from ks.files.weights import DTYPES
from ks.training.problem import Problem
from ks.training.samples import Samples, SampleSet

FILES_OF_SEEDS = "KS_SAMPLES"  # in the environment of a run: a JSON object from seeds to paths
LONG_WORK = 2**36  # multiply-adds, a few seconds


def make_samples(
    config: TrainingFlags,
    problem: Problem,
    weight: torch.Tensor,
    output_rows: torch.Tensor | None = None,
    seed: int | None = None,
) -> Samples:
    """Return the samples of a run: from the file of its sweep if there is one, else drawn here.

    Args:
        config: with batch size, layout, dtype and seed.
        problem: that the run solves.
        weight: W in internal units.
        output_rows: the order of the training targets, as rows of W; the natural one unless told.
        seed: of the samples; that of the config unless told.
    """
    seed = config.seed if seed is None else seed
    stored, given = _read(seed, _settings(config, problem, seed)), problem.weight.tensor
    return Samples(
        weight.float(),
        problem.num_train,
        problem.num_validation,
        config.batch_size,
        sampling=problem.sampling,
        seed=seed,
        moment=problem.moment,
        output_rows=output_rows,
        batch_last=config.bs_last,
        dtype=DTYPES[config.dtype],
        stored=stored,
        training=None if stored or problem.sampling != "fixed" else problem.layer_inputs.given_samples(given),
        held_out=None if stored else problem.layer_inputs.held_out_samples(given),
    )


@contextlib.contextmanager
def samples_in_files(config: TrainingFlags, problem: Problem, paths: dict[int, Path]) -> Iterator[None]:
    """Keep the samples of some seeds in files, for the runs that start meanwhile on this machine.

    `fresh` samples and those on GPUs are left out.

    Args:
        config: of the runs.
        problem: that they solve.
        paths: of the files, by seed.
    """
    if problem.device.type != "cpu" or problem.sampling == "fresh":
        paths = {}
    if len(paths) * problem.num_train * problem.cols * (problem.cols + problem.rows) > LONG_WORK:
        note("drawing the samples that the runs share", config.quiet)
    try:
        try:
            for seed, path in paths.items():
                if not signals.came():
                    _write(path, config, problem, seed)
            os.environ[FILES_OF_SEEDS] = json.dumps({seed: str(path) for seed, path in paths.items()})
        except (OSError, MemoryError, RuntimeError) as error:  # the CPU's allocator raises a RuntimeError
            note(f"every run draws its own samples, because they cannot be kept in a file: {one_line(error)}")
        yield
    finally:
        os.environ.pop(FILES_OF_SEEDS, None)
        for path in paths.values():
            path.unlink(missing_ok=True)


def _settings(config: TrainingFlags, problem: Problem, seed: int) -> dict[str, Any]:
    """Return everything that determines the bits of samples."""
    return {
        "weight": problem.weight.sha256(),
        "sampling": problem.sampling,
        "seed": seed,
        "num_train": problem.num_train,
        "num_validation": problem.num_validation,
        "batch_size": config.batch_size,
        "bs_last": config.bs_last,
        "dtype": config.dtype,
        "inputs": problem.layer_inputs.description,
        "chain": problem.chain.describe(),  # its column groups are whitened
        "torch": str(torch.__version__),
    }


def _write(path: Path, config: TrainingFlags, problem: Problem, seed: int) -> None:
    sets = make_samples(config, problem, problem.internal_weight(), seed=seed).sets
    save_tensors({"settings": _settings(config, problem, seed), "sets": [tuple(one) for one in sets]}, path)


def _read(seed: int, settings: dict[str, Any]) -> list[SampleSet] | None:
    """Return the samples of a file that this run was given, or None if it draws its own.

    The file is mapped privately: runs share its pages, and what one writes stays its own. Its tensors begin at
    multiples of 64 bytes like those that are drawn, which the bits of some products depend on.
    """
    try:
        path = json.loads(os.environ.get(FILES_OF_SEEDS, "{}")).get(str(seed))
        if path is None:
            return None
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if content["settings"] != settings:
            raise ValueError("it holds samples of other settings")
        return [SampleSet(*one) for one in content["sets"]]
    except Exception as error:  # a damaged file can raise nearly anything
        note(f"the samples are drawn here, because the file of the sweep cannot be used: {one_line(error)}")
        return None
