"""The backend of the chain product, torch.bmm or the Triton kernel: which one runs, why, and whether it works here."""

import importlib.util
import os
from collections.abc import Sequence
from subprocess import CalledProcessError

import torch

from ks.chain.bmm import empty_values
from ks.chain.passes import ChainPasses
from ks.chain.patterns import Pattern
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
        return "bmm", "no measurement says that the Triton kernel is faster"
    if impl == "triton" and (missing := _why_no_triton(device)):
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


def choose_working_impl(
    impl: str, patterns: Sequence[Pattern], batch: int, device: torch.device, dtype: torch.dtype, **settings
) -> tuple[str, str]:
    """Choose a backend as `choose_impl` does, and compare the Triton kernel with torch.bmm on random data.

    Args:
        impl: 'auto', 'triton' or 'bmm'.
        patterns, settings: arguments of `ChainPasses`.
        batch, device, dtype: of the random data.
    Returns:
        (backend, reason).
    Raises:
        UsageError: 'triton' was asked for, and it fails or gives other numbers.
    """
    chosen, reason = choose_impl(impl, device)
    if chosen == "bmm":
        return chosen, reason
    from triton.errors import TritonError

    try:
        theirs, ours = (_tried(name, patterns, batch, device, dtype, settings) for name in ("bmm", chosen))
    except torch.OutOfMemoryError:
        raise
    except (TritonError, RuntimeError, CalledProcessError) as error:  # a missing C compiler is a RuntimeError
        failure = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"impl 'triton': the kernels fail here ({failure}); use 'auto' or 'bmm'") from error
    difference = max(((mine - its).norm() / its.norm()).item() for mine, its in zip(ours, theirs))
    if not difference < 16 * max(torch.finfo(dtype).eps, 2**-11 if settings.get("precision") == "tf32" else 0):
        raise UsageError(f"impl 'triton': the kernels are wrong here, by {difference:.1g} of a product; use 'bmm'")
    return chosen, reason


def _tried(impl: str, patterns, batch: int, device, dtype, settings: dict) -> list[torch.Tensor]:
    """Return all results of both passes on random data."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    passes = ChainPasses(patterns, impl=impl, **settings)
    values = [empty_values(p, device, dtype).copy_(normal(*p) * p.c**-0.5) for p in passes.patterns]
    x, gradient = (normal(batch, size) for size in (passes.patterns[-1].cols, passes.patterns[0].rows))
    if passes.batch_last:
        x, gradient = x.t().contiguous(), gradient.t().contiguous()
    y, *inner = passes.forward(x, values)
    return [result.float() for result in (y, *passes.backward(gradient, x, values, inner, for_x=True))]
