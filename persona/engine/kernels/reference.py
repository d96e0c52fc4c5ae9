"""What the kernels compute, in plain torch: the definition of correct. Paged attention is also what a CPU runs where no
step is compiled (native.py).

    keys, values of one layer: [pages, size, kv_heads, dim], any strides
    token t of a row lives in page `pages[row, t // size]`, place `t % size`

Beside a row's length nothing of a page counts, not even a NaN. What plain torch has quicker forms for (products of
stacked adapters in lora.py, torch's int4 kernel in weights.py) stands here in its shortest form, to be compared with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from persona.engine import quantize

FEW = 64  # rows up to which 4-bit products go through kernels
BLOCK = 32  # rows of a prompt that a kernel takes together
QUERIES = 64  # the same for attention
# QLoRA (Dettmers et al. 2023), appendix E: the values of NF4's sixteen codes.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Rows of one token each.

    pages: [rows, n], short rows padded with any page · lengths: [rows], tokens seen, at least 1 ·
    mask: [rows, 1, 1, n · size], True where seen.
    """

    pages: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, pages: torch.Tensor, lengths: torch.Tensor, size: int) -> "DecodeRows":
        seen = torch.arange(pages.shape[1] * size, device=lengths.device) < lengths[:, None]
        return cls(pages, lengths, seen[:, None, None, :])


class Piece(NamedTuple):
    """Of a prompt: rows start…end of the step's prompts, the first of them token `first` of its sequence."""

    start: int
    end: int
    first: int
    pages: Sequence[int]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Pieces of prompts, a few rows of one piece at a time.

    pages: [pieces, n], short ones padded with any page · blocks: int32 [blocks, 4]: first row, rows (≤ QUERIES),
    position of the first, piece
    """

    pages: torch.Tensor
    blocks: torch.Tensor

    @classmethod
    def of(cls, pieces: list[Piece], device: torch.device) -> "PromptRows":
        blocks = [
            (at, min(QUERIES, piece.end - at), piece.first + at - piece.start, number)
            for number, piece in enumerate(pieces)
            for at in range(piece.start, piece.end, QUERIES)
        ]
        return cls(_pages(pieces, device), torch.tensor(blocks, dtype=torch.int32, device=device))


class Alike(NamedTuple):
    """Pieces of much the same size, each padded to the longest and its keys to the most pages.

    pages: [pieces, n] · rows: [pieces, longest], a piece's last row for what it lacks · own: the same, True where it
    lacks nothing · mask: [pieces, 1, longest, n · size], True where seen
    """

    pages: torch.Tensor
    rows: torch.Tensor
    own: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, pieces: list[Piece], size: int, device: torch.device) -> "Alike":
        pages = _pages(pieces, device)
        starts, ends, firsts = torch.tensor([piece[:3] for piece in pieces], device=device).unsqueeze(2).unbind(1)
        filled = starts + torch.arange(int((ends - starts).max()), device=device)
        rows = torch.minimum(filled, ends - 1)
        seen = torch.arange(pages.shape[1] * size, device=device) <= (rows - starts + firsts)[:, :, None]
        return cls(pages, rows, filled < ends, seen.unsqueeze(1))


@dataclass(frozen=True, slots=True)
class PromptGroups:
    """Pieces of prompts for plain torch: as many products as there are sizes, by powers of two, not pieces.

    places: [tokens], of each row among the groups' rows, one group after the other
    """

    groups: list[Alike]
    places: torch.Tensor

    @classmethod
    def of(cls, pieces: list[Piece], size: int, device: torch.device) -> "PromptGroups":
        sizes: dict[tuple[int, int], list[Piece]] = {}
        for piece in pieces:
            sizes.setdefault((_power(piece.end - piece.start), _power(len(piece.pages))), []).append(piece)
        groups = [Alike.of(some, size, device) for some in sizes.values()]
        rows = torch.cat([group.rows.flatten() for group in groups])
        own = torch.cat([group.own.flatten() for group in groups])
        places = torch.empty(max(piece.end for piece in pieces), dtype=torch.int64, device=device)
        places[rows[own]] = own.nonzero().flatten()
        return cls(groups, places)


def _pages(pieces: list[Piece], device: torch.device) -> torch.Tensor:
    """[pieces, n]: short ones padded with their first page."""
    most = max(len(piece.pages) for piece in pieces)
    pages = [[*piece.pages, *[piece.pages[0]] * most][:most] for piece in pieces]
    return torch.tensor(pages, dtype=torch.int64, device=device)


def _power(number: int) -> int:
    return (number - 1).bit_length()


def gathered(pool: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """pool: [pages, size, kv_heads, dim] · pages: [rows, n] → [rows, kv_heads, n · size, dim]."""
    found = pool.index_select(0, pages.flatten())  # [rows · n, size, kv_heads, dim]
    return found.view(pages.shape[0], -1, *found.shape[2:]).transpose(1, 2)


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: DecodeRows) -> torch.Tensor:
    """q: [rows, heads, dim] → [rows, heads · dim]. Query heads of one key head act as that head's query positions."""
    k, v = gathered(keys, rows.pages), gathered(values, rows.pages)
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[2])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=rows.mask).reshape(q.shape[0], -1)


def attend_prompts(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: PromptGroups) -> torch.Tensor:
    """q: [tokens, heads, dim] → [tokens, heads · dim]. Each token sees those before it in its sequence, and itself."""
    parts = []
    for group in rows.groups:
        k, v = gathered(keys, group.pages), gathered(values, group.pages)
        query = q[group.rows].transpose(1, 2)
        found = F.scaled_dot_product_attention(query, k, v, attn_mask=group.mask, enable_gqa=True)
        parts.append(found.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[rows.places].flatten(1)


def adapt(x: torch.Tensor, y: torch.Tensor, pairs: Sequence[tuple[torch.Tensor, torch.Tensor] | None]) -> None:
    """x: [rows, in] · y: [rows, out], changed in place · pairs: A [in, rank] and B [rank, out] of each row, or None."""
    for row, pair in enumerate(pairs):
        if pair is not None:
            y[row] += (x[row] @ pair[0]) @ pair[1]


def int4(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x: [rows, in] · codes and scales as in quantize.py → [rows, out]."""
    return x @ quantize.int4_dense(quantize.unpack_nibbles(codes), scales).t().to(x.dtype)


def nf4(x: torch.Tensor, data: torch.Tensor, absmax: torch.Tensor, outputs: int) -> torch.Tensor:
    """x: [rows, in] · bytes and absmax as in quantize.py → [rows, outputs]."""
    return x @ nf4_dense(data, absmax, outputs).t().to(x.dtype)


def nf4_dense(data: torch.Tensor, absmax: torch.Tensor, outputs: int) -> torch.Tensor:
    """bytes uint8 [out·in/2, 1], the even column in the high nibble · absmax [out·in/64] → fp32 [outputs, in]."""
    codes = torch.cat([data >> 4, data & 15], 1).view(-1, quantize.NF4_BLOCK)
    table = torch.tensor(NF4, device=data.device)
    return (table[codes.long()] * absmax[:, None]).view(outputs, -1)
