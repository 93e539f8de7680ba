"""Work in fixed pieces, one CPU thread each: the bits of the result do not depend on the number of threads."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

PIECE = 256


def in_pieces(function: Callable[[slice], None], count: int, device: torch.device) -> None:
    """Call `function` on ranges that cover 0 … count − 1, as many at a time as torch has threads.

    A matrix product splits its sums by the number of its threads. On a GPU, one call covers everything.

    Args:
        function: that writes its results to places of its own.
        count: end of the last range; all but the last have `PIECE` entries.
        device: on which it works.
    """
    if device.type != "cpu":
        function(slice(0, count))
        return
    ranges = [slice(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1 or len(ranges) == 1:
            for part in ranges:
                function(part)
        else:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(function, ranges))
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
