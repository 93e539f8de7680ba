"""Streaming sums against sums computed by hand."""

import pytest
import torch
from networks import hand_computed, normal

from ks.moments import sums
from ks.moments.sums import InputSums


@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 30])
def test_sums_are_those_computed_by_hand(width):
    rows = normal(50, width)
    found = InputSums.zeros(width)
    for part in rows.split(13):
        found.add(part)
    found = found.finished()
    square, total = hand_computed(rows)
    torch.testing.assert_close(found.sum_xx, square, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.sum_x, total, rtol=1e-13, atol=1e-13)
    assert found.count == 50
    assert torch.equal(found.sum_xx, found.sum_xx.t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_promoted_before_it_is_multiplied(dtype):
    rows = (300 * normal(2000, 5)).to(dtype)  # squares overflow float16, and float32 sums of them lose seven digits
    found = InputSums.zeros(5)
    found.add(rows)
    torch.testing.assert_close(found.finished().sum_xx, hand_computed(rows)[0], rtol=1e-12, atol=0)


def test_more_rows_than_a_chunk_and_no_rows(monkeypatch):
    monkeypatch.setattr(sums, "CHUNK_ROWS", 8)
    rows = normal(21, 4)
    found = InputSums.zeros(4)
    found.add(rows)
    found.add(rows[:0])
    torch.testing.assert_close(found.finished().sum_xx, hand_computed(rows)[0])
    assert found.count == 21


def test_sums_of_two_parts_are_those_of_the_whole():
    rows = normal(20, 9)
    whole, first, second = (InputSums.zeros(9) for _ in range(3))
    whole.add(rows)
    first.add(rows[:7])
    second.add(rows[7:])
    added = first.finished().plus(second.finished())
    torch.testing.assert_close(added.sum_xx, whole.finished().sum_xx)
    torch.testing.assert_close(added.sum_x, whole.sum_x)
    assert added.count == 20
