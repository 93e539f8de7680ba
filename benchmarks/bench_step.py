"""Time a training step against the plain loop, a dense layer and the bare matrix products.

    python benchmarks/bench_step.py                                # this machine's CPU, one thread
    python benchmarks/bench_step.py --device cuda --shape 2048 4096 --csv step.csv

Steps, on batches of 32 ready samples: "gauss_newton" and "adamw" are those of `train_with_random.py`, the former with
its part of the refreshes of a run of RUN steps; "bare" and "bare_adamw" call only their matrix products and their fused
update; "plain" is the loop of `baselines.py`; "dense" trains a dense matrix with our AdamW. The program compares the
outputs before it times anything, and interleaves the timings of a row: CPU time on one thread, else wall time.
"""

import argparse
import functools
import sys
import time
from pathlib import Path

import torch
from baselines import PlainChain, our_step, plain_epochs, training_factors
from timing import Rows, interleaved_ms, named_device, place

from ks.chain.passes import ChainPasses
from ks.chain.patterns import make_chain
from ks.chain.split_grams import is_chainable
from ks.cli import console
from ks.cli.flags import TrainerConfig
from ks.layer import KSLinear
from ks.moments.second_moment import UNIT_MOMENT
from ks.training.choose_optimizer import make_optimizer
from ks.training.criterion import loss_and_gradient, mean_squared_error
from ks.training.optimizer import Optimizer
from ks.training.samples import Samples
from ks.training.schedule import Schedule
from ks.training.steps import runnable

STEPS = 50
RUN = 2500  # the steps of a run of the demo's sweep


def our_epoch(layer, samples, impl, name):
    """Return a function that runs an epoch of our training step, captured on a GPU, and its optimizer."""
    factors = training_factors(layer)
    optimizer = make_optimizer(name, TrainerConfig(batch_size=samples.batch_size), factors, UNIT_MOMENT)
    optimizer.prepare(0)
    passes = ChainPasses(layer.patterns, block_order=True, impl=impl)
    step = our_step(passes, factors, optimizer)
    step, (_, _, warning) = runnable(step, *samples.first(), optimizer)
    if warning:
        print(f"WARNING: {warning}", file=sys.stderr)
    return lambda: torch.stack([step(x, y, 1e-6)[0] for _, x, y in samples.epoch(1)]).mean().item(), optimizer


def refreshes(layer, samples) -> int:
    """Return how often a run of RUN steps, from a zero left-most factor, measures the curvature."""
    factors = training_factors(layer)
    factors[0].zero_()
    config = TrainerConfig(batch_size=samples.batch_size, num_epochs=RUN // STEPS)
    optimizer = make_optimizer("gauss_newton", config, factors, UNIT_MOMENT)
    schedule, counted = Schedule(config, STEPS), []
    refresh = optimizer.refresh
    optimizer.refresh = lambda grown: counted.append(refresh(grown))
    step = our_step(ChainPasses(layer.patterns, block_order=True), factors, optimizer)
    for epoch in range(config.num_epochs):
        for number, x, y in samples.epoch(epoch + 1):
            optimizer.prepare(number)
            step(x, y, schedule.rate(number))
    return len(counted)


def bare_epoch(layer, samples, name):
    """Return a function for the products of a two-factor step and its update, on operands in the best order."""
    left, right = layer.patterns
    batch, device = samples.batch_size, samples.inputs.device
    matrices = [torch.randn(p.a * p.d, p.b, p.c, device=device) * p.c**-0.5 for p in layer.patterns]
    entered = torch.randn(left.d, left.c, batch, device=device)
    gradients = [torch.randn(left.d, left.b, batch, device=device), torch.randn(right.a, right.b, batch, device=device)]
    optimizer = Optimizer(name, [matrix.unsqueeze(0) for matrix in matrices], max_grad_norm=0)

    def epoch():
        for x in samples.inputs:
            x = x.t().unflatten(0, (right.a, right.c))
            torch.bmm(matrices[1], x)
            torch.bmm(matrices[0], entered)
            torch.bmm(matrices[0].transpose(1, 2), gradients[0])
            torch.bmm(gradients[0], entered.transpose(1, 2), out=optimizer.gradients[0][0])
            torch.bmm(gradients[1], x.transpose(1, 2), out=optimizer.gradients[1][0])
            optimizer.update(1e-4, entered)

    return epoch


def dense_epoch(weight, samples):
    """Return a function that runs an epoch of the same step for a dense matrix."""
    dense = torch.zeros_like(weight)
    optimizer = Optimizer("adamw", [dense.view(1, *weight.shape, 1)])

    def epoch():
        for _, inputs, targets in samples.epoch(1):
            loss, gradient = loss_and_gradient(mean_squared_error, torch.nn.functional.linear(inputs, dense), targets)
            torch.mm(gradient.t(), inputs, out=optimizer.gradients[0][0, :, :, 0])
            optimizer.update(1e-4, loss)

    return epoch


def measure_steps(options, device, rows: Rows) -> None:
    m, n = options.shape
    weight = torch.randn(m, n, device=device) * n**-0.5
    for name in options.chains:
        for rank in options.ranks:
            torch.manual_seed(0)
            patterns = make_chain(m, n, name).patterns(rank)
            layer = KSLinear.from_patterns(patterns, device=device)
            x = torch.randn(options.batch_size, n, device=device)
            plain = PlainChain(layer.factors).to(device)
            torch.testing.assert_close(plain(x), layer(x), rtol=1e-4, atol=1e-4)
            rows_of_blocks = ChainPasses(patterns, block_order=True).output_rows
            settings = {"sampling": "fixed", "seed": 0, "output_rows": rows_of_blocks}
            samples = Samples(weight, STEPS * options.batch_size, 1, options.batch_size, **settings)
            flat = samples.inputs.flatten(0, 1)
            adamw, _ = our_epoch(layer, samples, options.impl, "adamw")
            functions = {
                "adamw": adamw,
                "plain": functools.partial(plain_epochs, plain, weight, flat, 1, options.batch_size),
                "dense": dense_epoch(weight, samples),
            }
            if is_chainable(patterns):
                functions["step"], optimizer = our_epoch(layer, samples, options.impl, "gauss_newton")
                functions["refresh"] = functools.partial(optimizer.refresh, 0.0)
                due = refreshes(layer, samples) / RUN
            if len(patterns) == 2 and device.type == "cpu":
                functions |= {"bare": bare_epoch(layer, samples, "sgd")}
                functions |= {"bare_adamw": bare_epoch(layer, samples, "adamw")}
            clock = time.process_time if (device.type, options.threads) == ("cpu", 1) else time.perf_counter
            found = interleaved_ms(functions, device, options.rounds, clock)
            step_ms = {kind: value / STEPS for kind, value in found.items() if kind not in ("step", "refresh")}
            if "step" in found:
                step_ms["gauss_newton"] = found["step"] / STEPS + found["refresh"] * due
            row = {"what": "step", "chain": name, "shape": f"{m}x{n}", "batch": options.batch_size, "rank": rank}
            kinds = ("gauss_newton", "adamw", "bare", "bare_adamw", "plain", "dense")
            row |= {f"{kind}_ms": step_ms.get(kind, "") for kind in kinds}
            for kind, base in (
                *(("gauss_newton", "adamw"), ("gauss_newton", "bare"), ("adamw", "bare_adamw")),
                *(("plain", "adamw"), ("dense", "adamw")),
            ):
                known = kind in step_ms and base in step_ms
                row[f"{kind}_over_{base}"] = step_ms[kind] / step_ms[base] if known else ""
            rows.add(row | place(device))


@console.script
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 2048), help="m and n (default: 1024 2048)")
    parser.add_argument("--batch_size", type=int, default=32, help="samples of a step (default: 32)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64], help="ranks of the steps (default: 8 64)")
    parser.add_argument("--chains", nargs="+", default=["monarch"], help="chains of the steps (default: monarch)")
    parser.add_argument("--impl", default="auto", help="our backend (default: auto)")
    parser.add_argument("--rounds", type=int, default=15, help="readings of each clock (default: 15)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = named_device(options.device)
    measure_steps(options, device, Rows(options.csv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
