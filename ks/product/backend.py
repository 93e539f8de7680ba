"""The backend of the chain product, batched matrix products or Triton kernels: which one runs, and why."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType

import torch

from ks.errors import UsageError
from ks.patterns import Pattern, chainability
from ks.product import bmm

IMPLS = ("auto", "triton", "bmm")
PRECISIONS = ("ieee", "tf32x3", "tf32")  # of float32 products


@dataclass(frozen=True)
class TritonWins:
    """Chains for which a measurement on a GPU found Triton faster than torch.bmm.

    arch: ten times the compute capability. bits, precision: of the products. batches, ranks: from the least to the
    largest, both included; the rank is the largest chainability number of two neighbours. gpu: name of the GPU.
    """

    arch: int
    bits: int
    precision: str
    batches: tuple[int, int]
    ranks: tuple[int, int]
    gpu: str

    def covers(self, patterns: Sequence[Pattern], batch: int, *, arch: int, bits: int, precision: str) -> bool:
        """Return whether the measurement speaks for a chain on a batch."""
        ranks = [chainability(*pair) for pair in pairwise(patterns)]
        measured = (arch, bits, precision) == (self.arch, self.bits, self.precision)
        inside = self.batches[0] <= batch <= self.batches[1]
        return measured and inside and all(rank and self.ranks[0] <= rank <= self.ranks[1] for rank in ranks)


TRITON_WINS: tuple[TritonWins, ...] = ()  # nothing has been measured on a GPU yet


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
    major, minor = torch.cuda.get_device_capability(device)
    return _faster_backend(tuple(patterns), batch, dtype.itemsize * 8, precision, 10 * major + minor)


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


def _faster_backend(patterns, batch: int, bits: int, precision: str, arch: int) -> tuple[str, str]:
    """Return the faster backend for a chain on a GPU, as far as it was measured, and the reason."""
    for win in TRITON_WINS:
        if win.covers(patterns, batch, arch=arch, bits=bits, precision=precision):
            return "triton", f"measured faster than torch.bmm on {win.gpu}"
    return "bmm", "no measurement says that Triton is faster on this GPU, at this size and dtype"


def backend_module(name: str) -> ModuleType:
    """Return the module with `apply_factor` and `values_gradient`; Triton is imported only where it is used."""
    if name == "bmm":
        return bmm
    from ks.product import triton_kernels

    return triton_kernels
