"""The product of many small matrices in one Triton kernel: operands are read and written where they lie.

Sums are in float32 (float64 for float64) and in a fixed order. No GPU has measured the tile sizes.
"""

import torch
import triton
import triton.language as tl

TILES = {"TILE_M": 64, "TILE_N": 32, "TILE_K": 32}


@triton.jit
def _tile(base, rows, cols, height, width, row_stride, col_stride):
    """Return the places of a tile, and which of them are inside the matrix."""
    places = base + (rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride)
    return places, (rows[:, None] < height) & (cols[None, :] < width)


@triton.jit
def multiply_kernel(
    left, right, out, d, m, n, k, tiles_m, tiles_n,
    left_i, left_t, left_m, left_k, right_i, right_t, right_k, right_n, out_i, out_t, out_m, out_n,
    SUMS: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """Write one tile of out[i, t] = left[i, t] @ right[i, t] for one (i, t), or add it to what is there."""
    program = tl.program_id(0)
    block = (program // (tiles_m * tiles_n)).to(tl.int64)
    i, t = block // d, block % d
    rows = program // tiles_n % tiles_m * TILE_M + tl.arange(0, TILE_M)
    cols = program % tiles_n * TILE_N + tl.arange(0, TILE_N)
    sums = tl.zeros((TILE_M, TILE_N), SUMS)
    for first in range(0, k, TILE_K):
        inner = first + tl.arange(0, TILE_K)
        places, inside = _tile(left + i * left_i + t * left_t, rows, inner, m, k, left_m, left_k)
        left_tile = tl.load(places, mask=inside, other=0.0)
        places, inside = _tile(right + i * right_i + t * right_t, inner, cols, k, n, right_k, right_n)
        right_tile = tl.load(places, mask=inside, other=0.0)
        sums = tl.dot(left_tile, right_tile, sums, input_precision=PRECISION, out_dtype=SUMS)
    places, inside = _tile(out + i * out_i + t * out_t, rows, cols, m, n, out_m, out_n)
    if ACCUMULATE:
        sums += tl.load(places, mask=inside, other=0.0)
    tl.store(places, sums.to(out.dtype.element_ty), mask=inside)


def multiply(
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
    *,
    precision: str = "ieee",
) -> torch.Tensor:
    """Return left[i, t] @ right[i, t], as `ks.chain.bmm.multiply` does, and copy nothing.

    Args:
        left, right, out: shapes (a, d, m, k), (a, d, k, n) and (a, d, m, n), any strides; without out a new tensor.
        accumulate: add the product to `out`.
        precision: of float32 operands, 'ieee' or 'tf32'.
    """
    out = left.new_empty(*left.shape[:3], right.shape[3]) if out is None else out
    a, d, m, n = out.shape
    tiles_m, tiles_n = triton.cdiv(m, TILES["TILE_M"]), triton.cdiv(n, TILES["TILE_N"])
    sums = tl.float64 if left.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(left):
        multiply_kernel[(a * d * tiles_m * tiles_n,)](
            *(left, right, out, d, m, n, left.shape[3], tiles_m, tiles_n),
            *(*left.stride(), *right.stride(), *out.stride()),
            **(TILES | {"SUMS": sums, "PRECISION": precision, "ACCUMULATE": accumulate}),
        )
    return out
