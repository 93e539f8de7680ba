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


@pytest.mark.parametrize("batch", [255, 256, 1000])
@pytest.mark.parametrize(
    "chain",
    [
        make_chain(64, 64),
        make_chain(512, 512, "butterfly", num_factors=9),
        make_chain(256, 256, "butterfly", num_factors=5),
    ],
    ids=lambda chain: chain.describe(),
)
@pytest.mark.parametrize("batch_last", [False, True])
def test_chains_whose_left_factors_are_merged_keep_their_promised_order(chain, batch, batch_last):
    check_passes(chain.patterns(1), batch, batch_last, block_order=True)
    check_passes(chain.patterns(2), batch, batch_last, block_order=True)


SIZES = (make_chain(64, 64).patterns(4), 32, torch.device("cpu"), torch.float32)


@pytest.fixture
def fail_with(monkeypatch):
    """Make Triton run here, and its kernels raise the given error."""
    pytest.importorskip("triton")

    def plant(error):
        def kernel(*arguments, **keywords):
            raise error

        backend = SimpleNamespace(apply_factor=kernel, values_gradient=kernel, architecture=lambda device: 90)
        monkeypatch.setattr(passes, "choose_impl", lambda impl, device: (impl, "as planted"))
        monkeypatch.setattr(passes, "backend_module", lambda name: {"triton": backend, "bmm": bmm}[name])

    return plant


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda: import_module("triton.errors").TritonError("no such instruction\nin line 7"), "no such instruction"),
        (lambda: import_module("triton.errors").TritonError(""), "TritonError"),
        (lambda: RuntimeError("Failed to find C compiler."), "Failed to find C compiler."),
    ],
    ids=["compiler", "no message", "no C compiler"],
)
def test_kernels_that_fail_are_one_line(fail_with, error, said):
    fail_with(error())
    with pytest.raises(UsageError, match=rf"'triton': the kernels fail here \({said}\); use 'auto'"):
        choose_working_impl("triton", *SIZES)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), TypeError("a fault of this program")], ids=str)
def test_other_errors_are_raised_as_they_are(fail_with, error):
    fail_with(error)
    with pytest.raises(type(error), match=str(error)):
        choose_working_impl("triton", *SIZES)


def test_a_chain_without_copies_leaves_nothing_to_the_kernels(fail_with):
    fail_with(RuntimeError("never launched"))
    chosen, reason, warning = choose_working_impl("triton", *SIZES, block_order=True)
    assert (chosen, warning) == ("triton", None)
    assert reason == "as planted; torch.bmm takes every product here, because it copies nothing or moves fewer bytes"


def test_matrix_products_are_not_tried_first():
    assert choose_working_impl("bmm", *SIZES) == ("bmm", "as asked", None)
    assert choose_working_impl("auto", *SIZES)[0] == "bmm"
