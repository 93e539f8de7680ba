"""Compile the Triton kernels for CUDA architectures without a GPU, and read what the machine code says.

    python benchmarks/compile_kernels.py
    python benchmarks/compile_kernels.py --archs 90 --dtypes bfloat16 --ranks 16 --format json

The program compiles every kernel that the forward and backward pass of a layer launch, with the tiles of
`ks.product.tiles` and the argument specialisation of a real launch, and disassembles it with the tools of Triton. A row
has the registers and the shared memory of a program, how many programs a multiprocessor holds with them, the loads and
stores of local memory (spills), and the global loads by width and the matrix instructions by shape.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
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

ARCHS = (80, 89, 90, 100, 120)
TYPES = {torch.int32: "i32", torch.int64: "i64"}
TYPES |= {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
KERNELS = ("factor_kernel", "values_gradient_kernel")
OPTIONS = ("num_warps", "num_stages", "maxnreg")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared KiB, threads and programs of a multiprocessor (CUDA C programming guide, compute capabilities); all have 65,536
# registers, which a warp takes in units of 256, and each program costs 1 KiB of shared memory more.
LIMITS = {80: (164, 2048, 32), 89: (100, 1536, 24), 90: (228, 2048, 32), 100: (228, 2048, 32), 120: (100, 1536, 24)}
REGISTERS = 65536
MATRIX_INSTRUCTIONS = r"\b(?:HMMA|HGMMA|DMMA)\.\w+|\bUTC\w*MMA\b"


class Recorder:
    """Stands for a kernel, and puts its launches into a dict: {key: (kernel, arguments by name, options)}."""

    def __init__(self, kernel, launches: dict):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*arguments, **keywords):
            options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
            named = dict(zip(self.kernel.arg_names, arguments)) | keywords
            key = (self.kernel.fn.__name__, *keywords.items())
            self.launches.setdefault(key, (self.kernel, named, options))

        return launch


def recorded_launches(shape, chain, rank, batch, dtype, arch, precision) -> dict:
    """Return {key: (kernel, arguments by name, options)} of the launches of one forward and backward pass."""
    launches: dict = {}
    recorders = {name: Recorder(getattr(triton_kernels, name), launches) for name in KERNELS}
    with (
        mock.patch.multiple(triton_kernels, architecture=mock.Mock(return_value=arch), **recorders),
        mock.patch("ks.product.passes.choose_impl", return_value=("triton", "to be compiled")),
    ):
        patterns = make_chain(*shape, chain).patterns(rank)
        values = [empty_values(pattern, "meta", dtype) for pattern in patterns]
        x = torch.empty(batch, shape[1], dtype=dtype, device="meta")
        passes = ChainPasses(patterns, batch, x.device, dtype, precision=precision)
        y, *inner = passes.forward(x, values)
        passes.backward(y, x, values, inner, needed=[True] * (1 + len(values)))
    return launches


def compile_launch(kernel, named: dict, options: dict, arch: int):
    """Compile as a launch on a GPU of this architecture would."""
    signature, constants, attributes = {}, {}, {}

    def typed(value, path: tuple[int, ...]):
        if isinstance(value, tuple):
            return tuple(typed(entry, (*path, place)) for place, entry in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return "*" + TYPES[value.dtype]
        if kernel.params[path[0]].is_constexpr or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, name in enumerate(kernel.arg_names):
        signature[name] = typed(named[name], (index,))
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def report(compiled, arch: int) -> dict:
    """Return what the machine code of a kernel takes and does."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        machine_code = _output("nvdisasm", "-c", file.name)
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
    registers, shared = int(re.search(r"REG:(\d+)", usage).group(1)), compiled.metadata.shared
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E((?:\.\w+)*)", machine_code)
    return {
        "registers": registers,
        "shared_bytes": shared,
        "programs": programs_at_once(registers, shared, compiled.metadata.num_warps, arch),
        "local_memory": len(re.findall(r"\b(?:LDL|STL)\b", machine_code)),
        "global_load_bytes": dict(sorted(Counter(map(_width, loads)).items())),
        "instructions": dict(Counter(re.findall(MATRIX_INSTRUCTIONS, machine_code))),
    }


def programs_at_once(registers: int, shared: int, warps: int, arch: int) -> int:
    """Return how many programs a multiprocessor holds: the least of what threads, registers and shared memory allow."""
    shared_kib, threads, most = LIMITS[arch]
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return min(most, threads // (32 * warps), by_registers, shared_kib * 1024 // (shared + 1024))


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _width(suffixes: str) -> int:
    """Return the bytes that a load instruction with these suffixes moves for a thread."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in suffixes.split(".") if part in widths), 4)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 4096), help="m and n (default: 2048 4096)")
    parser.add_argument("--chain", default="monarch", help="(default: monarch)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16], help="(default: 4 16)")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 25088], help="(default: 32 25088)")
    parser.add_argument("--archs", type=int, nargs="+", default=ARCHS, help="(default: 80 89 90 100 120)")
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
                    what = (options.shape, options.chain, rank, batch, kind, arch, options.precision)
                    for key, launch in recorded_launches(*what).items():
                        key = (*key, *launch[2].items(), dtype, arch)
                        if key not in done:
                            done[key] = report(compile_launch(*launch, arch), arch)
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
