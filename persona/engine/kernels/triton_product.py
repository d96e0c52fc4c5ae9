"""What matrix products inside kernels have in common."""

import os

import torch
import triton.language as tl

LEAST = 16  # rows and columns of the smallest product that every GPU has


def operand(dtype: torch.dtype) -> tl.dtype:
    """The type in which values of `dtype` are multiplied: their own.

    Not so in Triton's interpreter (3.9), which multiplies the bits of bf16 as integers: there they go in as fp32,
    already rounded. Either way products are summed in fp32.
    """
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
