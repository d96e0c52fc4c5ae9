"""The key-value cache in pages, and attention over it in plain torch: the definition of correct, and the CPU path.

    keys, values: [layers, pages, page, kv_heads, head_dim]
    token t of a sequence lives in page `pages[t // page]`, place `t % page`

A page is cleared before a sequence fills it: nothing of an earlier owner, not even a NaN behind a mask, reaches a later
one. A full page may be read by sequences of the same user and version (prefix.py), and is not written again meanwhile.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from persona.engine.shape import Shape


class KvCache:
    """Device memory for `pages` pages of `size` tokens."""

    def __init__(self, shape: Shape, pages: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        dims = (shape.layers, pages, size, shape.kv_heads, shape.head_dim)
        self.size = size
        self.keys = torch.zeros(dims, dtype=dtype, device=device)
        self.values = torch.zeros(dims, dtype=dtype, device=device)

    @staticmethod
    def page_bytes(shape: Shape, size: int, dtype: torch.dtype) -> int:
        return 2 * shape.layers * size * shape.kv_heads * shape.head_dim * dtype.itemsize

    def clear(self, pages: list[int]) -> None:
        """Zero `pages` for a new owner."""
        self.keys[:, pages] = 0
        self.values[:, pages] = 0

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """k, v: [tokens, kv_heads, dim] into `slots` [tokens] (page · size + place)."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, v)

    def read(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """pages: [rows, n] → k, v: [rows, kv_heads, n · size, dim]."""
        return self._gathered(self.keys[layer], pages), self._gathered(self.values[layer], pages)

    @staticmethod
    def _gathered(pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        found = pool.index_select(0, pages.flatten())  # [rows · n, size, kv_heads, dim]
        return found.view(pages.shape[0], -1, *found.shape[2:]).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows of one token each.

    pages: [rows, n], short rows padded with their own first page · mask: [rows, 1, 1, n · size], True where seen.
    """

    pages: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class PromptRows:
    """One segment of a prompt: rows start…end of the step. mask: [end − start, n · size], True where seen."""

    start: int
    end: int
    pages: torch.Tensor  # [1, n]
    mask: torch.Tensor


def decode(q: torch.Tensor, cache: KvCache, layer: int, rows: DecodeRows) -> torch.Tensor:
    """q: [rows, heads, dim] → [rows, heads · dim]. Query heads of one key head act as that head's query positions."""
    k, v = cache.read(layer, rows.pages)
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[2])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=rows.mask).reshape(q.shape[0], -1)


def prompt(q: torch.Tensor, cache: KvCache, layer: int, rows: PromptRows) -> torch.Tensor:
    """q: [tokens, heads, dim] → [tokens, heads · dim]."""
    k, v = cache.read(layer, rows.pages)
    out = F.scaled_dot_product_attention(q.transpose(0, 1).unsqueeze(0), k, v, attn_mask=rows.mask, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1).reshape(q.shape[0], -1)
