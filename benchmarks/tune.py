"""Time other tile sizes of the Triton kernels on a GPU, against those of ks/product/tiles.py and torch.bmm.

    python benchmarks/tune.py --csv tuning.csv                         # the same command resumes
    python benchmarks/tune.py --csv tuning.csv --device cpu --tiny     # to try the program itself without a GPU

A key is one launch: kernel, rank, batch and dtype, on the left factor of a 4 × 4 grid. For each of them, at most six
candidates compute the product, which must agree with that of torch.bmm, and are timed as CUDA graphs, interleaved. A
row has the tile, its milliseconds, and those of torch.bmm with its copies. The first candidate is the rule's own.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from timing import Rows, interleaved_medians, place, replayed

from ks.cli import console
from ks.patterns import Pattern, make_chain
from ks.product import bmm, tiles

KEYS = [(rank, batch, dtype) for batch in (25088, 32, 1024) for rank in (16, 4) for dtype in ("bfloat16", "float32")]
MOST = 6


def candidates(tile: tiles.Tiles, smallest: int) -> list[tiles.Tiles]:
    """Return the rule's tile and its neighbours: fewer or more samples, warps, stages, and rows of a share."""
    changes = [{}, {"stages": max(1, tile.stages - 1)}, {"stages": tile.stages + 1}, {"warps": 12 - tile.warps}]
    changes += [{"batch": max(smallest, tile.batch // 2)}]
    if tile.rows_of_share > tile.rows:
        changes += [{"rows_of_share": max(1, tile.rows_of_share // tile.rows // 2) * tile.rows}]
    return list(dict.fromkeys(dataclasses.replace(tile, **change) for change in changes))[:MOST]


def launches(kernels, pattern: Pattern, batch: int, dtype: torch.dtype, device):
    """Yield (name, rule in `tiles`, pattern of the rule, function of a backend, its result), for each launch."""
    a, b, c, d = pattern
    values = bmm.empty_values(pattern, device, dtype).normal_()
    inner = torch.randn(pattern.cols, batch, device=device).to(dtype)
    y = torch.randn(batch, pattern.rows, device=device).to(dtype).t()
    out, back, gradients = torch.empty_like(y), torch.empty_like(inner), torch.empty_like(values)
    yield "factor", "factor_tiles", pattern, lambda backend: backend.apply_factor(values, inner, out), out
    transposed = Pattern(a, c, b, d)
    backward = values.transpose(1, 2)
    yield (
        "factor, transposed",
        "factor_tiles",
        transposed,
        lambda backend: backend.apply_factor(backward, y, back),
        back,
    )
    yield "values", "gradient_tiles", pattern, lambda backend: backend.values_gradient(y, inner, gradients), gradients


def measure(kernels, key, device, rounds: int, shape) -> list[dict]:
    """Return a row for each candidate of each launch of one key."""
    rank, batch, name = key
    dtype, rows = getattr(torch, name), []
    pattern = make_chain(*shape).patterns(rank)[0]
    for launch, rule, sizes, function, result in launches(kernels, pattern, batch, dtype, device):
        function(bmm)
        expected, timed = result.clone(), {"bmm": lambda f=function: f(bmm)}
        chosen = getattr(tiles, rule)(sizes, batch, dtype.itemsize * 8, kernels.architecture(device))
        errors = {}
        for tile in candidates(chosen, tiles.SMALLEST):

            def run(function=function, rule=rule, tile=tile):
                with mock.patch.object(tiles, rule, return_value=tile):
                    function(kernels)

            try:
                run()
            except Exception as error:  # too much shared memory: the candidate is no choice
                errors[tile] = type(error).__name__
                continue
            difference = ((result.double() - expected.double()).norm() / expected.double().norm()).item()
            if difference > 4 * torch.finfo(dtype).eps:
                errors[tile] = f"off by {difference:.2g}"
            else:
                timed[tile] = run
        times = interleaved_medians(replayed(timed, device), device, rounds)
        for tile in candidates(chosen, tiles.SMALLEST):
            row = {"launch": launch, "rank": rank, "batch": batch, "dtype": name, "rule": int(tile == chosen)}
            row |= {f"tile_{part}": size for part, size in dataclasses.asdict(tile).items()}
            row |= {"ms": times.get(tile, ""), "bmm_ms": times["bmm"]}
            rows.append(row | {"error": errors.get(tile, "")})
    return rows


@console.script
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="the rows are appended to this file")
    parser.add_argument("--minutes", type=float, default=2.0, help="start no key after this (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="readings of each clock (default: 5)")
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="use small sizes, to try the program itself")
    options = parser.parse_args(argv)
    started, device = time.monotonic(), torch.device(options.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    from ks.product import triton_kernels

    shape, keys = ((64, 64), [(2, 8, "float32")]) if options.tiny else ((4096, 4096), KEYS)
    rows, where = Rows(options.csv, resume=True), place(device)
    done = {(row["rank"], row["batch"], row["dtype"], row["hardware"], row["revision"]) for row in rows.known}
    for key in keys:
        if (*map(str, key), where["hardware"], str(where["revision"])) in done:
            continue
        if time.monotonic() - started > 60 * options.minutes:
            print(f"stopped after {options.minutes:g} minutes; the same command resumes", file=sys.stderr)
            break
        for row in measure(triton_kernels, key, device, options.rounds, shape):
            rows.add(row | where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
