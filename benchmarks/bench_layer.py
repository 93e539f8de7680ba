"""Time the layer against the dense layer and against its peers, forward and with the backward pass.

    python benchmarks/bench_layer.py --csv benchmarks/layer.csv     # this machine's CPU, one thread
    python benchmarks/bench_layer.py --dtypes bfloat16 --compiled --earlier FOLDER
    python benchmarks/bench_layer.py --device cuda --compiled --csv layer.csv
    pip install --no-deps torch-structured==1.3 einops opt_einsum   # to compare with the peer too

A row is a weight, a rank, a batch and a dtype: milliseconds of `KSLinear`, of nn.Linear ("dense"), of two nn.Linear
with at most as many parameters as the chain ("lowrank"), of the Monarch product of torch-structured, of ours under
torch.compile (--compiled), of the layer of another revision (--earlier, a folder with its `ks/`), and on a GPU of ours
on the Triton kernels. On a GPU the forward pass is timed eagerly and as a CUDA graph. The program compares outputs
before it times anything; all functions of a row take turns, and a time is the median over the rounds: of CPU time on
one thread of a CPU, else of wall time.
"""

import argparse
import copy
import importlib
import itertools
import sys
import time
from pathlib import Path

import torch
from baselines import structured_weights, torch_structured_multiply
from timing import Rows, interleaved_ms, named_device, place

from ks.cli import console
from ks.layer import KSLinear
from ks.training.steps import cuda_graph

CASES = ((384, 1536, 8), (1536, 384, 16), (1024, 2048, 16), (4096, 4096, 16))
BATCHES = (1, 32, 1024, 4096)
MOST_WORK = 2**32  # multiply-adds of the dense layer in a call: larger cells are left out
PEERS = ("dense", "lowrank", "structured", "compiled", "earlier", "triton")


def earlier_layer(folder: Path):
    """Return KSLinear of another revision, from a folder with its `ks/`; the modules of this one stay as they are."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "ks"}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("ks.layer").KSLinear
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "ks"]:
            del sys.modules[name]
        sys.modules.update(ours)


class Structured(torch.nn.Module):
    """The two factors of a grid in the Monarch product of torch-structured."""

    def __init__(self, layer, multiply):
        super().__init__()
        self.multiply = multiply
        self.weights = torch.nn.ParameterList(structured_weights(layer.factors))

    def forward(self, x):
        return self.multiply(x, *self.weights)


def layers_of(case, dtype, options, structured, earlier) -> dict[str, torch.nn.Module]:
    """Return the layers of a row by name; all but low-rank compute the same."""
    m, n, rank = case
    place = {"device": options.device, "dtype": dtype}
    layer = KSLinear(n, m, rank, **place)
    dense, width = torch.nn.Linear(n, m, bias=False, **place), layer.num_parameters // (m + n)
    with torch.no_grad():
        dense.weight.copy_(layer.to_dense())
    outer, inner = ((n, width), (width, m))
    pair = (torch.nn.Linear(*sizes, bias=False, **place) for sizes in (outer, inner))
    found = {"ours": layer, "dense": dense, "lowrank": torch.nn.Sequential(*pair)}
    if structured is not None:
        found["structured"] = Structured(layer, structured)
    if options.compiled:
        found["compiled"] = torch.compile(copy.deepcopy(layer), dynamic=True)
    if options.device.type == "cuda":
        found["triton"] = copy.deepcopy(layer)
        found["triton"].impl = "triton"
    if earlier is not None:
        found["earlier"] = earlier(n, m, rank, **place)
        for theirs, ours in zip(found["earlier"].factors, layer.factors):
            theirs.data.copy_(ours.detach())
    return found


def calls(layer: torch.nn.Module, x: torch.Tensor, gradient: torch.Tensor, backward: bool):
    """Return a function that calls a layer, without gradients or with those of x and its parameters."""
    if backward:
        wanted = [x, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), wanted, gradient)
    return torch.no_grad()(lambda: layer(x))


@console.script
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="(default: float32 bfloat16)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="(default: 1 32 1024 4096)")
    parser.add_argument("--compiled", action="store_true", help="time ours under torch.compile too")
    parser.add_argument("--earlier", type=Path, help="folder of another revision, to time its layer too")
    parser.add_argument("--rounds", type=int, default=15, help="readings of each clock (default: 15)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = options.device = named_device(options.device)
    # On one thread, CPU time is the time on an idle machine.
    clock = time.process_time if (device.type, options.threads) == ("cpu", 1) else time.perf_counter
    structured, rows = torch_structured_multiply(), Rows(options.csv)
    if structured is None:
        print("torch-structured is not installed, so its columns stay empty", file=sys.stderr)
    earlier = options.earlier and earlier_layer(options.earlier)
    for name, case in itertools.product(options.dtypes, CASES):
        m, n, rank = case
        torch.manual_seed(0)
        torch._dynamo.reset()
        kind = {"device": device, "dtype": getattr(torch, name)}
        layers = layers_of(case, kind["dtype"], options, structured, earlier)
        for batch in options.batches:
            if batch * m * n > MOST_WORK:
                continue
            x, gradient = torch.randn(batch, n, **kind).requires_grad_(), torch.randn(batch, m, **kind)
            expected = layers["ours"](x)
            for peer, layer in layers.items():
                if peer != "lowrank":
                    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=4 * torch.finfo(x.dtype).eps ** 0.5)
            functions = {peer: calls(layer, x, gradient, False) for peer, layer in layers.items()}
            timed = {"forward": functions}
            if device.type == "cuda":
                timed["forward in a graph"] = {peer: cuda_graph(function) for peer, function in functions.items()}
            timed["both"] = {peer: calls(layer, x, gradient, True) for peer, layer in layers.items()}
            for passes, functions in timed.items():
                times = interleaved_ms(functions, device, options.rounds, clock)
                row = {"shape": f"{m}x{n}", "rank": rank, "fraction": layers["ours"].num_parameters / (m * n)}
                row |= {"batch": batch, "passes": passes, "dtype": name}
                row |= {"ours_ms": times["ours"]} | {f"{peer}_ms": times.get(peer, "") for peer in PEERS}
                row |= {f"over_{peer}": times["ours"] / times[peer] if peer in times else "" for peer in PEERS}
                rows.add(row | place(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
