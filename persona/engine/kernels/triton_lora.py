"""Adapters of decode rows in two launches, whatever their ranks: y += (x A) B, each row with its own A and B or none.

After Punica's gathered products (BGMV, Chen et al. 2023). Nothing is stacked or padded: a row follows addresses.

    table int64 [rows, 3]      address of A [in, rank] · address of B [rank, out] · rank, 0 for a row without an adapter
    shrink                     row × CHUNK inputs × LANES ranks → narrow fp32 [chunks, rows, RANKS]
    expand                     row × OUTPUTS outputs, over the chunks' sum

Programs for ranks that a row does not have end at once, and lanes beyond its rank read nothing. Rows of one adapter
should be neighbours: the second finds its factors in the cache.
"""

import torch
import triton
import triton.language as tl

RANKS = 64  # the largest rank
LANES = 16  # ranks at a time
CHUNK, INPUTS = 1024, 64  # inputs of a program, and of one of its rounds
OUTPUTS = 128  # of a program


@triton.jit
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


@triton.jit
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
