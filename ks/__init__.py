"""Kronecker-sparse linear chains W ≈ K_1 … K_L: layers, and the study of how their rank limits learning.

The names below are loaded when they are first used, so that a script can handle signals before torch is imported.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ks.bounds.factorize import factorize as factorize
    from ks.bounds.floors import loss_floor as loss_floor
    from ks.chain.patterns import Chain as Chain
    from ks.chain.patterns import Pattern as Pattern
    from ks.chain.patterns import make_chain as make_chain
    from ks.chain.product import chain_product as chain_product
    from ks.layer import KSLinear as KSLinear
    from ks.layer import load as load
    from ks.model.allocate import plan_model as plan_model
    from ks.model.apply import compress as compress
    from ks.model.collect import collect_input_moments as collect_input_moments
    from ks.model.in_order import compress_in_order as compress_in_order
    from ks.model.losses import ClassifierLoss as ClassifierLoss
    from ks.model.losses import NextTokenLoss as NextTokenLoss
    from ks.model.losses import RandomDirections as RandomDirections
    from ks.model.losses import sentence_embedding as sentence_embedding
    from ks.model.measure import compare as compare
    from ks.model.measure import measure_loss as measure_loss
    from ks.model.refine import refine as refine
    from ks.model.saved_model import load_compressed as load_compressed
    from ks.model.saved_model import save_compressed as save_compressed
    from ks.moments.metric import LossMetric as LossMetric
    from ks.moments.metric import Metric as Metric
    from ks.moments.moments_file import InputMoments as InputMoments

__version__ = "0.1.0"
_HOMES = {
    "Chain": "ks.chain.patterns",
    "ClassifierLoss": "ks.model.losses",
    "InputMoments": "ks.moments.moments_file",
    "KSLinear": "ks.layer",
    "LossMetric": "ks.moments.metric",
    "Metric": "ks.moments.metric",
    "NextTokenLoss": "ks.model.losses",
    "Pattern": "ks.chain.patterns",
    "RandomDirections": "ks.model.losses",
    "chain_product": "ks.chain.product",
    "collect_input_moments": "ks.model.collect",
    "compare": "ks.model.measure",
    "compress": "ks.model.apply",
    "compress_in_order": "ks.model.in_order",
    "factorize": "ks.bounds.factorize",
    "load": "ks.layer",
    "load_compressed": "ks.model.saved_model",
    "loss_floor": "ks.bounds.floors",
    "make_chain": "ks.chain.patterns",
    "measure_loss": "ks.model.measure",
    "plan_model": "ks.model.allocate",
    "refine": "ks.model.refine",
    "save_compressed": "ks.model.saved_model",
    "sentence_embedding": "ks.model.losses",
}
__all__ = [*_HOMES]  # type checkers read the imports above


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'ks' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
