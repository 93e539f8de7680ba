"""The parts of a training step besides its products, in Triton: batch, loss, gradient norm, optimiser, counters.

Every kernel finds batch and rate by a position on the device, so that a captured step needs no other kernel for them.
Sums are made of PARTS partial sums in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl

PARTS = 256  # programs of a sum: about two for every multiprocessor of a large GPU
BLOCK = 1024  # elements of a program, or of one step of its loop


@triton.jit
def take_batch_kernel(inputs, order, position, out, size, BLOCK: tl.constexpr):
    """Write the batch of this step, `size` values, to `out`."""
    batch = tl.load(order + tl.load(position))
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    tl.store(out + index, tl.load(inputs + batch * size + index, mask=inside), mask=inside)


@triton.jit
def loss_kernel(
    prediction, targets, order, position, scale, gradient, partial_sums, size, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write `scale` times the gradient of the mean squared error, and partial sums of the squared error."""
    targets += tl.load(order + tl.load(position)) * size
    factor = tl.load(scale) * (2.0 / size)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, size, PARTS * BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < size
        predicted = tl.load(prediction + index, mask=inside, other=0.0).to(tl.float32)
        difference = predicted - tl.load(targets + index, mask=inside, other=0.0)
        tl.store(gradient + index, (difference * factor).to(gradient.dtype.element_ty), mask=inside)
        squares += difference * difference
    tl.store(partial_sums + tl.program_id(0), tl.sum(squares))


@triton.jit
def norm_kernel(gradients, partial_sums, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write partial sums of the squares of all gradients."""
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * BLOCK, size, PARTS * BLOCK):
        index = start + tl.arange(0, BLOCK)
        value = tl.load(gradients + index, mask=index < size, other=0.0)
        squares += value * value
    tl.store(partial_sums + tl.program_id(0), tl.sum(squares))


@triton.jit
def finish_kernel(
    loss_sums, norm_sums, rates, position, results, steps, outputs, max_norm, loss_memory,
    count, scale, good_steps, found_inf, relative_loss, numbers,
    SCALED: tl.constexpr, LOG2_BETA1: tl.constexpr, LOG2_BETA2: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write loss and norm of this step to `results`, the numbers that its update needs, and all counters.

    numbers: learning rate, factor of the gradients (loss scale and clipping), bias corrections of Adam's moments (the
    second one's root), and whether the step is taken.
    """
    place = tl.load(position)
    parts = tl.arange(0, PARTS)
    loss = tl.sum(tl.load(loss_sums + parts)) / outputs
    squares = tl.sum(tl.load(norm_sums + parts))
    scaled_by, taken = tl.load(scale), 1.0
    if SCALED:
        taken = tl.where(squares < float("inf"), 1.0, 0.0)  # false for NaN too
        good = tl.where(taken > 0, tl.load(good_steps) + 1, 0)
        grown = tl.where(good == 500, scaled_by * 2.0, scaled_by)
        tl.store(scale, tl.where(taken > 0, grown, scaled_by * 0.5))
        tl.store(good_steps, tl.where(good == 500, 0, good))
        tl.store(found_inf, 1.0 - taken)
    norm = tl.sqrt(squares) / scaled_by
    divisor = scaled_by * tl.maximum(norm / max_norm, 1.0)
    steps_taken = tl.load(count) + taken
    wide = steps_taken.to(tl.float64)
    tl.store(numbers + 0, tl.load(rates + place))
    tl.store(numbers + 1, 1.0 / divisor)
    tl.store(numbers + 2, (1.0 - tl.exp2(wide * LOG2_BETA1)).to(tl.float32))
    tl.store(numbers + 3, tl.sqrt((1.0 - tl.exp2(wide * LOG2_BETA2)).to(tl.float32)))
    tl.store(numbers + 4, taken)
    tl.store(count, steps_taken)
    before = tl.load(relative_loss)
    tl.store(relative_loss, before + (tl.minimum(loss, 1.0) - before) * (1.0 - loss_memory))
    tl.store(results + place, loss)
    tl.store(results + steps + place, norm)
    tl.store(position, place + 1)


@triton.jit
def _update(values, gradients, moment, square, copy, size, rate, l2, decay, numbers, program,
            ADAM: tl.constexpr, MEMORY: tl.constexpr, MEMORY2: tl.constexpr, EPSILON: tl.constexpr,
            HALF: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Update one block of the values of a factor; see `update_kernel`."""
    index = program * BLOCK + tl.arange(0, BLOCK)
    inside = index < size * tl.load(numbers + 4).to(tl.int32)  # nothing, if the step is not taken
    lr = tl.load(numbers)
    value = tl.load(values + index, mask=inside)
    gradient = tl.load(gradients + index, mask=inside) * tl.load(numbers + 1) + l2 * value
    value *= 1.0 - lr * decay
    kept = tl.load(moment + index, mask=inside)
    if ADAM:
        kept += (gradient - kept) * (1.0 - MEMORY)
        squares = MEMORY2 * tl.load(square + index, mask=inside) + (1.0 - MEMORY2) * gradient * gradient
        root = tl.sqrt(squares) / tl.load(numbers + 3) + EPSILON
        value -= lr * rate / tl.load(numbers + 2) * kept / root
        tl.store(square + index, squares, mask=inside)
    else:
        kept = MEMORY * kept + gradient
        value -= lr * rate * kept
    tl.store(moment + index, kept, mask=inside)
    tl.store(values + index, value, mask=inside)
    if HALF:
        tl.store(copy + index, value.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def update_kernel(
    values, gradients, moments, squares, copies, sizes, rates, l2, decay, numbers,
    ADAM: tl.constexpr, MEMORY: tl.constexpr, MEMORY2: tl.constexpr, EPSILON: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Clip the gradients, update the values of all factors and their copies in half precision.

    One entry a factor: values, gradients, moments (Adam's first, or SGD's momentum), squares (Adam's second moments),
    copies, sizes, rates (times the learning rate). Programs go through the factors block by block.
    """
    program = tl.program_id(0)
    for factor in tl.static_range(len(values)):
        blocks = tl.cdiv(sizes[factor], BLOCK)
        if (program >= 0) & (program < blocks):
            _update(
                values[factor], gradients[factor], moments[factor], squares[factor], copies[factor], sizes[factor],
                rates[factor], l2, decay, numbers, program, ADAM, MEMORY, MEMORY2, EPSILON, HALF, BLOCK,
            )  # fmt: skip
        program -= blocks


def take_batch(inputs: torch.Tensor, order: torch.Tensor, position: torch.Tensor, out: torch.Tensor) -> None:
    """Write out = inputs[order[position]].

    Args:
        inputs: shape (steps, batch, n) or (steps, n, batch).
        order, position: int64, of shapes (steps,) and (1,).
        out: the shape of one batch.
    """
    take_batch_kernel[(triton.cdiv(out.numel(), BLOCK),)](inputs, order, position, out, out.numel(), BLOCK=BLOCK)


def loss(prediction, targets, order, position, scale, gradient, partial_sums) -> None:
    """Write `scale` times the gradient of the mean squared error against targets[order[position]].

    Args:
        prediction, gradient: of one batch, contiguous.
        targets: shape (steps, ...), float32.
        order, position: as in `take_batch`.
        scale: scalar tensor.
        partial_sums: shape (PARTS,); their sum is that of the squared errors.
    """
    loss_kernel[(PARTS,)](
        prediction,
        targets,
        order,
        position,
        scale,
        gradient,
        partial_sums,
        prediction.numel(),
        PARTS=PARTS,
        BLOCK=BLOCK,
    )


def norm(gradients: torch.Tensor, partial_sums: torch.Tensor) -> None:
    """Write partial sums of the squares of a flat tensor, shape (PARTS,)."""
    norm_kernel[(PARTS,)](gradients, partial_sums, gradients.numel(), PARTS=PARTS, BLOCK=BLOCK)


def finish(
    sums, cursor, scale, count, relative_loss, numbers, *, outputs, max_norm, loss_memory, scaled, betas
) -> None:
    """Turn partial sums into loss, norm and the numbers of the update; advance all counters.

    Args:
        sums: those of `loss` and `norm`, shape (2, PARTS).
        cursor: `ks.training.cuda_graph.Cursor`.
        scale: `ks.training.optimiser.LossScale`; changed only if `scaled`.
        count, relative_loss: scalar tensors.
        numbers: shape (5,), for `update`.
        outputs: number of squared errors.
        max_norm, loss_memory, betas: of the optimiser.
        scaled: whether the loss is scaled.
    """
    finish_kernel[(1,)](
        *(sums[0], sums[1], cursor.rates, cursor.position, cursor.results, len(cursor.rates)),
        *(outputs, max_norm, loss_memory, count, scale.scale, scale.growth, scale.found_inf, relative_loss, numbers),
        SCALED=scaled,
        LOG2_BETA1=math.log2(betas[0]),
        LOG2_BETA2=math.log2(betas[1]),
        PARTS=PARTS,
        num_warps=4,
    )


def update(parameters, gradients, moments, copies, rates, numbers, *, memories, epsilon, l2=0.0, decay=0.0) -> None:
    """Update the values of all factors in one launch, by Adam, or by SGD with momentum if it has one moment each.

    Args:
        parameters, gradients: one tensor a factor, with the same memory order, without gaps.
        moments: one or two tensors for each of them.
        copies: the parameters in half precision, written too, or None.
        rates: for each of them, times the learning rate.
        numbers: from `finish`.
        memories, epsilon: Adam's betas and epsilon; of SGD, the momentum comes first.
        l2, decay: weight decay as a part of the gradient, or per unit of the learning rate.
    """
    sizes = tuple(values.numel() for values in parameters)
    update_kernel[(sum(triton.cdiv(size, BLOCK) for size in sizes),)](
        tuple(parameters),
        tuple(gradients),
        tuple(moment[0] for moment in moments),
        tuple(moment[-1] for moment in moments),
        tuple(copies or parameters),
        sizes,
        tuple(rates),
        l2,
        decay,
        numbers,
        ADAM=len(moments[0]) == 2,
        MEMORY=memories[0],
        MEMORY2=memories[1],
        EPSILON=epsilon,
        HALF=copies is not None,
        BLOCK=BLOCK,
    )
