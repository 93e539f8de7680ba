"""The chain product in Triton: values and activations are read and written where they lie, by their strides.

Inside a kernel an activation is indexed (n, i, f, t): sample, block, feature of the block, interleaved position. If
features are contiguous in memory and d > 1, neighbouring t share a sector. One program then takes GROUP of them, splits
the loaded tile in registers and joins the tiles before it stores them. Sums are in float32 (float64 for float64) and in
a fixed order. Tile sizes come from `ks.product.tiles`.
"""

import functools

import torch
import triton
import triton.language as tl

from ks.patterns import Pattern
from ks.product import tiles

REGISTERS = 255  # for a thread; without this bound the assembler spills some of them to raise occupancy


@triton.jit
def _split(tile, GROUP: tl.constexpr):
    """Split (rows, columns · GROUP) into GROUP tiles (rows, columns); the t-th has the columns t, t + GROUP, …"""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1] // GROUP
    if GROUP == 1:
        return (tile,)
    elif GROUP == 2:
        return tl.split(tl.reshape(tile, (rows, columns, 2)))
    else:
        even, odd = tl.split(tl.reshape(tile, (rows, columns, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first, second, third, fourth)


@triton.jit
def _join(parts, GROUP: tl.constexpr):
    """Join the tiles that `_split` made."""
    rows: tl.constexpr = parts[0].shape[0]
    columns: tl.constexpr = parts[0].shape[1] * GROUP
    if GROUP == 1:
        return parts[0]
    elif GROUP == 2:
        return tl.reshape(tl.join(parts[0], parts[1]), (rows, columns))
    else:
        return tl.reshape(tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])), (rows, columns))


@triton.jit
def _interleaved_columns(start, SIZE: tl.constexpr, GROUP: tl.constexpr, SPACING: tl.constexpr):
    """Return the indices of the features·GROUP values of a row, and their offsets: feature f starts at f · SPACING."""
    index = start * GROUP + tl.arange(0, SIZE * GROUP)
    if SPACING == GROUP:
        return index, index
    else:
        return index, index // GROUP * SPACING + index % GROUP


@triton.jit
def _load(base, n, batch, stride_n, start, features, stride_f, stride_t,
          SIZE: tl.constexpr, GROUP: tl.constexpr, SPACING: tl.constexpr):  # fmt: skip
    """Load GROUP tiles (n, SIZE features from `start`), one for each t; zero outside. SPACING: see `_spacing`."""
    rows = base + n.to(tl.int64)[:, None] * stride_n
    inside = n[:, None] < batch
    if SPACING:
        index, columns = _interleaved_columns(start, SIZE, GROUP, SPACING)
        tile = tl.load(rows + columns[None, :], mask=inside & (index[None, :] < features * GROUP), other=0.0)
        return _split(tile, GROUP)
    else:
        f = start + tl.arange(0, SIZE)
        parts = ()
        for t in tl.static_range(GROUP):
            columns = f.to(tl.int64)[None, :] * stride_f + tl.cast(t, tl.int64) * stride_t
            parts = parts + (tl.load(rows + columns, mask=inside & (f[None, :] < features), other=0.0),)
        return parts


@triton.jit
def _store(parts, base, n, batch, stride_n, start, features, stride_f, stride_t,
           SIZE: tl.constexpr, GROUP: tl.constexpr, SPACING: tl.constexpr):  # fmt: skip
    """Write the tiles to the places that `_load` reads."""
    rows = base + n.to(tl.int64)[:, None] * stride_n
    inside = n[:, None] < batch
    if SPACING:
        index, columns = _interleaved_columns(start, SIZE, GROUP, SPACING)
        tl.store(rows + columns[None, :], _join(parts, GROUP), mask=inside & (index[None, :] < features * GROUP))
    else:
        f = start + tl.arange(0, SIZE)
        for t in tl.static_range(GROUP):
            columns = f.to(tl.int64)[None, :] * stride_f + tl.cast(t, tl.int64) * stride_t
            tl.store(rows + columns, parts[t], mask=inside & (f[None, :] < features))


@triton.jit
def _matrix(base, i, rows, stride_i, j, columns, stride_j):
    """Load tile (i, j) of a matrix of values; zero outside."""
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    return tl.load(base + i[:, None] * stride_i + j[None, :] * stride_j, mask=inside, other=0.0)


@triton.jit
def factor_kernel(
    x, values, y,
    batch, b, c, groups, groups_of_t, tiles_j,
    x_n, x_i, x_k, x_t, v_i, v_j, v_k, v_t, y_n, y_i, y_j, y_t,
    GROUP: tl.constexpr, X_SPACING: tl.constexpr, Y_SPACING: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write y[n, i, j, t] = Σ_k values[i, j, k, t] · x[n, i, k, t] for one i, GROUP of t, and tiles of n and j."""
    program = tl.program_id(0)
    group = program // tiles_j % groups
    i, t = (group // groups_of_t).to(tl.int64), (group % groups_of_t).to(tl.int64) * GROUP
    n = program // (tiles_j * groups) * BATCH + tl.arange(0, BATCH)
    first_j = program % tiles_j * ROWS
    j = first_j + tl.arange(0, ROWS)
    x += i * x_i + t * x_t
    values += i * v_i + t * v_t
    accumulator: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    sums = (tl.zeros((BATCH, ROWS), accumulator),) * GROUP
    for first_k in range(0, c, COLS):
        x_tiles = _load(x, n, batch, x_n, first_k, c, x_k, x_t, COLS, GROUP, X_SPACING)
        k = first_k + tl.arange(0, COLS)
        added = ()
        for g in tl.static_range(GROUP):
            tile = _matrix(values + g * v_t, k, c, v_k, j, b, v_j)
            added = added + (tl.dot(x_tiles[g], tile, sums[g], input_precision=PRECISION, out_dtype=accumulator),)
        sums = added
    results = ()
    for g in tl.static_range(GROUP):
        results = results + (sums[g].to(y.dtype.element_ty),)
    y += i * y_i + t * y_t
    _store(results, y, n, batch, y_n, first_j, b, y_j, y_t, ROWS, GROUP, Y_SPACING)


@triton.jit
def values_gradient_kernel(
    gradient, x, out,
    batch, b, c, groups, groups_of_t, tiles_j, tiles_k, samples_per_part,
    g_n, g_i, g_j, g_t, x_n, x_i, x_k, x_t, o_part, o_i, o_j, o_k, o_t,
    GROUP: tl.constexpr, G_SPACING: tl.constexpr, X_SPACING: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out[part, i, j, k, t] = Σ_n gradient[n, i, j, t] · x[n, i, k, t], n over one part of the batch."""
    program = tl.program_id(0)
    first_k = program % tiles_k * COLS
    first_j = program // tiles_k % tiles_j * ROWS
    group = program // (tiles_k * tiles_j) % groups
    part = (program // (tiles_k * tiles_j * groups)).to(tl.int64)
    i, t = (group // groups_of_t).to(tl.int64), (group % groups_of_t).to(tl.int64) * GROUP
    gradient += i * g_i + t * g_t
    x += i * x_i + t * x_t
    accumulator: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    sums = (tl.zeros((ROWS, COLS), accumulator),) * GROUP
    start = part * samples_per_part
    stop = tl.minimum(start + samples_per_part, batch)
    for first_n in range(start, stop, BATCH):
        n = first_n + tl.arange(0, BATCH)
        gradient_tiles = _load(gradient, n, stop, g_n, first_j, b, g_j, g_t, ROWS, GROUP, G_SPACING)
        x_tiles = _load(x, n, stop, x_n, first_k, c, x_k, x_t, COLS, GROUP, X_SPACING)
        added = ()
        for g in tl.static_range(GROUP):
            rows = tl.trans(gradient_tiles[g])
            added = added + (tl.dot(rows, x_tiles[g], sums[g], input_precision=PRECISION, out_dtype=accumulator),)
        sums = added
    j, k = first_j + tl.arange(0, ROWS), first_k + tl.arange(0, COLS)
    inside = (j[:, None] < b) & (k[None, :] < c)
    out += part * o_part + i * o_i + t * o_t
    where = out + j[:, None] * o_j + k[None, :] * o_k
    for g in tl.static_range(GROUP):
        tl.store(where + g * o_t, sums[g].to(out.dtype.element_ty), mask=inside)


@functools.cache
def architecture(device: torch.device) -> int:
    """Return ten times the compute capability of a GPU; 90 (Hopper) in the interpreter, which runs on the CPU."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _block_strides(activation: torch.Tensor, a: int, d: int, block_order: bool) -> tuple[int, int, int, int]:
    """Return the strides (n, i, f, t) of a (features, batch) matrix."""
    features, _ = activation.shape
    f = features // (a * d)
    stride, stride_n = activation.stride()
    if block_order:
        return stride_n, f * d * stride, stride, f * stride
    return stride_n, f * d * stride, d * stride, stride


def _spacing(d: int, stride_t: int) -> int:
    """Return the distance of consecutive features if neighbouring t are contiguous in memory, else 0."""
    return d if stride_t == 1 < d else 0


def _options(tile: tiles.Tiles, precision: str) -> dict:
    """Return the launch options of a tile."""
    sizes = {"BATCH": tile.batch, "ROWS": tile.rows, "COLS": tile.cols, "PRECISION": precision}
    return sizes | {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": REGISTERS}


def apply_factor(
    factor: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    x_block_order: bool = False,
    out_block_order: bool = False,
    precision: str = "ieee",
) -> None:
    """Write out = K x; arguments as in `ks.product.bmm.apply_factor`."""
    a, b, c, d = pattern = Pattern(*factor.shape)
    batch = x.shape[1]
    if batch == 0:
        return
    x_strides = _block_strides(x, a, d, x_block_order)
    y_strides = _block_strides(out, a, d, out_block_order)
    x_spacing, y_spacing = _spacing(d, x_strides[3]), _spacing(d, y_strides[3])
    tile = tiles.factor_tiles(
        pattern, batch, x.element_size() * 8, bool(x_spacing or y_spacing), architecture(x.device)
    )
    groups_of_t = d // tile.group
    tiles_j = triton.cdiv(b, tile.rows)
    factor_kernel[(triton.cdiv(batch, tile.batch) * a * groups_of_t * tiles_j,)](
        x,
        factor,
        out,
        *(batch, b, c, a * groups_of_t, groups_of_t, tiles_j),
        *x_strides,
        *factor.stride(),
        *y_strides,
        GROUP=tile.group,
        X_SPACING=x_spacing if tile.group > 1 else 0,
        Y_SPACING=y_spacing if tile.group > 1 else 0,
        **_options(tile, precision),
    )


def values_gradient(
    gradient: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    block_order: bool = False,
    precision: str = "ieee",
) -> None:
    """Write out = Σ over the batch of gradient ⊗ x; arguments as in `ks.product.bmm.values_gradient`.

    One program sums each part of the batch and one reduction sums the parts, so the result is deterministic.
    """
    a, b, c, d = pattern = Pattern(*out.shape)
    batch = x.shape[1]
    g_strides = _block_strides(gradient, a, d, block_order)
    x_strides = _block_strides(x, a, d, False)
    g_spacing, x_spacing = _spacing(d, g_strides[3]), _spacing(d, x_strides[3])
    tile = tiles.gradient_tiles(
        pattern, batch, x.element_size() * 8, bool(g_spacing or x_spacing), architecture(x.device)
    )
    if tile.parts == 1:
        sums = out.unsqueeze(0)
    else:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        sums = torch.empty(tile.parts, a, d, b, c, dtype=wide, device=x.device).permute(0, 1, 3, 4, 2)
    groups_of_t = d // tile.group
    tiles_j, tiles_k = triton.cdiv(b, tile.rows), triton.cdiv(c, tile.cols)
    values_gradient_kernel[(tile.parts * a * groups_of_t * tiles_j * tiles_k,)](
        gradient,
        x,
        sums,
        *(batch, b, c, a * groups_of_t, groups_of_t, tiles_j, tiles_k, triton.cdiv(batch, tile.parts)),
        *g_strides,
        *x_strides,
        *sums.stride(),
        GROUP=tile.group,
        G_SPACING=g_spacing if tile.group > 1 else 0,
        X_SPACING=x_spacing if tile.group > 1 else 0,
        **_options(tile, precision),
    )
    if tile.parts > 1:
        out.copy_(sums.sum(0))  # torch.sum(…, out=half) would round before it adds
