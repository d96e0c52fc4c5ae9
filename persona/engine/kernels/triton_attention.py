"""Attention of decode rows over pages, split along the row (Flash-Decoding, Dao et al. 2023; paged: Kwon et al. 2023).

    row 0   │ part 0: SPLIT tokens │ part 1         │ part 2: the rest │
    row 1   │ part 0: the rest │                      parts beyond a row's length end at once

Each part keeps an online softmax (Milakov and Gimelshein 2018) over its tokens; a second kernel joins a row's parts.
Where a row is split depends on its own length alone, so its result does not depend on who stands beside it.

Prompts of a step are one launch, too: QUERIES rows of one prompt and one query head are a program, which goes through
the tokens before them and those among them that each row sees (FlashAttention-2, Dao 2023; over pages).
"""

import torch
import triton
import triton.language as tl

from persona.engine.kernels.reference import QUERIES, DecodeRows, PromptRows
from persona.engine.kernels.triton_product import LEAST, operand

SPLIT = 256  # tokens of a part
BLOCK = 32  # tokens at a time
WARPS = 8  # of a program for prompts, which would spill registers with the usual four


@triton.jit(do_not_specialize=["table_row", "lengths_row"], do_not_specialize_on_alignment=["lengths"])
def _part(
    q, keys, values, table, lengths, parts, sums,
    q_row, q_head, k_page, k_place, k_head, v_page, v_place, v_head, table_row, lengths_row,
    scale, size, dim, group,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One part of one row, for the `group` query heads of one key head.

    parts: [rows, heads, parts, dim] fp32, not yet divided by the sum · sums: [rows, heads, parts, 2]: the largest
    score and the sum of exp(score − largest).
    """
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = part * SPLIT
    end = tl.minimum(start + SPLIT, tl.load(lengths + row * lengths_row).to(tl.int32))
    if start >= end:
        return
    heads, dims = tl.arange(0, GROUP), tl.arange(0, DIM)
    query_at = q + row * q_row + (head * group + heads)[:, None] * q_head + dims[None, :]
    ours = (heads < group)[:, None] & (dims < dim)[None, :]
    query = tl.load(query_at, mask=ours, other=0.0).to(TYPE)

    best = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    found = tl.zeros([GROUP, DIM], tl.float32)
    for first in range(start, end, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        seen = tokens < end
        page = tl.load(table + row * table_row + tokens // size, mask=seen, other=0).to(tl.int64)
        place = tokens % size
        inside = seen[:, None] & (dims < dim)[None, :]
        k_at = keys + page * k_page + place * k_place + head * k_head
        k = tl.load(k_at[:, None] + dims[None, :], mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(k.to(TYPE)), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))  # finite: the first token of a block is always seen
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(best - higher)
        v_at = values + page * v_page + place * v_place + head * v_head
        v = tl.load(v_at[:, None] + dims[None, :], mask=inside, other=0.0)
        total = total * fade + tl.sum(weights, 1)
        found = found * fade[:, None] + tl.dot(weights.to(v.dtype).to(TYPE), v.to(TYPE), input_precision="ieee")
        best = higher

    at = (row * tl.num_programs(1) * group + head * group + heads) * tl.num_programs(2) + part
    tl.store(parts + at[:, None] * dim + dims[None, :], found, mask=ours)
    tl.store(sums + at * 2, best, mask=heads < group)
    tl.store(sums + at * 2 + 1, total, mask=heads < group)


@triton.jit(do_not_specialize=["lengths_row", "most"], do_not_specialize_on_alignment=["lengths"])
def _join(parts, sums, lengths, out, lengths_row, most, dim, SPLIT: tl.constexpr, DIM: tl.constexpr):
    """Parts of one row and query head → out [rows, heads, dim]. most: parts that there is room for."""
    row, head = tl.program_id(0), tl.program_id(1)
    dims = tl.arange(0, DIM)
    length = tl.load(lengths + row * lengths_row).to(tl.int32)
    at = row * tl.num_programs(1) + head
    best = tl.load(sums + at * most * 2)
    total = tl.load(sums + at * most * 2 + 1)
    found = tl.load(parts + at * most * dim + dims, mask=dims < dim, other=0.0)
    for part in range(1, tl.cdiv(length, SPLIT)):
        theirs = tl.load(sums + (at * most + part) * 2)
        higher = tl.maximum(best, theirs)
        fade, share = tl.exp(best - higher), tl.exp(theirs - higher)
        more = tl.load(parts + (at * most + part) * dim + dims, mask=dims < dim, other=0.0)
        total = total * fade + tl.load(sums + (at * most + part) * 2 + 1) * share
        found = found * fade + more * share
        best = higher
    tl.store(out + at * dim + dims, (found / total).to(out.dtype.element_ty), mask=dims < dim)


def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: DecodeRows) -> torch.Tensor:
    """As reference.attend. q, keys and values may have any strides but along `dim`, where they are contiguous."""
    assert q.stride(-1) == keys.stride(-1) == values.stride(-1) == rows.pages.stride(-1) == 1
    (count, heads, dim), (_, size, kv_heads, _) = q.shape, keys.shape
    most, group = triton.cdiv(rows.pages.shape[1] * size, SPLIT), heads // kv_heads
    parts = q.new_empty(count, heads, most, dim, dtype=torch.float32)
    sums = q.new_empty(count, heads, most, 2, dtype=torch.float32)
    out = torch.empty(count, heads, dim, dtype=q.dtype, device=q.device)
    lanes = triton.next_power_of_2(dim)
    _part[count, kv_heads, most](
        q, keys, values, rows.pages, rows.lengths, parts, sums,
        q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3],
        rows.pages.stride(0), rows.lengths.stride(0), dim**-0.5, size, dim, group,
        SPLIT=SPLIT, BLOCK=BLOCK, GROUP=max(LEAST, triton.next_power_of_2(group)), DIM=lanes,
        TYPE=operand(q.dtype),
    )  # fmt: skip
    _join[count, heads](parts, sums, rows.lengths, out, rows.lengths.stride(0), most, dim, SPLIT=SPLIT, DIM=lanes)
    return out.view(count, -1)


@triton.jit(do_not_specialize=["table_row"])  # its multiples of 16, and 1, would be compiled when they first come
def _prompts(
    q, keys, values, table, blocks, out,
    q_row, q_head, k_page, k_place, k_head, v_page, v_place, v_head, table_row, scale, size, dim, group,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """One block of one prompt's rows, for one query head. out: [rows, heads, dim]."""
    block, head = blocks + tl.program_id(0) * 4, tl.program_id(1)
    count, position = tl.load(block + 1), tl.load(block + 2)
    table += tl.load(block + 3) * table_row
    lines, dims = tl.arange(0, QUERIES), tl.arange(0, DIM)
    rows = (tl.load(block) + lines).to(tl.int64)
    ours = (lines < count)[:, None] & (dims < dim)[None, :]
    query = tl.load(q + rows[:, None] * q_row + head * q_head + dims[None, :], mask=ours, other=0.0).to(TYPE)

    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    found = tl.zeros([QUERIES, DIM], tl.float32)
    for first in range(0, position + count, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        there = tokens < position + count
        page = tl.load(table + tokens // size, mask=there, other=0).to(tl.int64)
        place = tokens % size
        inside = there[:, None] & (dims < dim)[None, :]
        k_at = keys + page * k_page + place * k_place + head // group * k_head
        k = tl.load(k_at[:, None] + dims[None, :], mask=inside, other=0.0)
        scores = tl.dot(query, tl.trans(k.to(TYPE)), input_precision="ieee") * scale
        scores = tl.where(tokens[None, :] <= position + lines[:, None], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))  # finite: every row sees the first token of all
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(best - higher)
        v_at = values + page * v_page + place * v_place + head // group * v_head
        v = tl.load(v_at[:, None] + dims[None, :], mask=inside, other=0.0)
        total = total * fade + tl.sum(weights, 1)
        found = found * fade[:, None] + tl.dot(weights.to(v.dtype).to(TYPE), v.to(TYPE), input_precision="ieee")
        best = higher
    at = (rows * tl.num_programs(1) + head) * dim
    tl.store(out + at[:, None] + dims[None, :], (found / total[:, None]).to(out.dtype.element_ty), mask=ours)


def attend_prompts(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: PromptRows) -> torch.Tensor:
    """As reference.attend_prompts, but block by block; strides as above."""
    assert q.stride(-1) == keys.stride(-1) == values.stride(-1) == rows.pages.stride(-1) == 1
    (count, heads, dim), (_, size, kv_heads, _) = q.shape, keys.shape
    out = torch.empty(count, heads, dim, dtype=q.dtype, device=q.device)
    _prompts[len(rows.blocks), heads](
        q, keys, values, rows.pages, rows.blocks, out,
        q.stride(0), q.stride(1), *keys.stride()[:3], *values.stride()[:3],
        rows.pages.stride(0), dim**-0.5, size, dim, heads // kv_heads,
        QUERIES=QUERIES, BLOCK=BLOCK, DIM=triton.next_power_of_2(dim), TYPE=operand(q.dtype), num_warps=WARPS,
    )  # fmt: skip
    return out.view(count, -1)
