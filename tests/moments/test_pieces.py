"""Fixed pieces of work on any number of threads."""

import threading

import pytest
import torch

from ks.moments import pieces
from ks.moments.pieces import in_pieces, lower_gram, one_thread_each, sum_of_squares


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 8, 9])
def test_the_pieces_cover_every_entry_once(count, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 4)
    seen, threads = torch.zeros(count), []

    def function(part):
        seen[part] += 1
        threads.append((torch.get_num_threads(), threading.current_thread().name))

    in_pieces(function, count, torch.device("cpu"))
    assert seen.eq(1).all()
    assert {number for number, _ in threads} <= {1}
    assert torch.get_num_threads() == 3


def test_results_come_in_order_from_items_that_are_taken_as_needed():
    taken = []

    def items():
        for number in range(8):
            taken.append(number)
            yield number

    found = one_thread_each(lambda number: (number, torch.get_num_threads()), items())
    assert next(found) == (0, 1)
    assert len(taken) == 3
    assert [number for number, threads in found if threads == 1] == [*range(1, 8)]
    assert torch.get_num_threads() == 3
    with pytest.raises(ZeroDivisionError):
        list(one_thread_each(lambda number: 1 / number, range(8)))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize("shape", [(7, 4), (2, 3, 7, 10)])
def test_the_lower_triangle_of_a_gram_matrix_is_that_of_the_product(shape, piece, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", piece)
    matrix = torch.randn(shape, dtype=torch.float64)
    for a in (matrix, matrix.mT.contiguous().mT):
        found = lower_gram(a)
        torch.testing.assert_close(found.tril(), (a @ a.mT).tril())
        assert found.isfinite().all()


def test_bits_do_not_depend_on_the_number_of_threads():
    matrix = torch.randn(700, 900)
    several, energy = lower_gram(matrix), sum_of_squares(matrix)
    torch.set_num_threads(1)
    assert torch.equal(several, lower_gram(matrix))
    assert energy == sum_of_squares(matrix)
    assert energy == pytest.approx(matrix.double().square().sum().item(), rel=1e-14)
