"""The key-value cache in pages, and attention over it: by the device's own path.

    one page: [layers, 2, size, kv_heads, head_dim]      keys (0) and values (1) of `size` tokens in every layer
    token t of a sequence lives in page `pages[t // size]`, place `t % size`

A page is one stretch of the device memory (memory.py). It is cleared before a sequence fills it: nothing of an earlier
owner, not even a NaN behind a mask, reaches a later one. A full page may be read by sequences of the same user and
version (prefix.py), and is not written again meanwhile.
"""

from collections.abc import Sequence

import torch

from persona.engine.kernels import reference
from persona.engine.kernels.choice import Kernels, kernels
from persona.engine.kernels.reference import DecodeRows, Piece, PromptGroups, PromptRows
from persona.engine.memory import Memory
from persona.engine.shape import Shape


class KvCache:
    """The device memory, seen as pages of `size` tokens: no memory of its own."""

    def __init__(self, memory: Memory, shape: Shape, size: int, dtype: torch.dtype) -> None:
        assert memory.page_bytes == self.page_bytes(shape, size, dtype)
        self.memory = memory
        cells, layers = memory.bytes.view(dtype), range(shape.layers)
        self.size, self.stride = size, shape.layers * 2 * size  # stride: rows of one token from page to page
        self._pages = cells.view(-1, shape.layers, 2, size, shape.kv_heads, shape.head_dim)
        self._read = [(self._pages[:, layer, 0], self._pages[:, layer, 1]) for layer in layers]
        # For writing: rows of one token, from where the layer's keys or values of page 0 begin.
        rows = cells.view(-1, shape.kv_heads, shape.head_dim)
        self._write = [(rows[2 * layer * size :], rows[(2 * layer + 1) * size :]) for layer in layers]

    @staticmethod
    def page_bytes(shape: Shape, size: int, dtype: torch.dtype) -> int:
        return 2 * shape.layers * size * shape.kv_heads * shape.head_dim * dtype.itemsize

    def clear(self, pages: Sequence[int]) -> None:
        """Zero `pages` for a new owner."""
        self._pages[list(pages)] = 0

    def slot(self, page: int, place: int) -> int:
        """Where `write` puts the token at that place."""
        return page * self.stride + place

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [tokens, kv_heads, dim] into `slots` [tokens]."""
        keys, values = self._write[layer]
        keys.index_copy_(0, slots, k)
        values.index_copy_(0, slots, v)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer: views [pages, size, kv_heads, dim]."""
        return self._read[layer]


def decode(q: torch.Tensor, cache: KvCache, layer: int, rows: DecodeRows) -> torch.Tensor:
    """q: [rows, heads, dim] → [rows, heads · dim]."""
    quick = kernels(q.device.type)
    attend = reference.attend if quick is None else quick.attend
    return attend(q, *cache.layer(layer), rows)


def arranged(pieces: list[Piece], size: int, device: torch.device) -> PromptRows | PromptGroups:
    """`pieces` as this device's path takes them. size: tokens of a page."""
    return PromptGroups.of(pieces, size, device) if kernels(device.type) is None else PromptRows.of(pieces, device)


def prompts(q: torch.Tensor, cache: KvCache, layer: int, rows: PromptRows | PromptGroups) -> torch.Tensor:
    """q: [tokens, heads, dim] → [tokens, heads · dim]. rows: from `arranged`."""
    if isinstance(rows, PromptGroups):
        return reference.attend_prompts(q, *cache.layer(layer), rows)
    quick = kernels(q.device.type)
    assert quick is not None
    return quick.attend_prompts(q, *cache.layer(layer), rows)


def compile_ahead(cache: KvCache, quick: Kernels, shape: Shape, dtype: torch.dtype) -> None:
    """The kernel of prompts, on one token: no step shall wait for a compiler."""
    device = cache.memory.bytes.device
    rows = PromptRows.of([Piece(0, 1, 0, [0])], device)
    q = torch.zeros(1, shape.heads, shape.head_dim, dtype=dtype, device=device)
    quick.attend_prompts(q, *cache.layer(0), rows)
