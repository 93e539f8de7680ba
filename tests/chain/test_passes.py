"""The passes of a chain against the dense reference, over random sizes on both sides of every threshold.

Whatever is merged, fused or left in block order, y and every gradient must be those of W, in the order that
`output_rows` promises. And kernels that fail are one line.
"""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import check_passes, random_case

from ks.chain import bmm, passes
from ks.chain.merge import MERGE_BATCH, merge_runs
from ks.chain.passes import choose_working_impl
from ks.chain.patterns import make_chain
from ks.errors import UsageError


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_random_chains_equal_the_dense_product(first):
    for seed in range(first, first + 40):
        check_passes(*random_case(seed))


def test_the_draws_reach_merged_and_unmerged_chains_in_both_orders():
    reached = set()
    for seed in range(160):
        patterns, batch, _, block_order = random_case(seed)
        reached.add((len(merge_runs(patterns, batch)) < len(patterns), block_order, batch >= MERGE_BATCH))
    assert reached >= {(True, True, True), (True, False, True), (False, True, True), (False, True, False)}


SIZES = (make_chain(64, 64).patterns(4), 32, torch.device("cpu"), torch.float32)


@pytest.fixture
def fail_with(monkeypatch):
    """Make Triton run here, and its kernels raise the given error."""
    pytest.importorskip("triton")

    def plant(error):
        def kernel(*arguments, **keywords):
            raise error

        backend = SimpleNamespace(apply_factor=kernel, values_gradient=kernel)
        monkeypatch.setattr(passes, "choose_impl", lambda impl, device: (impl, "as planted"))
        monkeypatch.setattr(passes, "backend_module", lambda name: {"triton": backend, "bmm": bmm}[name])

    return plant


@pytest.mark.parametrize(
    ("message", "printed"),
    [("no such instruction\nin line 7", "no such instruction"), ("", "TritonError")],
    ids=["compiler", "no message"],
)
def test_kernels_that_fail_are_one_line(fail_with, message, printed):
    fail_with(import_module("triton.errors").TritonError(message))
    with pytest.raises(UsageError, match=rf"'triton': the kernels fail here \({printed}\); use 'auto'"):
        choose_working_impl("triton", *SIZES)


def test_a_chain_without_copies_leaves_nothing_to_the_kernels(fail_with):
    fail_with(RuntimeError("never launched"))
    chosen, reason = choose_working_impl("triton", *SIZES, block_order=True)
    assert chosen == "triton"
    assert reason.startswith("as planted; torch.bmm takes every product here")


def test_matrix_products_are_not_tried_first():
    assert choose_working_impl("bmm", *SIZES) == ("bmm", "as asked")
    assert choose_working_impl("auto", *SIZES)[0] == "bmm"
