"""The products of one factor with d a multiple of 4, in Triton: activations are read and written where they lie.

Inside a kernel an activation is indexed (n, f, t): sample, feature of the block i, interleaved position. One program
takes GROUP neighbouring t, which lie side by side in memory if the features of a batch do: it splits the loaded tile in
registers, and joins the tiles before it stores them. Sums are in float32 and in a fixed order. Tile sizes
come from `ks.chain.tiles`, which also says where these kernels have an advantage over `torch.bmm`.
"""

import torch
import triton
import triton.language as tl

from ks.chain import tiles
from ks.chain.patterns import Pattern

GROUP = tl.constexpr(tiles.GROUP)
REGISTERS = 255  # for a thread; without this bound the assembler spills some of them to raise occupancy


@triton.jit
def _pointers(base, n, f, batch, features, stride_n, stride, groups_of_t):
    """Return the places (n, f, t) of GROUP neighbouring t, and whether they are inside."""
    column = f.to(tl.int64)[None, :, None] * (groups_of_t * GROUP) + tl.arange(0, GROUP)[None, None, :]
    inside = (n[:, None, None] < batch) & (f[None, :, None] < features)
    return base + (n.to(tl.int64)[:, None, None] * stride_n + column * stride), inside


@triton.jit
def _load(base, n, f, batch, features, stride_n, stride, groups_of_t):
    """Load GROUP tiles (n, f), one for each t; zero outside."""
    where, inside = _pointers(base, n, f, batch, features, stride_n, stride, groups_of_t)
    tile = tl.load(where, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _store(parts, base, n, f, batch, features, stride_n, stride, groups_of_t):
    """Write the tiles to the places that `_load` reads."""
    where, inside = _pointers(base, n, f, batch, features, stride_n, stride, groups_of_t)
    tile = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
    tl.store(where, tl.reshape(tile, where.shape), mask=inside)


@triton.jit
def _matrix(values, j, k, b, c, v_j, v_k):
    """Load a tile (j, k) of the values of one t; zero outside."""
    inside = (j[:, None] < b) & (k[None, :] < c)
    return tl.load(values + (j.to(tl.int64)[:, None] * v_j + k.to(tl.int64)[None, :] * v_k), mask=inside, other=0.0)


@triton.jit
def factor_kernel(
    x, values, y,
    batch, b, c, groups, groups_of_t, shares, rows_of_share,
    x_n, x_f, v_i, v_j, v_k, v_t, y_n, y_f,
    HELD: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y[n, i, j, t] = Σ_k values[i, j, k, t] · x[n, i, k, t] for one i, GROUP of t, a tile of n, a share of j.

    HELD: c ≤ COLS, so that the program loads its tile of x once and multiplies it with all tiles of j.
    """
    program = tl.program_id(0)
    group = program // shares % groups
    i, t = (group // groups_of_t).to(tl.int64), (group % groups_of_t) * GROUP
    n = program // (shares * groups) * BATCH + tl.arange(0, BATCH)
    k = tl.arange(0, COLS)
    x += (i * c * (groups_of_t * GROUP) + t) * x_f
    y += (i * b * (groups_of_t * GROUP) + t) * y_f
    values += i * v_i + t.to(tl.int64) * v_t
    if HELD:
        held = _load(x, n, k, batch, c, x_n, x_f, groups_of_t)
    start = program % shares * rows_of_share
    for first_j in range(start, tl.minimum(start + rows_of_share, b), ROWS):
        j = first_j + tl.arange(0, ROWS)
        results = ()
        if HELD:
            for g in tl.static_range(GROUP):
                matrix = _matrix(values + g * v_t, j, k, b, c, v_j, v_k)
                product = tl.dot(matrix, tl.trans(held[g]), input_precision=PRECISION)
                results = results + (tl.trans(product.to(y.dtype.element_ty)),)
        else:
            sums = (tl.zeros((ROWS, BATCH), tl.float32),) * GROUP
            for first_k in range(0, c, COLS):
                x_tiles = _load(x, n, first_k + k, batch, c, x_n, x_f, groups_of_t)
                added = ()
                for g in tl.static_range(GROUP):
                    matrix = _matrix(values + g * v_t, j, first_k + k, b, c, v_j, v_k)
                    tile = tl.trans(x_tiles[g])
                    added = added + (tl.dot(matrix, tile, sums[g], input_precision=PRECISION),)
                sums = added
            for g in tl.static_range(GROUP):
                results = results + (tl.trans(sums[g].to(y.dtype.element_ty)),)
        _store(results, y, n, j, batch, b, y_n, y_f, groups_of_t)


@triton.jit
def values_gradient_kernel(
    gradient, x, out,
    batch, b, c, groups, groups_of_t, tiles_j, tiles_k, samples_of_part,
    g_n, g_f, x_n, x_f, o_part, o_i, o_j, o_k, o_t,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out[part, i, j, k, t] = Σ_n gradient[n, i, j, t] · x[n, i, k, t], n over one part of the batch."""
    program = tl.program_id(0)
    k = program % tiles_k * COLS + tl.arange(0, COLS)
    j = program // tiles_k % tiles_j * ROWS + tl.arange(0, ROWS)
    group = program // (tiles_k * tiles_j) % groups
    part = program // (tiles_k * tiles_j * groups)
    i, t = (group // groups_of_t).to(tl.int64), (group % groups_of_t) * GROUP
    gradient += (i * b * (groups_of_t * GROUP) + t) * g_f
    x += (i * c * (groups_of_t * GROUP) + t) * x_f
    out += part.to(tl.int64) * o_part + i * o_i + t.to(tl.int64) * o_t
    sums = (tl.zeros((ROWS, COLS), tl.float32),) * GROUP
    start = part * samples_of_part
    stop = tl.minimum(start + samples_of_part, batch)
    for first_n in range(start, stop, BATCH):
        n = first_n + tl.arange(0, BATCH)
        gradient_tiles = _load(gradient, n, j, stop, b, g_n, g_f, groups_of_t)
        x_tiles = _load(x, n, k, stop, c, x_n, x_f, groups_of_t)
        added = ()
        for g in tl.static_range(GROUP):
            rows = tl.trans(gradient_tiles[g])
            added = added + (tl.dot(rows, x_tiles[g], sums[g], input_precision=PRECISION),)
        sums = added
    inside = (j[:, None] < b) & (k[None, :] < c)
    where = out + (j.to(tl.int64)[:, None] * o_j + k.to(tl.int64)[None, :] * o_k)
    for g in tl.static_range(GROUP):
        tl.store(where + g * o_t, sums[g].to(out.dtype.element_ty), mask=inside)


def _options(precision: str, stages: int) -> dict:
    """Return the options that all launches share."""
    return {"ROWS": tiles.ROWS, "PRECISION": precision, "num_warps": 4, "num_stages": stages, "maxnreg": REGISTERS}


def apply_factor(
    factor: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    precision: str = "ieee",
) -> None:
    """Write out = K x; arguments as in `ks.chain.bmm.apply_factor`, but d a multiple of GROUP and no block order."""
    a, b, c, d = pattern = Pattern(*factor.shape)
    batch = x.shape[1]
    tile = tiles.factor_tiles(pattern, batch, x.element_size() * 8)
    shares = triton.cdiv(b, tile.rows)
    groups_of_t = d // tiles.GROUP
    grid = (triton.cdiv(batch, tiles.SAMPLES) * a * groups_of_t * shares,)
    with torch.cuda.device_of(x):
        factor_kernel[grid](
            x,
            factor,
            out,
            *(batch, b, c, a * groups_of_t, groups_of_t, shares, tile.rows),
            *x.stride()[::-1],
            *factor.stride(),
            *out.stride()[::-1],
            HELD=c <= tile.cols,
            BATCH=tiles.SAMPLES,
            COLS=tile.cols,
            **_options(precision, tile.stages),
        )


def values_gradient(
    gradient: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    precision: str = "ieee",
) -> None:
    """Write out = Σ over the batch of gradient ⊗ x; arguments as there in `ks.chain.bmm`, `out` in any dtype.

    One program sums each part of the batch and one reduction sums the parts, so the result is deterministic.
    """
    a, b, c, d = pattern = Pattern(*out.shape)
    batch = x.shape[1]
    tile = tiles.gradient_tiles(pattern, batch, x.element_size() * 8)
    parts = triton.cdiv(batch, tile.part)
    if parts == 1:
        sums = out.unsqueeze(0)
    else:
        sums = torch.empty(parts, a, d, b, c, dtype=torch.float32, device=x.device).permute(0, 1, 3, 4, 2)
    groups_of_t = d // tiles.GROUP
    tiles_j, tiles_k = triton.cdiv(b, tiles.ROWS), triton.cdiv(c, tiles.SAMPLES)
    grid = (parts * a * groups_of_t * tiles_j * tiles_k,)
    with torch.cuda.device_of(x):
        values_gradient_kernel[grid](
            gradient,
            x,
            sums,
            *(batch, b, c, a * groups_of_t, groups_of_t, tiles_j, tiles_k, tile.part),
            *gradient.stride()[::-1],
            *x.stride()[::-1],
            *sums.stride(),
            BATCH=tile.samples,
            COLS=tiles.SAMPLES,
            **_options(precision, stages=3),
        )
    if parts > 1:
        out.copy_(sums.sum(0))  # torch.sum(…, out=half) would round before it adds
