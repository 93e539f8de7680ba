"""Compile the kernels of the fused training step for CUDA architectures without a GPU; read their machine code.

    python benchmarks/compile_step.py
    python benchmarks/compile_step.py --archs 90 --dtypes bfloat16 --format json

The program builds the step of a two-factor chain on the meta device, records its launches and reports on each kernel as
`compile_kernels.py` does.
"""

import argparse
import json
import sys
from unittest import mock

import torch
from compile_kernels import ARCHS, Recorder, compile_launch, report

from ks.bounds.moments import UNIT_INPUTS
from ks.patterns import make_chain
from ks.product.bmm import empty_values
from ks.product.passes import ChainPasses
from ks.training import step_kernels
from ks.training.cuda_graph import Cursor
from ks.training.fused_step import FusedStep
from ks.training.gauss_newton import GaussNewton
from ks.training.optimiser import Optimiser

KERNELS = ("take_batch_kernel", "loss_kernel", "norm_kernel", "finish_kernel", "update_kernel")
BATCH, STEPS = 32, 250


class Batches:
    """Samples without values."""

    def __init__(self, patterns, dtype):
        self.inputs = torch.empty(STEPS, BATCH, patterns[-1].cols, dtype=dtype, device="meta")
        self.targets = torch.empty(STEPS, BATCH, patterns[0].rows, device="meta")


def recorded_launches(name: str, dtype: torch.dtype) -> dict:
    """Return {key: (kernel, arguments by name, options)} of the launches of one step, its products left out."""
    device, launches = torch.device("meta"), {}
    recorders = {kernel: Recorder(getattr(step_kernels, kernel), launches) for kernel in KERNELS}
    patterns = make_chain(2048, 4096).patterns(16)
    factors = [empty_values(pattern, device) for pattern in patterns]
    scaling = {"loss_scaling": dtype == torch.float16}
    passes = ChainPasses(patterns, BATCH, device, dtype, block_order=True)
    with mock.patch.multiple(step_kernels, **recorders):
        if name == "gauss_newton":
            optimiser: Optimiser = GaussNewton(factors, UNIT_INPUTS, BATCH, **scaling)
        else:
            optimiser = Optimiser(name, factors, **scaling)
        FusedStep(passes, optimiser, Batches(patterns, dtype))(Cursor(STEPS, device))
    return launches


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS, help="(default: 80 89 90 100 120)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"], help="(default: all three)")
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "gauss_newton"], help="(default: both)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="(default: table)")
    options = parser.parse_args(argv)
    rows = []
    for dtype in options.dtypes:
        for name in options.optimizers:
            for key, launch in recorded_launches(name, getattr(torch, dtype)).items():
                for arch in options.archs:
                    what = {"kernel": key[0], "dtype": dtype, "optimizer": name, "arch": arch}
                    rows.append(what | report(compile_launch(*launch, arch), arch))
                    if options.format == "table":
                        print(*rows[-1].values(), sep="  ", flush=True)
    if options.format == "json":
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
