"""The choice of a backend: what runs here, what is faster on a card, and what a user is told."""

import importlib.util

import pytest
import torch

from ks.errors import UsageError
from ks.patterns import make_chain
from ks.product.backend import check_impl, choose_impl

HERE = (torch.device("cpu"), make_chain(24, 36).patterns(3), 32, torch.float32)
CARD = torch.device("cuda")
DTYPES = {16: torch.float16, 32: torch.float32, 64: torch.float64}


@pytest.fixture
def card(monkeypatch):
    """The rules ask for nothing but the compute capability of a card."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_impl_choice():
    assert choose_impl("auto", *HERE)[0] == "bmm"
    with pytest.raises(UsageError, match="need a CUDA device"):
        choose_impl("triton", *HERE)
    with pytest.raises(UsageError, match="auto, triton, bmm"):
        choose_impl("cublas", *HERE)


@pytest.mark.parametrize(
    ("rank", "bits", "precision", "backend"),
    [
        (64, 16, "ieee", "triton"),
        (2, 32, "ieee", "triton"),
        (64, 32, "ieee", "bmm"),
        (64, 32, "tf32", "triton"),
        (2, 64, "ieee", "bmm"),
    ],
)
def test_the_faster_backend_on_a_card(card, rank, bits, precision, backend):
    pytest.importorskip("triton")
    patterns = make_chain(2048, 4096).patterns(rank)
    chosen, reason = choose_impl("auto", CARD, patterns, 1024, DTYPES[bits], precision)
    assert chosen == backend
    assert reason


@pytest.mark.parametrize("impl", ["triton", "bmm"])
def test_a_backend_that_was_asked_for_is_taken_whichever_is_faster(card, impl):
    pytest.importorskip("triton")
    for dtype in DTYPES.values():
        for rank in (2, 64):
            patterns = make_chain(2048, 4096).patterns(rank)
            assert choose_impl(impl, CARD, patterns, 1024, dtype) == (impl, "as asked")


def test_an_old_card_gets_matrix_products(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    chosen, reason = choose_impl("auto", CARD, *HERE[1:])
    assert chosen == "bmm"
    assert "8.0" in reason
    with pytest.raises(UsageError, match=r"capability 8\.0 or more; use 'auto' or 'bmm'"):
        check_impl("triton", CARD)


def test_without_triton_there_are_matrix_products(card, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert choose_impl("auto", CARD, *HERE[1:]) == ("bmm", "Triton is not installed")
    with pytest.raises(UsageError, match="Triton is not installed"):
        check_impl("triton", CARD)
    check_impl("bmm", CARD)
