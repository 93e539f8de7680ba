"""The backend of the chain product, batched matrix products or Triton kernels: which one runs, and why."""

import importlib.util
import os
from types import ModuleType

import torch

from ks.errors import UsageError
from ks.patterns import Pattern
from ks.product import bmm

IMPLS = ("auto", "triton", "bmm")
PRECISIONS = ("ieee", "tf32x3", "tf32")  # of float32 products


def choose_impl(
    impl: str, device: torch.device, patterns, batch: int, dtype: torch.dtype, precision: str = "ieee"
) -> tuple[str, str]:
    """Resolve an implementation to a backend that runs here.

    Args:
        impl: 'auto', 'triton' or 'bmm'.
        device: of x and of the values.
        patterns: of the chain, output side first.
        batch: number of samples.
        dtype: of x.
        precision: of float32 products, one of `PRECISIONS`.
    Returns:
        (backend, reason).
    Raises:
        UsageError: unknown name, or a backend that cannot run here.
    """
    if impl not in IMPLS:
        raise UsageError(f"impl {impl!r}: choose one of {', '.join(IMPLS)}")
    if impl == "bmm":
        return "bmm", "as asked"
    missing = _why_no_triton(device)
    if impl == "triton":
        if missing:
            raise UsageError(f"impl 'triton': {missing}; use 'auto' or 'bmm'")
        return "triton", "as asked"
    if device.type != "cuda" or missing:
        return "bmm", missing or "the interpreter of Triton is for tests"
    return _faster_backend(tuple(patterns), batch, dtype.itemsize * 8, precision)


def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "Triton kernels need a CUDA device"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 or more"
    return None


def check_impl(impl: str, device: torch.device) -> None:
    """Raise UsageError, with the reason, unless the backend `impl` can run on `device`."""
    choose_impl(impl, device, (Pattern(1, 1, 1, 1),), 1, torch.float32)


def _faster_backend(patterns, batch: int, bits: int, precision: str) -> tuple[str, str]:
    """Return the faster backend for a chain on a GPU of compute capability 8.0 or more, and the reason."""
    if bits == 64:
        return "bmm", "float64 goes to the vendor's library"
    if bits == 32 and precision == "ieee":
        values = sum(pattern.numel for pattern in patterns)
        moved = batch * (patterns[0].rows + patterns[-1].cols) + values
        intensity = 2 * batch * values / (4 * moved)
        if intensity > 8:
            return "bmm", f"IEEE float32 at {intensity:.0f} operations a byte is bound by arithmetic"
    return "triton", "one pass over the activations per factor, without copies"


def backend_module(name: str) -> ModuleType:
    """Return the module with `apply_factor` and `values_gradient`; Triton is imported only where it is used."""
    if name == "bmm":
        return bmm
    from ks.product import triton_kernels

    return triton_kernels
