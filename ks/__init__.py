"""Kronecker-sparse linear chains W ≈ K_1 … K_L: layers, and the study of how their rank limits learning."""

from ks.bounds.factorize import factorize
from ks.bounds.floors import loss_floor
from ks.layer import KSLinear, load
from ks.patterns import Chain, Pattern, make_chain
from ks.product.operator import chain_product

__version__ = "0.1.0"
__all__ = ["Chain", "KSLinear", "Pattern", "chain_product", "factorize", "load", "loss_floor", "make_chain"]
