"""Random inputs and their targets: whitened, fresh or fixed, the same for every rank of a study.

A sweep draws them once, into a file that its runs map into memory and that is deleted at the end. A run that finds no
such file, a damaged one, or samples of other settings, draws its own, with the same bits.
"""

import contextlib
import json
import os
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ks import signals
from ks.chain.bmm import float32_products
from ks.cli.console import note
from ks.cli.flags import TrainingFlags
from ks.errors import one_line
from ks.files.atomic import save_tensors
from ks.files.weights import DTYPES
from ks.moments.pieces import in_pieces
from ks.moments.second_moment import UNIT_MOMENT, SecondMoment
from ks.training.problem import Pair, Problem
from ks.training.run_state import settings_of
from ks.training.whitening import whiten

FILES_OF_SEEDS = "KS_SAMPLES"  # in the environment of a run: a JSON object from seeds to paths
WAIT_SECONDS = 0.005
LONG_WORK = 2**36  # multiply-adds, a few seconds
_STREAMS = {"train": 0, "validation": 1, "shuffle": 2, "init": 3}


def seeded_generator(seed: int, stream: str, epoch: int = 0, device="cpu") -> torch.Generator:
    """Return a generator for one purpose of one run, so that no draw of one stream or epoch shifts those of another."""
    mixed = (seed * len(_STREAMS) + _STREAMS[stream]) * 1_000_003 + epoch
    return torch.Generator(device).manual_seed(mixed % 2**63)


class Samples:
    """Gaussian inputs x of second moment C and their targets W x in batches, the same for every rank of a study.

    A batch keeps its samples and epochs shuffle the batches, so that a step reads a batch in place; shuffling single
    samples comes no closer to the floor (benchmarks/README.md).

    Args:
        weight: W, shape (m, n), float32, on the device to train on.
        num_train: number of training samples; samples that do not fill a batch are left out.
        num_validation: number of validation samples.
        batch_size: of the training batches.
        sampling: 'whitened' (one set, second moment exactly C), 'fresh' (a new set every epoch) or 'fixed'.
        seed: of inputs and shuffles.
        moment: C.
        output_rows: the order of the training targets, as rows of W, int64 of shape (m,); None for the natural one.
        validation_root: G^{1/2}, by which the validation targets are multiplied, shape (m, m); None for I.
        batch_last: batches of shape (n, batch) instead of (batch, n).
        dtype: of the inputs; targets stay float32.
        stored: the `sets` of samples with the same settings.
        training: x and W x to train on instead of random ones, shapes (N, n) and (N, m), any float dtype.
        held_out: the same to validate on.

    `inputs` and `targets` hold the training batches, shape (steps, batch, n or m), and (steps, m, batch) for targets in
    another order of rows; with `fresh` an epoch overwrites them. `validation` holds batches (x, y) of other samples, y
    with one sample a row in the order of W's rows; their mean losses, weighted by `validation_fractions`, give the mean
    over all of them. `sets` are the samples as drawn, in batches: those to train on, then each batch of validation
    samples; targets in the order of W's rows.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        num_train: int,
        num_validation: int,
        batch_size: int,
        *,
        sampling: str,
        seed: int,
        moment: SecondMoment = UNIT_MOMENT,
        output_rows: torch.Tensor | None = None,
        validation_root: torch.Tensor | None = None,
        batch_last: bool = False,
        dtype: torch.dtype = torch.float32,
        stored: list[Pair] | None = None,
        training: Pair | None = None,
        held_out: Pair | None = None,
    ):
        self.weight, self.batch_size, self.moment = weight, batch_size, moment
        if output_rows is not None and torch.equal(output_rows, torch.arange(len(weight))):
            output_rows = None
        self._output_rows = None if output_rows is None else output_rows.to(weight.device)
        self.sampling, self.seed, self.batch_last, self.dtype = sampling, seed, batch_last, dtype
        self.steps_per_epoch = num_train // batch_size
        with float32_products(weight, "ieee"):  # whatever the environment says of TF32
            self.sets = stored or self._draw_sets(num_validation, training, held_out)
        (self.inputs, targets), *validation = self.sets
        self.targets = self._in_order(targets)
        self.validation = [(inputs[0], self._by_sample(targets[0])) for inputs, targets in validation]
        if validation_root is not None:
            with float32_products(weight):
                self.validation = [(x, y @ validation_root.to(y)) for x, y in self.validation]
        sizes = torch.tensor([targets.numel() for _, targets in self.validation], device=weight.device)
        self.validation_fractions = sizes / sizes.sum()

    def _draw_sets(self, num_validation: int, training: Pair | None, held_out: Pair | None) -> list[Pair]:
        """Return the training samples, then each batch of validation samples."""
        validation = held_out or self._pair(self._draw(num_validation, "validation"))
        count = self.steps_per_epoch * self.batch_size
        if training is None:
            drawn = self._draw(count, "train", epoch=1 if self.sampling == "fresh" else 0)
            training = self._pair(whiten(drawn) if self.sampling == "whitened" else drawn)
        inputs, targets = training
        sets = [self._batches(inputs[:count], targets[:count], self.batch_size)]
        for inputs, targets in zip(*(samples.split(1024) for samples in validation), strict=True):
            sets.append(self._batches(inputs, targets, len(inputs)))
        return sets

    def _draw(self, count: int, stream: str, epoch: int = 0) -> torch.Tensor:
        device = self.weight.device
        generator = seeded_generator(self.seed, stream, epoch, device)
        return torch.randn(count, self.weight.shape[1], generator=generator, device=device)

    def _pair(self, unit_samples: torch.Tensor) -> Pair:
        """Return inputs of second moment C, and their targets."""
        inputs = self.moment.transform(unit_samples)
        targets = inputs.new_empty(len(inputs), len(self.weight))

        def multiply(part: slice) -> None:
            torch.mm(inputs[part], self.weight.t(), out=targets[part])

        in_pieces(multiply, len(inputs), inputs.device)
        return inputs, targets

    def _batches(self, inputs: torch.Tensor, targets: torch.Tensor, batch_size: int) -> Pair:
        """Return samples in batches, contiguous in the training layout."""
        device = self.weight.device
        inputs, targets = (
            samples.unflatten(0, (-1, batch_size))
            for samples in (inputs.to(device, self.dtype), targets.to(device, torch.float32))
        )
        if self.batch_last:  # steps batch features -> steps features batch
            inputs, targets = inputs.transpose(1, 2).contiguous(), targets.transpose(1, 2).contiguous()
        return inputs, targets

    def _in_order(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the targets of training batches as the outputs lie in memory: features first, if in another order."""
        if self._output_rows is None:
            return targets
        return (targets if self.batch_last else targets.mT).index_select(1, self._output_rows)

    def _by_sample(self, targets: torch.Tensor) -> torch.Tensor:
        """Return the view of a batch of targets with one sample a row."""
        return targets.t() if self.batch_last else targets

    def _batch(self, number: int) -> Pair:
        """Return a training batch: x in the training layout, y of shape (batch, m)."""
        targets = self.targets[number]
        return self.inputs[number], targets if self._output_rows is None and not self.batch_last else targets.t()

    @property
    def whitened_steps(self) -> int:
        """The steps of an epoch if the training samples are whitened, else 0."""
        return self.steps_per_epoch if self.sampling == "whitened" else 0

    def first(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first batch as `epoch` yields it; all have its shapes."""
        return self._batch(0)

    def epoch(self, number: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield the batches of epoch `number` (from 1) in its order, after drawing new samples if it needs any.

        Yields:
            (number of the step from 0 over all epochs, x in the training layout, y of shape (batch, m)).
        """
        if self.sampling == "fresh" and number > 1:
            drawn = self._draw(self.steps_per_epoch * self.batch_size, "train", number)
            with float32_products(drawn, "ieee"):
                inputs, targets = self._batches(*self._pair(drawn), self.batch_size)
            self.inputs.copy_(inputs)
            self.targets.copy_(self._in_order(targets))
        order = torch.arange(self.steps_per_epoch)
        if self.sampling != "fresh":
            order = torch.randperm(self.steps_per_epoch, generator=seeded_generator(self.seed, "shuffle", number))
        for step, batch in enumerate(order.tolist(), (number - 1) * self.steps_per_epoch):
            yield step, *self._batch(batch)


def make_samples(
    config: TrainingFlags,
    problem: Problem,
    weight: torch.Tensor,
    output_rows: torch.Tensor | None = None,
    seed: int | None = None,
) -> Samples:
    """Return the samples of a run: from the file of its sweep if there is one and no seed is given, else drawn here.

    Args:
        weight: W in internal units.
        output_rows: the order of the training targets, as rows of W; None for the natural one.
        seed: of the samples; None for that of the config.
    """
    stored = _read(config.seed, _settings(config, problem, config.seed)) if seed is None else None
    seed = config.seed if seed is None else seed
    return Samples(
        weight.float(),
        problem.num_train,
        problem.num_validation,
        config.batch_size,
        sampling=problem.sampling,
        seed=seed,
        moment=problem.metric.inputs,
        output_rows=output_rows,
        validation_root=problem.validation_root,
        batch_last=config.bs_last,
        dtype=DTYPES[config.dtype],
        stored=stored,
        training=None if stored else problem.given_samples(),
        held_out=None if stored else problem.held_out_samples(),
    )


@contextlib.contextmanager
def samples_in_files(config: TrainingFlags, problem: Problem, paths: dict[int, Path]) -> Iterator[Iterator[None]]:
    """Keep the samples of some seeds in files, for the runs that start meanwhile on this machine.

    A run waits while the file of its seed is empty, so that it can start before its samples are drawn.

    Args:
        paths: of the files, by seed. `fresh` samples and those on GPUs are left out.
    Yields:
        an iterator that draws the samples of the next seed with every step.
    """
    if problem.device.type != "cpu" or problem.sampling == "fresh":
        paths = {}
    try:
        for path in paths.values():
            path.touch()
        os.environ[FILES_OF_SEEDS] = json.dumps({seed: str(path) for seed, path in paths.items()})
        yield _drawn(config, problem, paths)
    finally:
        os.environ.pop(FILES_OF_SEEDS, None)
        _delete(paths)


def _drawn(config: TrainingFlags, problem: Problem, paths: dict[int, Path]) -> Iterator[None]:
    if len(paths) * problem.num_train * problem.cols * (problem.cols + problem.rows) > LONG_WORK:
        note("drawing the samples that the runs share", config.quiet)
    try:
        for seed, path in paths.items():
            _write(path, config, problem, seed)
            yield
    except Exception as error:  # a run that waits for a file would wait for ever
        os.environ.pop(FILES_OF_SEEDS)
        _delete(paths)
        note(f"every run draws its own samples, because they cannot be kept in a file: {one_line(error)}")


def _delete(paths: dict[int, Path]) -> None:
    for path in paths.values():
        path.unlink(missing_ok=True)


def _settings(config: TrainingFlags, problem: Problem, seed: int) -> dict[str, Any]:
    """Return the settings that the runs of a sweep share; they determine the bits of the samples."""
    return settings_of(config, problem) | {"seed": seed, "torch": str(torch.__version__)}


def _write(path: Path, config: TrainingFlags, problem: Problem, seed: int) -> None:
    sets = make_samples(config, problem, problem.internal_weight(), seed=seed).sets
    save_tensors({"settings": _settings(config, problem, seed), "sets": sets}, path)


def _read(seed: int, settings: dict[str, Any]) -> list[Pair] | None:
    """Return the samples of a file that this run was given, or None if it draws its own.

    The file is mapped privately: runs share its pages, and what one writes stays its own. Its tensors begin at
    multiples of 64 bytes like those that are drawn, which the bits of some products depend on.
    """
    try:
        path = json.loads(os.environ.get(FILES_OF_SEEDS, "{}")).get(str(seed))
        if path is None:
            return None
        while not os.path.getsize(path):  # the sweep is drawing them
            signals.check()
            time.sleep(WAIT_SECONDS)
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if content["settings"] != settings:
            raise ValueError("it holds samples of other settings")
        return [(inputs, targets) for inputs, targets in content["sets"]]
    except Exception as error:  # a damaged file can raise nearly anything
        note(f"the samples are drawn here, because the file of the sweep cannot be used: {one_line(error)}")
        return None
