"""Gram matrices and other work in pieces of a fixed size, so that no bit depends on the number of threads."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

PIECE = 256
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_pieces(function: Callable[[slice], None], count: int, device: torch.device) -> None:
    """Call `function` on ranges that cover 0 … count − 1, as many at a time as torch has threads.

    A matrix product splits its sums by the number of its threads. On a GPU, one call covers everything.

    Args:
        function: writes the results of a range of `PIECE` entries, the last one of fewer, to places of their own.
        count: end of the last range.
        device: on which it works.
    """
    if device.type != "cpu":
        function(slice(0, count))
        return
    list(one_thread_each(function, [slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]))


def one_thread_each(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` for each item, in order: as many at a time as torch has threads, each on one thread.

    Items are taken as they are needed.
    """
    threads, items = torch.get_num_threads(), iter(items)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            while some := list(itertools.islice(items, threads)):
                yield from map(function, some) if len(some) == 1 else pool.map(function, some)
    finally:
        torch.set_num_threads(threads)


def sum_of_squares(matrix: torch.Tensor) -> float:
    """Return ‖A‖_F² in float64; on a CPU its bits do not depend on the number of threads.

    Args:
        matrix: A, shape (rows, cols), any float dtype.
    """
    rows = matrix.new_empty(len(matrix), dtype=torch.float64)

    def compute(part: slice) -> None:
        rows[part] = torch.linalg.vector_norm(matrix[part], dim=1, dtype=torch.float64).square_()

    in_pieces(compute, len(matrix), matrix.device)
    return math.fsum(rows.tolist())


def lower_gram(matrix: torch.Tensor) -> torch.Tensor:
    """Return the lower triangle of A Aᵀ.

    Panels of rows meet the rows up to their own. Cholesky factors and eigenvalues read no more than the lower triangle.

    Args:
        matrix: A, shape (..., rows, cols), any strides.
    Returns:
        tensor of shape (..., rows, rows); above the diagonal it is 0 or, near the diagonal, that of A Aᵀ. On a CPU its
        bits do not depend on the number of threads.
    """
    rows = matrix.shape[-2]
    gram = matrix.new_zeros(*matrix.shape[:-1], rows)

    def compute(panel: slice) -> None:
        torch.matmul(matrix[..., panel, :], matrix[..., : panel.stop, :].mT, out=gram[..., panel, : panel.stop])

    in_pieces(compute, rows, matrix.device)
    return gram
