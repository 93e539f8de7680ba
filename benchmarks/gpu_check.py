"""Check every kernel at its exact shape against float64, then measure it against its peers and the GPU's ceilings.

    python benchmarks/gpu_check.py --csv gpu.csv                # a subset, under 8 minutes, compilation included
    python benchmarks/gpu_check.py --csv gpu.csv --full         # every cell; the same command resumes
    python benchmarks/gpu_check.py --csv tiny.csv --device cpu --tiny     # to try the program itself without a GPU

The program appends one row per cell: chain, shape, rank, batch and dtype; for the forward pass, and for it with the
backward pass, the interleaved milliseconds of ours (--impl triton), torch.bmm in place (bmm) and with the batch last
(bmm_last), bmm with permuted copies (plain), einsum, torch-structured 1.3 (if it is installed) and dense F.linear. On a
GPU, each is a CUDA graph of calls on different operands, more of them than the L2 cache holds. Then come the bandwidth
and rate that our forward pass reached, and the share of its time that the GPU needs at best: the larger of (bytes moved
once) / (copy bandwidth) and (operations) / (matmul rate), both measured in the same run. A cell that fails its check
has no times. Exit code: 1 if a check failed, else 0.
"""

import argparse
import functools
import math
import sys
import time
from pathlib import Path

import torch
from baselines import PlainChain, einsum_chain, structured_weights, torch_structured_multiply
from timing import Rows, interleaved_medians, place, replayed, rotated

from ks.chain.backend import choose_impl
from ks.chain.operator import chain_product
from ks.chain.passes import ChainPasses
from ks.chain.patterns import Pattern, make_chain
from ks.layer import KSLinear

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


def worst_error(ours, plain, exact, epsilon, terms) -> float:
    """Return the largest error of a block of 64 outputs, as a share of what is allowed: 2 × plain torch's + epsilon.

    A sum of `terms` in float32, one after another, may be off by 2⁻²⁴ √terms besides: cuBLAS may split it into parts,
    which makes its own error smaller than what one sum can reach.
    """
    epsilon += 2**-24 * terms**0.5
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
    terms = max(len(x), *(pattern.c for pattern in patterns), *(pattern.b for pattern in patterns))
    return max(worst_error(*parts, epsilon, terms) for parts in zip(*results))


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
    picked, reason = choose_impl("auto", device)
    impl = "triton" if device.type == "cuda" else "auto"
    detached = [value.detach() for value in values]
    row = {"picked": picked, "worst_error": check(detached, x.detach(), gradient, impl)}
    if row["worst_error"] > 1:
        return row
    plain, dense = PlainChain(values), torch.randn(m, n, device=device, dtype=dtype, requires_grad=True)
    # name: (function of an input and parameters, parameters, whether the batch is last)
    candidates = {
        "ours": (lambda x, *values: chain_product(x, list(values), impl=impl), values, False),
        "bmm": (lambda x, *values: chain_product(x, list(values), impl="bmm"), values, False),
        "bmm_last": (lambda x, *values: chain_product(x, list(values), True, impl="bmm"), values, True),
        "plain": (lambda x, *weights: plain.multiply(x, weights), list(plain.weights), False),
        "einsum": (lambda x, *values: einsum_chain(x, values), values, False),
        "dense": (torch.nn.functional.linear, [dense], False),
    }
    if structured is not None and len(values) == 2:
        candidates["structured"] = (structured, structured_weights(values), False)

    def forward(x, gradient, *parameters, function):
        with torch.no_grad():
            function(x, *parameters)

    def both(x, gradient, *parameters, function):
        torch.autograd.grad(function(x, *parameters), [x, *parameters], gradient)

    parameters = layer.num_parameters
    moved = dtype.itemsize * (batch * (m + n) + parameters)
    operations = 2 * batch * parameters
    for what, passes in (("forward", forward), ("both", both)):
        functions, copies = {}, 1
        for key, (function, weights, batch_last) in candidates.items():
            tensors = [tensor.detach().t().contiguous() if batch_last else tensor.detach() for tensor in (x, gradient)]
            tensors += [weight.detach() for weight in weights]
            copies = copies_beyond_cache(moved, device)  # as many for all, so that a call means the same
            operands = [[tensor.clone().requires_grad_() for tensor in tensors] for _ in range(copies)]
            functions[key] = rotated(functools.partial(passes, function=function), operands)
        times = interleaved_medians(replayed(functions, device), device, rounds, calls=10 if batch <= 1024 else 2)
        row |= {f"{what}_{key}_ms": times[key] / copies if key in times else "" for key in TIMED}
    seconds = row["forward_ours_ms"] * 1e-3
    at_best = max(moved / (best["copy"] * 1e9), operations / (best[name] * 1e12))
    row |= {"forward_gb_s": moved / seconds * 1e-9, "forward_tflop_s": operations / seconds * 1e-12}
    return row | {"forward_share_of_ceiling": at_best / seconds, "parameters": parameters}


def copies_beyond_cache(moved: int, device) -> int:
    """Return how many operands to rotate, so that L2 (at most 128 MiB) holds none of them until its next turn."""
    return max(1, min(8, math.ceil(2**27 / moved))) if device.type == "cuda" else 1


TIMED = ("ours", "bmm", "bmm_last", "plain", "einsum", "structured", "dense")
COLUMNS = ("chain", "shape", "rank", "batch", "dtype", "picked", "worst_error", "parameters")
COLUMNS += tuple(f"{what}_{key}_ms" for what in ("forward", "both") for key in TIMED)
COLUMNS += ("forward_gb_s", "forward_tflop_s", "forward_share_of_ceiling", "copy_gb_s", "matmul_tflop_s", "arch")


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
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    arch = 10 * major + minor
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
        found |= {"copy_gb_s": best["copy"], "matmul_tflop_s": best[dtype], "arch": arch}
        rows.add({name: found.get(name, "") for name in COLUMNS} | where)
        failed += found["worst_error"] > 1
    if failed:
        print(f"gpu_check.py: {failed} cells failed their check (worst_error above 1)", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
