"""bfloat16 in Triton's interpreter, which truncates where a GPU rounds, and multiplies the bits as integers."""

import numpy as np
import torch


def mend_bfloat16(patch, interpreter) -> None:
    """Round conversions to bfloat16, and multiply bfloat16 matrices in float32, in which their products are exact.

    Args:
        patch: a MonkeyPatch.
        interpreter: the module triton.runtime.interpreter, as it is imported now.
    """
    builder, language = interpreter.InterpreterBuilder, interpreter.tl
    cast, dot = builder.cast_impl, builder.create_dot

    def rounded_cast(self, source, target):
        if (source.dtype.scalar, target.scalar) != (language.float32, language.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16).view(torch.int16)
        return interpreter.TensorHandle(rounded.numpy().view(np.uint16), target.scalar)

    def exact_dot(self, a, b, *others):
        if a.dtype.scalar == language.bfloat16:
            a, b = (cast(self, operand, language.float32) for operand in (a, b))
        return dot(self, a, b, *others)

    patch.setattr(builder, "cast_impl", rounded_cast)
    patch.setattr(builder, "create_dot", exact_dot)
