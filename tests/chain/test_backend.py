"""The choice of a backend: what runs here, and what a user is told."""

import importlib.util

import pytest
import torch

from ks.chain.backend import choose_impl
from ks.errors import UsageError

CARD = torch.device("cuda")


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
