"""Check every kernel at its exact shape against float64, then measure it against its peers and the GPU's ceilings.

    python benchmarks/gpu_check.py --csv gpu.csv                # a subset, under 8 minutes, compilation included
    python benchmarks/gpu_check.py --csv gpu.csv --full         # every cell; the same command resumes
    python benchmarks/gpu_check.py --csv tiny.csv --device cpu --tiny     # to try the program itself without a GPU

The program appends one row per cell: chain, shape, rank, batch and dtype; for the forward pass, and for it with the
backward pass, the interleaved milliseconds of ours, bmm with permuted copies, einsum, torch-structured 1.3 (if it is
installed) and dense F.linear; the bandwidth and rate that our forward pass reached, and the share of its time that the
GPU needs at best: the larger of (bytes moved once) / (copy bandwidth) and (operations) / (matmul rate), both measured
in the same run. A cell that fails its check has no times. Exit code: 1 if a check failed, else 0.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from baselines import PlainChain, einsum_chain, structured_weights, torch_structured_multiply
from timing import Rows, interleaved_medians, place

from ks.layer import KSLinear
from ks.patterns import Pattern, make_chain
from ks.product.backend import choose_impl
from ks.product.operator import chain_product
from ks.product.passes import ChainPasses

SHAPES = [(2048, 4096), (4096, 4096), (4096, 14336)]
CHAINS = [("monarch", rank) for rank in (2, 4, 8, 16, 32, 64, 128, 256, 512)] + [("butterfly", 4), ("butterfly", 16)]
BATCHES = [32, 1024, 25088]
DTYPES = ["bfloat16", "float16", "float32"]
SUBSET = {"shapes": SHAPES[:1], "chains": [("monarch", 4), ("monarch", 16), ("monarch", 64), ("butterfly", 4)]}
TINY = {"shapes": [(64, 128)], "chains": [("monarch", 2), ("butterfly", 2)], "batches": [8, 300]}


def cells(options):
    """Yield (chain, shape, rank, batch, dtype), the most telling ones first."""
    chosen = {"shapes": SHAPES, "chains": CHAINS, "batches": BATCHES}
    chosen |= TINY if options.tiny else {} if options.full else SUBSET
    for dtype in DTYPES:
        for shape in chosen["shapes"]:
            for batch in reversed(chosen["batches"]):
                for chain, rank in chosen["chains"]:
                    yield chain, shape, rank, batch, dtype


def ceilings(device, tiny: bool) -> dict:
    """Return copy bandwidth in GB/s (bytes read and written), and matmul rate in TFLOP/s for each dtype."""
    elements, side = (2**20, 256) if tiny else (2**28, 8192)
    source = torch.empty(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = interleaved_medians({"copy": lambda: target.copy_(source)}, device, rounds=5)
    found = {"copy": 8e-6 * elements / times["copy"]}
    for name in DTYPES:
        a, b = torch.randn(2, side, side, device=device).to(getattr(torch, name))
        times = interleaved_medians({"matmul": lambda a=a, b=b: a @ b}, device, rounds=5)
        found[name] = 2e-9 * side**3 / times["matmul"]
    return found


def worst_error(ours, plain, exact, epsilon) -> float:
    """Return the largest error of a block of 64 outputs, as a share of what is allowed: 2 × plain torch's + epsilon."""
    worst = 0.0
    for block in range(0, ours.shape[-1], 64):
        parts = [y[..., block : block + 64].double() for y in (ours, plain, exact)]
        norm = parts[2].norm()
        allowed = 2 * (parts[1] - parts[2]).norm() / norm + epsilon
        worst = max(worst, ((parts[0] - parts[2]).norm() / norm / allowed).item())
    return worst


def check(values, x, gradient, impl) -> float:
    """Return the worst error of our output and gradients against float64, by the rule of the tests."""
    epsilon = torch.finfo(x.dtype).eps
    results = []
    for chosen, kind in ((impl, x.dtype), ("bmm", x.dtype), ("bmm", torch.float64)):
        factors, inputs = [factor.to(kind) for factor in values], x.to(kind)
        patterns = tuple(Pattern(*factor.shape) for factor in values)
        passes = ChainPasses(patterns, len(x), x.device, kind, impl=chosen)
        y, *inner = passes.forward(inputs, factors)
        needed = [True] * (1 + len(factors))
        for_x, *for_values = passes.backward(gradient.to(kind), inputs, factors, inner, needed=needed)
        results.append([y, for_x, *(value.permute(0, 3, 1, 2).flatten(0, 2) for value in for_values)])
    return max(worst_error(*parts, epsilon) for parts in zip(*results))


def measure(cell, device, best, structured, rounds) -> dict:
    """Return the columns of one cell."""
    chain, (m, n), rank, batch, name = cell
    dtype = getattr(torch, name)
    patterns = make_chain(m, n, chain).patterns(rank)
    torch.manual_seed(0)
    layer = KSLinear.from_patterns(patterns, device=device, dtype=dtype)
    values = list(layer.factors)
    x = torch.randn(batch, n, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(batch, m, device=device, dtype=dtype)
    picked, reason = choose_impl("auto", device, patterns, batch, dtype)
    impl = "triton" if device.type == "cuda" else "auto"
    detached = [value.detach() for value in values]
    row = {"picked": picked, "worst_error": check(detached, x.detach(), gradient, impl)}
    if row["worst_error"] > 1:
        return row
    plain, dense = PlainChain(values), torch.randn(m, n, device=device, dtype=dtype, requires_grad=True)
    candidates = {
        "ours": (lambda x, values: chain_product(x, values, impl=impl), values),
        "bmm": (lambda x, _: plain(x), list(plain.weights)),
        "einsum": (einsum_chain, values),
        "dense": (lambda x, weight: torch.nn.functional.linear(x, *weight), [dense]),
    }
    if structured is not None and len(values) == 2:
        weights = [weight.requires_grad_() for weight in structured_weights(values)]
        candidates["structured"] = (lambda x, weights: structured(x, *weights), weights)

    def run(function, parameters, backward):
        if not backward:
            with torch.no_grad():
                function(x, parameters)
        else:
            torch.autograd.grad(function(x, parameters), [x, *parameters], gradient)

    parameters = layer.num_parameters
    moved = dtype.itemsize * (batch * (m + n) + parameters)
    operations = 2 * batch * parameters
    for what, backward in (("forward", False), ("both", True)):
        functions = {
            key: lambda f=function, p=values, b=backward: run(f, p, b) for key, (function, values) in candidates.items()
        }
        times = interleaved_medians(functions, device, rounds=rounds, calls=50 if batch <= 1024 else 10)
        row |= {f"{what}_{key}_ms": times.get(key, "") for key in ("ours", "bmm", "einsum", "structured", "dense")}
    seconds = row["forward_ours_ms"] * 1e-3
    at_best = max(moved / (best["copy"] * 1e9), operations / (best[name] * 1e12))
    row |= {"forward_gb_s": moved / seconds * 1e-9, "forward_tflop_s": operations / seconds * 1e-12}
    return row | {"forward_share_of_ceiling": at_best / seconds, "parameters": parameters}


COLUMNS = ("chain", "shape", "rank", "batch", "dtype", "picked", "worst_error", "parameters")
COLUMNS += tuple(
    f"{what}_{key}_ms" for what in ("forward", "both") for key in ("ours", "bmm", "einsum", "structured", "dense")
)
COLUMNS += ("forward_gb_s", "forward_tflop_s", "forward_share_of_ceiling", "copy_gb_s", "matmul_tflop_s")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="the rows are appended to this file")
    parser.add_argument("--full", action="store_true", help="measure every cell, without a time limit")
    parser.add_argument("--minutes", type=float, default=7.0, help="start no cell after this, without --full")
    parser.add_argument("--rounds", type=int, default=7, help="readings of each clock (default: 7)")
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="use small sizes, to try the program itself")
    options = parser.parse_args(argv)
    started = time.monotonic()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_check.py: no CUDA device is available; --device cpu --tiny tries the program", file=sys.stderr)
        return 2
    structured = torch_structured_multiply()
    if structured is None:
        print("torch-structured is not installed, so its columns stay empty", file=sys.stderr)
    rows = Rows(options.csv, resume=True)
    where = place(device)
    key_columns = ("chain", "shape", "rank", "batch", "dtype")
    done = {tuple(row[name] for name in (*key_columns, "hardware", "revision")) for row in rows.known}
    best = ceilings(device, options.tiny)
    failed = 0
    for cell in cells(options):
        chain, (m, n), rank, batch, dtype = cell
        key = (chain, f"{m}x{n}", str(rank), str(batch), dtype)
        if (*key, where["hardware"], str(where["revision"])) in done:
            continue
        if not options.full and time.monotonic() - started > 60 * options.minutes:
            print(f"stopped after {options.minutes:g} minutes; the same command resumes", file=sys.stderr)
            break
        found = dict(zip(key_columns, key)) | measure(cell, device, best, structured, options.rounds)
        found |= {"copy_gb_s": best["copy"], "matmul_tflop_s": best[dtype]}
        rows.add({name: found.get(name, "") for name in COLUMNS} | where)
        failed += found["worst_error"] > 1
    if failed:
        print(f"gpu_check.py: {failed} cells failed their check (worst_error above 1)", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
