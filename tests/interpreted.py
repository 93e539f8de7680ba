"""Triton's interpreter, for the tests of the kernels, with a bfloat16 that is right.

As it comes, it truncates to bfloat16 where a GPU rounds, and multiplies the bits as if they were integers.
"""

import contextlib
import importlib
import sys

import numpy as np
import pytest
import torch

from ks.chain import bmm


@contextlib.contextmanager
def interpreter(*names):
    """Import modules anew with kernels that are interpreted, which Triton decides at import; leave no trace of that.

    Yields:
        the modules.
    """

    def take_out():
        found = [name for name in sys.modules if name in names or name.split(".")[0] == "triton"]
        for name in names:  # else `from package import module` finds it there
            package, _, module = name.rpartition(".")
            vars(sys.modules.get(package, bmm)).pop(module, None)
        return {name: sys.modules.pop(name) for name in found if not name.startswith("triton._C")}

    before = take_out()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        mend_bfloat16(patch, importlib.import_module("triton.runtime.interpreter"))
        yield [importlib.import_module(name) for name in names]
    take_out()
    sys.modules.update(before)
    for name in names:
        if name in before:
            package, _, module = name.rpartition(".")
            setattr(sys.modules[package], module, before[name])


def mend_bfloat16(patch, module) -> None:
    """Round conversions to bfloat16, and multiply bfloat16 matrices in float32, in which their products are exact.

    Args:
        patch: a MonkeyPatch.
        module: triton.runtime.interpreter, as it is imported now.
    """
    builder, language = module.InterpreterBuilder, module.tl
    cast, dot = builder.cast_impl, builder.create_dot

    def rounded_cast(self, source, target):
        if (source.dtype.scalar, target.scalar) != (language.float32, language.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16).view(torch.int16)
        return module.TensorHandle(rounded.numpy().view(np.uint16), target.scalar)

    def exact_dot(self, a, b, *others):
        if a.dtype.scalar == language.bfloat16:
            a, b = (cast(self, operand, language.float32) for operand in (a, b))
        return dot(self, a, b, *others)

    patch.setattr(builder, "cast_impl", rounded_cast)
    patch.setattr(builder, "create_dot", exact_dot)
