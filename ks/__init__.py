"""Kronecker-sparse linear chains W ≈ K_1 … K_L: layers, and the study of how their rank limits learning.

The names below are loaded when they are first used, so that a script can handle signals before torch is imported.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ks.allocation.plan_model import plan_model
    from ks.bounds.factorize import factorize
    from ks.bounds.floors import loss_floor
    from ks.compression.apply import compress
    from ks.compression.in_order import compress_in_order
    from ks.compression.saved_model import load_compressed, save_compressed
    from ks.inputs.collect import collect_input_moments
    from ks.inputs.moments_file import InputMoments
    from ks.layer import KSLinear, load
    from ks.patterns import Chain, Pattern, make_chain
    from ks.product.operator import chain_product

__version__ = "0.1.0"
__all__ = [
    "Chain",
    "InputMoments",
    "KSLinear",
    "Pattern",
    "chain_product",
    "collect_input_moments",
    "compress",
    "compress_in_order",
    "factorize",
    "load",
    "load_compressed",
    "loss_floor",
    "make_chain",
    "plan_model",
    "save_compressed",
]

_HOMES = {
    "Chain": "ks.patterns",
    "InputMoments": "ks.inputs.moments_file",
    "KSLinear": "ks.layer",
    "Pattern": "ks.patterns",
    "chain_product": "ks.product.operator",
    "collect_input_moments": "ks.inputs.collect",
    "compress": "ks.compression.apply",
    "compress_in_order": "ks.compression.in_order",
    "factorize": "ks.bounds.factorize",
    "load": "ks.layer",
    "load_compressed": "ks.compression.saved_model",
    "loss_floor": "ks.bounds.floors",
    "make_chain": "ks.patterns",
    "plan_model": "ks.allocation.plan_model",
    "save_compressed": "ks.compression.saved_model",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'ks' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
