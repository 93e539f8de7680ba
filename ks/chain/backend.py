"""The backend of the chain product, torch.bmm or the Triton kernels: which one runs, and why."""

import importlib.util
import os
from types import ModuleType

import torch

from ks.chain import bmm
from ks.errors import UsageError

IMPLS = ("auto", "triton", "bmm")
PRECISIONS = ("ieee", "tf32")  # of float32 products


def choose_impl(impl: str, device: torch.device) -> tuple[str, str]:
    """Resolve an implementation to a backend that runs here.

    Args:
        impl: 'auto', 'triton' or 'bmm'.
        device: of x and of the values.
    Returns:
        (backend, reason).
    Raises:
        UsageError: unknown name, or a backend that cannot run here.
    """
    if impl not in IMPLS:
        raise UsageError(f"impl {impl!r}: choose one of {', '.join(IMPLS)}")
    if impl == "auto":
        return "bmm", "no measurement says that the Triton kernels are faster"
    missing = _why_no_triton(device) if impl == "triton" else None
    if missing:
        raise UsageError(f"impl 'triton': {missing}; use 'auto' or 'bmm'")
    return impl, "as asked"


def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda":
        old = torch.cuda.get_device_capability(device) < (8, 0)
        return "the kernels need compute capability 8.0 or more" if old else None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return None if interpreted and device.type == "cpu" else "the kernels need a CUDA device"


def check_impl(impl: str, device: torch.device) -> None:
    """Raise UsageError, with the reason, unless the backend `impl` can run on `device`."""
    choose_impl(impl, device)


def backend_module(name: str) -> ModuleType:
    """Return the module with `apply_factor` and `values_gradient`; Triton is imported only where it is used."""
    if name == "bmm":
        return bmm
    from ks.chain import triton_kernels

    return triton_kernels
