"""Fixed pieces of work on any number of threads."""

import threading

import pytest
import torch

from ks.moments import pieces
from ks.moments.gram import lower_gram


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9])
def test_the_pieces_cover_every_entry_once(count, monkeypatch, three_threads):
    monkeypatch.setattr(pieces, "PIECE", 4)
    seen, threads = torch.zeros(count), []

    def function(part):
        seen[part] += 1
        threads.append((torch.get_num_threads(), threading.current_thread().name))

    pieces.in_pieces(function, count, torch.device("cpu"))
    assert seen.eq(1).all()
    assert {number for number, _ in threads} <= {1}
    assert torch.get_num_threads() == 3


def test_an_error_in_a_piece_is_raised_and_the_threads_come_back(three_threads):
    with pytest.raises(ZeroDivisionError):
        pieces.in_pieces(lambda part: 1 / 0, 1000, torch.device("cpu"))
    assert torch.get_num_threads() == 3


def test_results_come_in_order_from_items_that_are_taken_as_needed(three_threads):
    taken = []

    def items():
        for number in range(8):
            taken.append(number)
            yield number

    found = pieces.one_thread_each(lambda number: (number, torch.get_num_threads()), items())
    assert next(found) == (0, 1)
    assert len(taken) == 3
    assert [number for number, threads in found if threads == 1] == [*range(1, 8)]
    assert torch.get_num_threads() == 3


def test_bits_do_not_depend_on_the_number_of_threads(three_threads):
    matrix = torch.randn(700, 900)
    several, energy = lower_gram(matrix), pieces.sum_of_squares(matrix)
    torch.set_num_threads(1)
    assert torch.equal(several, lower_gram(matrix))
    assert energy == pieces.sum_of_squares(matrix)
    assert energy == pytest.approx(matrix.double().square().sum().item(), rel=1e-14)
