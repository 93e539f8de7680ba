"""Measure the host time of a call of each Triton kernel, with a driver that launches nothing; no GPU is needed.

    python benchmarks/host_time.py
    python benchmarks/host_time.py --calls 200 --csv host.csv

A call from Python sorts its arguments, looks up the compiled kernel and hands over the launch. It is the time below
which a layer cannot go outside a CUDA graph. Times are medians, in microseconds.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from timing import Rows, place
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ks.cli import console
from ks.patterns import Pattern
from ks.product import triton_kernels
from ks.product.bmm import empty_values
from ks.training import step_kernels


class SilentDriver:
    """A driver of one Hopper GPU that loads nothing and launches nothing; it counts the launches."""

    def __init__(self):
        self.launches = 0
        properties = {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties, load_binary=lambda *binary: (0, 0, 32, 0, 1024)
        )

    def launcher_cls(self, source, metadata):
        def launch(*arguments, **keywords):
            self.launches += 1

        return launch

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def calls():
    """Return {name: function without arguments}: products on (1, 512, 64, 4) at batch 32, and parts of the step."""
    pattern, batch, dtype = Pattern(1, 512, 64, 4), 32, torch.bfloat16
    factor, gradients = empty_values(pattern, dtype=dtype), empty_values(pattern)
    x, y = torch.empty(pattern.cols, batch, dtype=dtype), torch.empty(batch, pattern.rows, dtype=dtype).t()
    values, numbers, sums = [empty_values(pattern) for _ in range(2)], torch.empty(5), torch.empty(step_kernels.PARTS)
    flat, moments = torch.empty(2 * gradients.numel()), [(gradients, gradients)] * 2
    settings = {"memories": (0.9, 0.95), "epsilon": 1e-8}
    update = (values, [gradients] * 2, moments, [factor] * 2, [1.0, 2.0], numbers)
    return {
        "apply_factor": lambda: triton_kernels.apply_factor(factor, x, y),
        "values_gradient": lambda: triton_kernels.values_gradient(y, x, gradients),
        "norm": lambda: step_kernels.norm(flat, sums),
        "update": lambda: step_kernels.update(*update, **settings),
    }


@console.script
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000, help="(default: 2000)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(argv)
    silent, rows = SilentDriver(), Rows(options.csv)
    driver.set_active(silent)
    for name, function in calls().items():
        function()  # compiles
        readings, before = [], silent.launches
        for _ in range(options.calls):
            started = time.perf_counter()
            function()
            readings.append((time.perf_counter() - started) * 1e6)
        launches = (silent.launches - before) // options.calls
        row = {"call": name, "launches": launches, "host_us": statistics.median(readings)}
        rows.add(row | place(torch.device("cpu")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
