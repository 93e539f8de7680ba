"""The earlier place of `ks.product.chain.chain_product`, for one import of ks/training/checks.py."""

from ks.product.chain import chain_product as chain_product
