"""The choice of a backend: what runs here, what is faster on a card, and what a user is told."""

import importlib.util

import pytest
import torch

from ks.errors import UsageError
from ks.patterns import make_chain
from ks.product.backend import TritonWins, check_impl, choose_impl

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


WIN = TritonWins(arch=90, bits=16, precision="ieee", batches=(1024, 8192), ranks=(4, 64), gpu="a GPU")


@pytest.mark.parametrize(
    ("batch", "rank", "bits", "precision", "backend"),
    [
        (1024, 4, 16, "ieee", "triton"),
        (8192, 64, 16, "ieee", "triton"),
        (1023, 64, 16, "ieee", "bmm"),
        (8193, 64, 16, "ieee", "bmm"),
        (1024, 3, 16, "ieee", "bmm"),
        (1024, 65, 16, "ieee", "bmm"),
        (1024, 64, 32, "ieee", "bmm"),
        (1024, 64, 16, "tf32", "bmm"),
    ],
)
def test_triton_is_chosen_where_a_measurement_found_it_faster(card, monkeypatch, batch, rank, bits, precision, backend):
    pytest.importorskip("triton")
    monkeypatch.setattr("ks.product.backend.TRITON_WINS", (WIN,))
    patterns = make_chain(2048, 4096).patterns(rank)
    chosen, reason = choose_impl("auto", CARD, patterns, batch, DTYPES[bits], precision)
    assert chosen == backend
    assert ("a GPU" in reason) == (backend == "triton")


@pytest.mark.parametrize(("capability", "backend"), [((9, 0), "triton"), ((10, 0), "bmm"), ((8, 0), "bmm")])
def test_a_measurement_speaks_for_its_architecture_alone(monkeypatch, capability, backend):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("ks.product.backend.TRITON_WINS", (WIN,))
    assert choose_impl("auto", CARD, make_chain(2048, 4096).patterns(16), 1024, torch.float16)[0] == backend


def test_without_a_measurement_there_are_matrix_products(card):
    pytest.importorskip("triton")
    chosen, reason = choose_impl("auto", CARD, make_chain(2048, 4096).patterns(64), 25088, torch.float16)
    assert chosen == "bmm"
    assert "no measurement" in reason


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
