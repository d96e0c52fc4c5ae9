"""Which path a device takes, chosen here and nowhere else.

On CUDA the kernels of this package, if Triton is there (torch's CUDA build brings it) and starts; its interpreter is
for tests. Everywhere else plain torch, and nothing imports Triton; on a CPU a whole step may be compiled code in its
place (native.py).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch

from persona.engine.kernels.reference import DecodeRows, PromptRows

AMPERE = (8, 0)  # the first that multiplies bf16


@dataclass(frozen=True, slots=True)
class Kernels:
    """Signatures are those of reference.py, but for prompts, which come in blocks, and adapters, which are read by
    address: see triton_lora.py."""

    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, DecodeRows], torch.Tensor]
    attend_prompts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, PromptRows], torch.Tensor]
    adapt: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    adapt_blocks: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
    int4: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    nf4: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


@cache
def kernels(device: str) -> Kernels | None:
    """For a type of device; None: plain torch."""
    there = find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") != "1"
    return triton_kernels() if device == "cuda" and there and _starts() else None


def _starts() -> bool:
    """Whether the GPU multiplies bf16 and Triton reaches it: that compiles its own part of it first, with the machine's
    C compiler."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
        return torch.cuda.get_device_capability() >= AMPERE
    except Exception:  # whatever a compiler or a driver ends in: plain torch computes the same
        return False


@cache
def triton_kernels() -> Kernels:
    """Raises ImportError without Triton."""
    from persona.engine.kernels import triton_attention, triton_fourbit, triton_lora

    return Kernels(
        triton_attention.attend,
        triton_attention.attend_prompts,
        triton_lora.adapt,
        triton_lora.adapt_blocks,
        triton_fourbit.int4,
        triton_fourbit.nf4,
    )
