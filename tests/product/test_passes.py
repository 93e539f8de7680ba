"""The passes of a chain against the dense reference, over random sizes on both sides of every threshold.

Whatever is merged, fused or left in block order, y and every gradient must be those of W, in the order that
`output_rows` promises. And a backend whose kernels fail is replaced, or the failure is said.
"""

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import check_passes, random_case

from ks.errors import UsageError
from ks.patterns import make_chain
from ks.product import bmm, passes
from ks.product.merge import MERGE_BATCH, merge_runs
from ks.product.passes import choose_working_impl


@pytest.mark.parametrize("first", range(0, 400, 40))
def test_random_chains_equal_the_dense_product(first):
    for seed in range(first, first + 40):
        check_passes(*random_case(seed))


def test_the_draws_reach_merged_and_unmerged_chains_in_both_orders():
    reached = set()
    for seed in range(400):
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
    """Make Triton the choice for every chain, and its kernels raise the given error."""

    def plant(error):
        def kernel(*arguments, **keywords):
            raise error

        backend = SimpleNamespace(apply_factor=kernel, values_gradient=kernel, architecture=lambda device: 90)
        monkeypatch.setattr(passes, "choose_impl", lambda *_: ("triton", "as planted"))
        monkeypatch.setattr(passes, "backend_module", lambda name: {"triton": backend}[name])

    return plant


def triton_error(message):
    """An error of the class that is in force now: the interpreter's tests import Triton anew."""
    return pytest.importorskip("triton.errors").TritonError(message)


@pytest.mark.parametrize("layout", [{}, {"precision": "tf32"}], ids=str)
def test_kernels_that_fail_give_way_to_matrix_products_where_the_choice_was_free(fail_with, layout):
    fail_with(triton_error("no such instruction\nin line 7"))
    assert choose_working_impl("auto", *SIZES, **layout) == (
        "bmm",
        "Triton fails here",
        "the Triton kernels fail here (no such instruction); torch.bmm takes their place",
    )


def test_kernels_that_fail_are_an_error_where_they_were_asked_for(fail_with):
    fail_with(triton_error("no such instruction\nin line 7"))
    with pytest.raises(UsageError, match=r"'triton': the kernels fail here \(no such instruction\); use 'auto'"):
        choose_working_impl("triton", *SIZES)


def test_a_machine_without_a_c_compiler_trains_on_matrix_products(fail_with):
    pytest.importorskip("triton")
    fail_with(RuntimeError("Failed to find C compiler. Please specify via CC environment variable."))
    backend, _, warning = choose_working_impl("auto", *SIZES)
    assert backend == "bmm"
    assert "Failed to find C compiler" in warning


def test_an_error_without_a_message_has_its_name(fail_with):
    fail_with(triton_error(""))
    assert "(TritonError)" in choose_working_impl("auto", *SIZES)[2]


def test_a_fault_in_the_backward_pass_is_found_too(fail_with, monkeypatch):
    fail_with(triton_error("out of registers"))
    monkeypatch.setattr(passes.backend_module("triton"), "apply_factor", lambda *arguments, **keywords: None)
    assert choose_working_impl("auto", *SIZES)[0] == "bmm"


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), TypeError("a fault of this program")], ids=str)
def test_other_errors_are_no_reason_to_change_the_backend(fail_with, error, impl):
    pytest.importorskip("triton")
    fail_with(error)
    with pytest.raises(type(error), match=str(error)):
        choose_working_impl(impl, *SIZES)


def test_a_chain_without_copies_leaves_nothing_to_the_kernels(fail_with):
    fail_with(triton_error("never launched"))
    chosen, reason, warning = choose_working_impl("triton", *SIZES, block_order=True)
    assert (chosen, warning) == ("triton", None)
    assert reason == "as planted; torch.bmm takes every product here, because it copies nothing or moves fewer bytes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_that_work_are_kept(monkeypatch, dtype):
    """The backend of matrix products, under the other name, on the sizes of a training."""
    pytest.importorskip("triton")
    working = SimpleNamespace(**vars(bmm), architecture=lambda device: 80)
    monkeypatch.setattr(passes, "choose_impl", lambda *_: ("triton", "as planted"))
    monkeypatch.setattr(passes, "backend_module", lambda name: {"triton": working}[name])
    assert choose_working_impl("auto", *SIZES[:3], dtype) == ("triton", "as planted", None)


def test_matrix_products_are_not_tried_first():
    assert choose_working_impl("bmm", *SIZES) == ("bmm", "as asked", None)
    assert choose_working_impl("auto", *SIZES)[0] == "bmm"
