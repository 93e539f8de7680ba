"""Samples that all trainings of a sweep share: drawn once by the sweep, mapped into memory by each training.

They are in a file without a name, which trainings inherit as an open descriptor. It vanishes with the last process that
holds it, so that nothing is left however a sweep ends. A training that finds no such file, or a damaged one, or samples
of other settings, draws its own samples, with the same bits.
"""

import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import torch

from ks.cli.console import note
from ks.cli.flags import TrainingFlags
from ks.errors import one_line
from ks.files.weights import DTYPES
from ks.training.problem import Problem
from ks.training.samples import Samples, SampleSet

SHARED_SAMPLES = "KS_SHARED_SAMPLES"  # the descriptor, in the environment of a training
HEAD_BYTES = 2**16  # a JSON object, padded with blanks: settings, layout and sum
ALIGNMENT = 64
LONG_WORK = 2**36  # multiply-adds, a few seconds


def make_samples(
    config: TrainingFlags,
    problem: Problem,
    weight: torch.Tensor,
    output_rows: torch.Tensor | None = None,
    seed: int | None = None,
) -> Samples:
    """Return the samples of a training: those of its sweep if it shares them, else drawn here.

    Args:
        config: with batch size, layout, dtype and seed.
        problem: that the training solves.
        weight: W in internal units.
        output_rows: the order of the training targets, as rows of W; the natural one unless told.
        seed: of the samples; that of the config unless told.
    """
    seed = config.seed if seed is None else seed
    stored, given = _inherited(_settings(config, problem, seed)), problem.weight.tensor
    return Samples(
        weight.float(),
        problem.num_train,
        problem.num_validation,
        config.batch_size,
        sampling=problem.sampling,
        seed=seed,
        inputs_moment=problem.inputs,
        output_rows=output_rows,
        batch_last=config.bs_last,
        dtype=DTYPES[config.dtype],
        stored=stored,
        training=None if stored or problem.sampling != "fixed" else problem.layer_inputs.given_samples(given),
        held_out=None if stored else problem.layer_inputs.held_out_samples(given),
    )


@contextlib.contextmanager
def shared_samples(config: TrainingFlags, problem: Problem, rank: int, seed: int) -> Iterator[int | None]:
    """Draw the samples of one seed for trainings that inherit them; `fresh` ones and those on GPUs are not shared.

    Args:
        config: of the trainings.
        problem: that they solve.
        rank: of one of them; another rank may need another order of the targets.
        seed: that they have in common.
    Yields:
        the descriptor to inherit, or None if nothing is shared.
    """
    with contextlib.ExitStack() as opened:
        descriptor = None
        if problem.device.type == "cpu" and problem.sampling != "fresh":
            if problem.num_train * problem.cols * (problem.cols + problem.rows) > LONG_WORK:
                note("drawing the samples that all trainings share", config.quiet)
            try:
                file = opened.enter_context(_nameless_file())
                _write(file, _drawn(config, problem, rank, seed), _settings(config, problem, seed))
                descriptor = file.fileno()
            except (OSError, MemoryError, torch.OutOfMemoryError) as error:
                note(f"every training draws its own samples, because they cannot be shared: {one_line(error)}")
        yield descriptor


def _drawn(config: TrainingFlags, problem: Problem, rank: int, seed: int) -> list[SampleSet]:
    try:
        return make_samples(config, problem, problem.internal_weight(), seed=seed).sets
    except RuntimeError as error:  # the CPU's allocator raises a plain one
        if "can't allocate memory" in str(error):
            raise MemoryError("out of memory") from error
        raise


def _settings(config: TrainingFlags, problem: Problem, seed: int) -> dict[str, Any]:
    """Return everything that determines the bits of samples, except the order of their targets."""
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
        "torch": torch.__version__,
    }


def _nameless_file() -> IO[bytes]:
    """Return a file in memory where the system has such files, else one in its temporary folder that is unlinked."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("ks_samples"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _write(file: IO[bytes], sets: list[SampleSet], settings: dict[str, Any]) -> None:
    tensors = [tensor.contiguous() for one in sets for tensor in one]
    layout, offset = [], HEAD_BYTES
    for tensor in tensors:
        layout.append([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset])
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    file.truncate(offset)
    memory = mmap.mmap(file.fileno(), offset)
    for tensor, place in zip(tensors, _tensors(memory, layout), strict=True):
        place.copy_(tensor)
    head = json.dumps({"settings": settings, "layout": layout, "sum": _sum(memory)}).encode()
    if len(head) > HEAD_BYTES:
        raise OSError("too many batches of validation samples")
    memory[:HEAD_BYTES] = head.ljust(HEAD_BYTES)


def _inherited(settings: dict[str, Any]) -> list[SampleSet] | None:
    """Return the samples that this process has inherited, or None if it draws its own."""
    given = os.environ.pop(SHARED_SAMPLES, "")
    if not given:
        return None
    try:
        descriptor = int(given)
        size = os.fstat(descriptor).st_size
        memory = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)  # what is written here stays here
        os.close(descriptor)
        head = json.loads(bytes(memory[:HEAD_BYTES]))
        if head["settings"] != settings:
            raise ValueError("they have other settings")
        if head["sum"] != _sum(memory):
            raise ValueError("they are damaged")
        tensors = _tensors(memory, head["layout"])
        return [SampleSet(*tensors[start : start + 2]) for start in range(0, len(tensors), 2)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        note(f"the samples are drawn here, because those of the sweep cannot be used: {one_line(error)}")
        return None


def _tensors(memory: mmap.mmap, layout: list) -> list[torch.Tensor]:
    """Return views of a mapped file."""
    found = []
    for dtype, shape, offset in layout:
        count = torch.Size(shape).numel()
        found.append(torch.frombuffer(memory, dtype=getattr(torch, dtype), count=count, offset=offset).view(shape))
    return found


def _sum(memory: mmap.mmap) -> int:
    """Return the sum of all words behind the head, modulo 2^64."""
    return int(torch.frombuffer(memory, dtype=torch.int64, offset=HEAD_BYTES).sum())
