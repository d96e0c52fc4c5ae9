"""Adapters in one call, two launches, whoever's and of whatever ranks: y += (x A) B, for decode rows and for prompts.

After Punica's gathered products (BGMV, SGMV; Chen et al. 2023). Nothing is stacked or padded: a row, or a block of a
prompt's rows, follows addresses.

    table int64 [rows, 3]      address of A [in, rank] · address of B [rank, out] · rank, 0 for a row without an adapter
    shrink                     row × CHUNK inputs × LANES ranks → narrow fp32 [chunks, rows, RANKS]
    expand                     row × OUTPUTS outputs, over the chunks' sum

The same for a prompt reads its factors once for a block of rows, and multiplies in tiles:

    table int64 [blocks, 3]    as above, for each block · blocks int32 [blocks, 2]: its first row, its rows (≤ BLOCK)
    narrow fp32                [chunks, blocks, BLOCK, RANKS]

Programs for ranks that a row does not have end at once, and lanes beyond its rank read nothing. Decode rows of one
adapter should be neighbours: the second finds its factors in the cache.
"""

import torch
import triton
import triton.language as tl

from persona.engine.kernels.reference import BLOCK
from persona.engine.kernels.triton_product import operand

RANKS = 192  # the largest rank: three modules of 64 in one projection
LANES = 16  # ranks at a time
CHUNK, INPUTS = 1024, 64  # inputs of a program, and of one of its rounds
OUTPUTS = 128  # of a program


@triton.jit(do_not_specialize_on_alignment=["table"])
def _shrink(
    x, table, narrow, x_row, inputs,
    RANKS: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0), tl.program_id(1)
    rank = tl.load(table + row * 3 + 2).to(tl.int32)
    ranks = tl.program_id(2) * LANES + tl.arange(0, LANES)
    if tl.program_id(2) * LANES >= rank:
        return
    a = tl.load(table + row * 3).to(tl.pointer_type(x.dtype.element_ty))
    total = tl.zeros([LANES], tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, inputs), INPUTS):
        at = first + tl.arange(0, INPUTS)
        value = tl.load(x + row * x_row + at, mask=at < inputs, other=0.0).to(tl.float32)
        both = (at < inputs)[:, None] & (ranks < rank)[None, :]
        factor = tl.load(a + at[:, None] * rank + ranks[None, :], mask=both, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * factor, 0)
    tl.store(narrow + (chunk * tl.num_programs(0) + row) * RANKS + ranks, total, mask=ranks < rank)


@triton.jit(do_not_specialize_on_alignment=["table"])
def _expand(narrow, table, y, y_row, outputs, chunks, RANKS: tl.constexpr, LANES: tl.constexpr, OUTPUTS: tl.constexpr):
    row = tl.program_id(0)
    rank = tl.load(table + row * 3 + 2).to(tl.int32)
    if rank == 0:
        return
    b = tl.load(table + row * 3 + 1).to(tl.pointer_type(y.dtype.element_ty))
    at = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS], tl.float32)
    for first in range(0, rank, LANES):
        ranks = first + tl.arange(0, LANES)
        value = tl.zeros([LANES], tl.float32)
        for chunk in range(chunks):
            there = narrow + (chunk * tl.num_programs(0) + row) * RANKS + ranks
            value += tl.load(there, mask=ranks < rank, other=0.0)
        both = (ranks < rank)[:, None] & (at < outputs)[None, :]
        factor = tl.load(b + ranks[:, None] * outputs + at[None, :], mask=both, other=0.0).to(tl.float32)
        total += tl.sum(value[:, None] * factor, 0)
    place = y + row * y_row + at
    before = tl.load(place, mask=at < outputs, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=at < outputs)


def adapt(x: torch.Tensor, y: torch.Tensor, table: torch.Tensor) -> None:
    """x: [rows, in] · y: [rows, out], changed in place · table: [rows, 3]. Factors are contiguous and of x's dtype."""
    assert x.dtype == y.dtype
    assert x.stride(-1) == y.stride(-1) == 1
    assert table.is_contiguous()
    (count, inputs), outputs = x.shape, y.shape[1]
    chunks = triton.cdiv(inputs, CHUNK)
    narrow = torch.empty(chunks, count, RANKS, dtype=torch.float32, device=x.device)
    _shrink[count, chunks, RANKS // LANES](
        x, table, narrow, x.stride(0), inputs, RANKS=RANKS, LANES=LANES, CHUNK=CHUNK, INPUTS=INPUTS
    )
    _expand[count, triton.cdiv(outputs, OUTPUTS)](
        narrow, table, y, y.stride(0), outputs, chunks, RANKS=RANKS, LANES=LANES, OUTPUTS=OUTPUTS
    )


@triton.jit(do_not_specialize_on_alignment=["table"])
def _shrink_blocks(
    x, table, blocks, narrow, x_row, inputs,
    RANKS: tl.constexpr, LANES: tl.constexpr, CHUNK: tl.constexpr, INPUTS: tl.constexpr, BLOCK: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    block, chunk = tl.program_id(0), tl.program_id(1)
    rank = tl.load(table + block * 3 + 2).to(tl.int32)
    ranks = tl.program_id(2) * LANES + tl.arange(0, LANES)
    if tl.program_id(2) * LANES >= rank:
        return
    a = tl.load(table + block * 3).to(tl.pointer_type(x.dtype.element_ty))
    lines = tl.arange(0, BLOCK)
    row = tl.load(blocks + block * 2) + lines
    there = lines < tl.load(blocks + block * 2 + 1)
    total = tl.zeros([BLOCK, LANES], tl.float32)
    for first in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, inputs), INPUTS):
        at = first + tl.arange(0, INPUTS)
        value = tl.load(x + row[:, None] * x_row + at[None, :], mask=there[:, None] & (at < inputs)[None, :], other=0.0)
        both = (at < inputs)[:, None] & (ranks < rank)[None, :]
        factor = tl.load(a + at[:, None] * rank + ranks[None, :], mask=both, other=0.0)
        total = tl.dot(value.to(TYPE), factor.to(TYPE), total, input_precision="ieee")
    first_line = (chunk * tl.num_programs(0) + block) * BLOCK
    place = narrow + (first_line + lines[:, None]) * RANKS + ranks[None, :]
    tl.store(place, total, mask=there[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize_on_alignment=["table"])
def _expand_blocks(
    narrow, table, blocks, y, y_row, outputs, chunks,
    RANKS: tl.constexpr, LANES: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rank = tl.load(table + block * 3 + 2).to(tl.int32)
    if rank == 0:
        return
    b = tl.load(table + block * 3 + 1).to(tl.pointer_type(y.dtype.element_ty))
    lines = tl.arange(0, BLOCK)
    row = tl.load(blocks + block * 2) + lines
    there = lines < tl.load(blocks + block * 2 + 1)
    at = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    total = tl.zeros([BLOCK, OUTPUTS], tl.float32)
    for first in range(0, rank, LANES):
        ranks = first + tl.arange(0, LANES)
        value = tl.zeros([BLOCK, LANES], tl.float32)
        for chunk in range(chunks):
            first_line = (chunk * tl.num_programs(0) + block) * BLOCK
            place = narrow + (first_line + lines[:, None]) * RANKS + ranks[None, :]
            value += tl.load(place, mask=there[:, None] & (ranks < rank)[None, :], other=0.0)
        both = (ranks < rank)[:, None] & (at < outputs)[None, :]
        factor = tl.load(b + ranks[:, None] * outputs + at[None, :], mask=both, other=0.0).to(tl.float32)
        total = tl.dot(value, factor, total, input_precision="ieee")
    both = there[:, None] & (at < outputs)[None, :]
    place = y + row[:, None] * y_row + at[None, :]
    before = tl.load(place, mask=both, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=both)


def adapt_blocks(x: torch.Tensor, y: torch.Tensor, table: torch.Tensor, blocks: torch.Tensor) -> None:
    """x: [rows, in] · y: [rows, out], changed in place · table: [blocks, 3] · blocks: [blocks, 2], int32.

    Rows of no block stay as they are. Factors are contiguous and of x's dtype.
    """
    assert x.dtype == y.dtype
    assert x.stride(-1) == y.stride(-1) == 1
    assert table.is_contiguous()
    inputs, outputs, count = x.shape[1], y.shape[1], len(blocks)
    chunks = triton.cdiv(inputs, CHUNK)
    narrow = torch.empty(chunks, count * BLOCK, RANKS, dtype=torch.float32, device=x.device)
    _shrink_blocks[count, chunks, RANKS // LANES](
        x, table, blocks, narrow, x.stride(0), inputs,
        RANKS=RANKS, LANES=LANES, CHUNK=CHUNK, INPUTS=INPUTS, BLOCK=BLOCK, TYPE=operand(x.dtype),
    )  # fmt: skip
    _expand_blocks[count, triton.cdiv(outputs, OUTPUTS)](
        narrow, table, blocks, y, y.stride(0), outputs, chunks,
        RANKS=RANKS, LANES=LANES, OUTPUTS=OUTPUTS, BLOCK=BLOCK,
    )  # fmt: skip
