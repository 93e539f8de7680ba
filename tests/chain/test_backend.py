"""The choice of a backend: what runs here, and one line for what does not."""

import importlib.util
from importlib import import_module

import pytest
import torch

from ks.chain import backend
from ks.chain.backend import choose_impl, choose_working_impl
from ks.chain.patterns import make_chain
from ks.errors import UsageError

CARD = torch.device("cuda")
SIZES = (make_chain(64, 64).patterns(4), 32, torch.device("cpu"), torch.float32)


def on_a_card(monkeypatch, capability=(9, 0), triton=True):
    """The rules ask for nothing but the compute capability, and whether Triton is there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: importlib.util if triton else None)


def test_matrix_products_are_the_default_everywhere(monkeypatch):
    assert choose_impl("auto", torch.device("cpu"))[0] == "bmm"
    assert choose_impl("bmm", torch.device("cpu")) == ("bmm", "as asked")
    on_a_card(monkeypatch)
    chosen, reason = choose_impl("auto", CARD)
    assert (chosen, "no measurement" in reason) == ("bmm", True)


def test_triton_runs_where_it_is_asked_for_and_can(monkeypatch):
    on_a_card(monkeypatch)
    assert choose_impl("triton", CARD) == ("triton", "as asked")


@pytest.mark.parametrize(
    ("impl", "device", "card", "message"),
    [
        ("cublas", "cpu", {}, "auto, triton, bmm"),
        ("triton", "cpu", {}, "need a CUDA device; use 'auto' or 'bmm'"),
        ("triton", "meta", {}, "need a CUDA device"),
        ("triton", "cuda", {"capability": (7, 5)}, r"capability 8\.0 or more; use 'auto' or 'bmm'"),
        ("triton", "cuda", {"triton": False}, "Triton is not installed"),
    ],
)
def test_what_cannot_run_is_one_line(monkeypatch, impl, device, card, message):
    on_a_card(monkeypatch, **card)
    with pytest.raises(UsageError, match=message):
        choose_impl(impl, torch.device(device))


@pytest.mark.parametrize(
    ("message", "printed"),
    [("no such instruction\nin line 7", "no such instruction"), ("", "TritonError")],
    ids=["compiler", "no message"],
)
def test_kernels_that_fail_are_one_line(monkeypatch, message, printed):
    pytest.importorskip("triton")
    error = import_module("triton.errors").TritonError(message)

    def fail(impl, *arguments):
        raise error

    monkeypatch.setattr(backend, "choose_impl", lambda impl, device: (impl, "as asked"))
    monkeypatch.setattr(backend, "_tried", fail)
    with pytest.raises(UsageError, match=rf"'triton': the kernels fail here \({printed}\); use 'auto'"):
        choose_working_impl("triton", *SIZES)


def test_matrix_products_are_not_tried_first(monkeypatch):
    monkeypatch.setattr(backend, "_tried", lambda *_: pytest.fail("tried"))
    assert choose_working_impl("bmm", *SIZES) == ("bmm", "as asked")
    assert choose_working_impl("auto", *SIZES)[0] == "bmm"
