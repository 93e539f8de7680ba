"""Compile the Triton kernels for CUDA architectures without a GPU: registers, spills and tensor-core instructions.

    python benchmarks/compile_kernels.py
    python benchmarks/compile_kernels.py --archs 90 --dtypes bfloat16 --ranks 16 64 --format json

The program compiles every kernel that the forward and backward pass of a two-factor chain launch, with the tiles of
`ks.product.tiles` and the argument specialisation of a real launch, and reads the report of the assembler (ptxas -v).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ks.patterns import make_chain
from ks.product import triton_kernels
from ks.product.bmm import empty_values
from ks.product.passes import ChainPasses

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
KERNELS = ("factor_kernel", "values_gradient_kernel")
MATRIX_INSTRUCTIONS = r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b"


def recorded_launches(rows, cols, rank, batch, dtype, arch, precision) -> dict:
    """Return {key: (kernel, arguments by name, options)} of the launches of one forward and backward pass."""
    launches = {}

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, num_warps, num_stages, maxnreg, **constants):
                options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
                named = dict(zip(self.kernel.arg_names, arguments)) | constants
                key = (self.kernel.fn.__name__, *constants.items())
                launches.setdefault(key, (self.kernel, named, options))

            return launch

    recorders = {name: Recorder(getattr(triton_kernels, name)) for name in KERNELS}
    with (
        mock.patch.multiple(triton_kernels, architecture=mock.Mock(return_value=arch), **recorders),
        mock.patch("ks.product.passes.choose_impl", return_value=("triton", "to be compiled")),
    ):
        patterns = make_chain(rows, cols).patterns(rank)
        values = [empty_values(pattern, "meta", dtype) for pattern in patterns]
        x = torch.empty(batch, cols, dtype=dtype, device="meta")
        passes = ChainPasses(patterns, batch, x.device, dtype, precision=precision)
        y, *inner = passes.forward(x, values)
        passes.backward(y, x, values, inner, needed=[True] * 3)
    return launches


def compile_launch(kernel, named: dict, options: dict, arch: int) -> dict:
    """Compile as a launch on a GPU of this architecture would; return the report on the result."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = named[name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif kernel.params[index].is_constexpr or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    found = re.findall(MATRIX_INSTRUCTIONS, compiled.asm["ptx"])
    return assembler_report(compiled.asm["ptx"], arch) | {
        "shared_bytes": compiled.metadata.shared,
        "instructions": {name: found.count(name) for name in sorted(set(found))},
    }


def assembler_report(ptx: str, arch: int) -> dict:
    """Return registers per thread and spilled bytes, from the ptxas that comes with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / ("ptxas-blackwell" if arch >= 100 else "ptxas")
    target = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"]
        report = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 4096), help="m and n (default: 2048 4096)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64], help="(default: 4 16 64)")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 25088], help="(default: 32 25088)")
    parser.add_argument("--archs", type=int, nargs="+", default=[80, 90, 100], help="(default: 80 90 100)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16", "bfloat16"], help="(default: all three)")
    parser.add_argument("--precision", default="ieee", help="of float32 (default: ieee)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="(default: table)")
    options = parser.parse_args(argv)
    rows, done = [], {}
    for dtype in options.dtypes:
        for rank in options.ranks:
            for batch in options.batches:
                for arch in options.archs:
                    kind = getattr(torch, dtype)
                    launches = recorded_launches(*options.shape, rank, batch, kind, arch, options.precision)
                    for key, launch in launches.items():
                        key = (*key, *launch[2].items(), dtype, arch)
                        if key not in done:
                            done[key] = compile_launch(*launch, arch)
                        tile = {k: v for k, v in launch[1].items() if k.isupper() and k != "PRECISION"}
                        rows.append(
                            {"kernel": key[0], "dtype": dtype, "rank": rank, "batch": batch, "arch": arch}
                            | {"tile": tile | launch[2]}
                            | done[key]
                        )
                        if options.format == "table":
                            print(*rows[-1].values(), sep="  ", flush=True)
    if options.format == "json":
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
