"""The vocabulary's vectors, embedding and head alike: [vocab, hidden].

As the checkpoint has them: in bf16, or in eight bits (a GGUF's Q8_0), which are written out in bf16 where they are
used. On a CPU without compiled steps they are written out once, in fp32.

    codes int8 [vocab, hidden] · scales fp32 [vocab, hidden / 32], exact in fp16
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch

GROUP = 32
Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


class Words:
    """`words[which]`: the vectors of a slice, or of a tensor of indices; those held in eight bits in bf16."""

    def __init__(self, values: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """values: numbers, or codes if there are scales."""
        self.values, self.scales = values, scales
        self.writer: Callable[[slice], torch.Tensor] | None = None  # compiled code that makes `floats`

    @property
    def dtype(self) -> torch.dtype:
        """Of the vectors."""
        return self.values.dtype if self.scales is None else torch.bfloat16

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, which: slice | torch.Tensor) -> torch.Tensor:
        found = self.values[which]
        if self.scales is None:
            return found
        scales = self.scales[which].unsqueeze(-1)
        return (found.view(*scales.shape[:-1], GROUP) * scales).view(found.shape).bfloat16()

    def floats(self, which: slice) -> torch.Tensor:
        """The vectors from `which.start` to `which.stop` in fp32, until the next call."""
        return self[which].float() if self.writer is None else self.writer(which)

    def nbytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def written(self, device: str, dtype: torch.dtype) -> "Words":
        """As numbers of that type there."""
        return Words(self[:].to(device, dtype))


def load(parts: Mapping[str, torch.Tensor], name: str) -> Words:
    """What a prepared model has under `name`."""
    codes = parts.get(f"{name}.codes")
    return Words(parts[name]) if codes is None else Words(codes, parts[f"{name}.scales"].float())


def from_q8_0(blocks: Array) -> dict[str, torch.Tensor]:
    """blocks: uint8 [vocab, hidden / 32 · 34], each an fp16 scale and 32 codes → the parts that are stored."""
    rows = np.ascontiguousarray(blocks).reshape(len(blocks), -1, 2 + GROUP)
    scales = np.ascontiguousarray(rows[:, :, :2]).view(np.float16)[:, :, 0]
    codes = np.ascontiguousarray(rows[:, :, 2:]).view(np.int8).reshape(len(blocks), -1)
    return {"codes": torch.from_numpy(codes), "scales": torch.from_numpy(scales.copy())}
