"""Products of few rows with a 4-bit matrix: it is read once, as it is stored, and written out in registers only.

                    │ int4                                   │ nf4
    nibbles         │ uint8 [out, in/2], even column low     │ uint8 [out·in/2], even column high
    a group         │ 32 inputs: w = (code − 8)·scale + zero │ 64 inputs: w = NF4[code]·absmax
    its scale       │ bf16 [in/32, out, 2], with the zero    │ fp32 [out, in/64]

A byte holds two neighbouring columns, so each round is two products: x's even columns with one nibble, its odd ones
with the other. Codes are decoded in fp32, rounded to x's type as `dense` rounds them, and products summed in fp32. Long
rows of the matrix are split, by its shape alone, and the parts are added in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from persona.engine import quantize
from persona.engine.kernels.reference import NF4
from persona.engine.kernels.triton_product import LEAST, operand

TILE = 32  # rows of a launch, at most
OUTPUTS = 32  # of a program
INPUTS = 128  # of a round
PROGRAMS = 512  # wanted at least: some four for each processor of a large GPU


@triton.jit
def _two_products(
    x, x_row, count, first, inputs, even, odd, total, ROWS: tl.constexpr, INPUTS: tl.constexpr, TYPE: tl.constexpr
):
    """total [ROWS, outputs] + x's columns from `first` on with even and odd [outputs, INPUTS / 2]."""
    rows = tl.arange(0, ROWS)
    columns = first + 2 * tl.arange(0, INPUTS // 2)
    there = x + rows[:, None] * x_row + columns[None, :]
    ours = (rows < count)[:, None] & (columns < inputs)[None, :]
    left, right = tl.load(there, mask=ours, other=0.0), tl.load(there + 1, mask=ours, other=0.0)
    even, odd = even.to(left.dtype).to(TYPE), odd.to(right.dtype).to(TYPE)
    total = tl.dot(left.to(TYPE), tl.trans(even), total, input_precision="ieee")
    return tl.dot(right.to(TYPE), tl.trans(odd), total, input_precision="ieee")


@triton.jit
def _store(parts, total, count, outs, outputs, ROWS: tl.constexpr):
    """parts: fp32 [parts, rows, outputs]."""
    rows = tl.arange(0, ROWS)
    at = (tl.program_id(1) * count + rows)[:, None] * outputs + outs[None, :]
    tl.store(parts + at, total, mask=(rows < count)[:, None] & (outs < outputs)[None, :])


@triton.jit(do_not_specialize=["count"])  # its multiples of 16, and 1, would be compiled when they first come
def _int4(
    x, codes, scales, parts, x_row, count, inputs, outputs, span,
    GROUP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    outs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    pairs = tl.arange(0, GROUP // 2)
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, inputs), INPUTS):
        groups = first // GROUP + tl.arange(0, INPUTS // GROUP)
        ours = (outs < outputs)[:, None] & (groups < inputs // GROUP)[None, :]
        at = outs[:, None] * (inputs // 2) + groups[None, :] * (GROUP // 2)
        nibbles = tl.load(codes + at[:, :, None] + pairs[None, None, :], mask=ours[:, :, None], other=0).to(tl.int32)
        pair = scales + (groups[None, :] * outputs + outs[:, None]) * 2
        scale = tl.load(pair, mask=ours, other=0.0).to(tl.float32)[:, :, None]
        zero = tl.load(pair + 1, mask=ours, other=0.0).to(tl.float32)[:, :, None]
        even = ((nibbles & 15) - 8).to(tl.float32) * scale + zero
        odd = ((nibbles >> 4) - 8).to(tl.float32) * scale + zero
        even, odd = tl.reshape(even, [OUTPUTS, INPUTS // 2]), tl.reshape(odd, [OUTPUTS, INPUTS // 2])
        total = _two_products(x, x_row, count, first, inputs, even, odd, total, ROWS, INPUTS, TYPE)
    _store(parts, total, count, outs, outputs, ROWS)


@triton.jit(do_not_specialize=["count"])
def _nf4(
    x, data, absmax, table, parts, x_row, count, inputs, outputs, span,
    GROUP: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    outs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    pairs = tl.arange(0, GROUP // 2)
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    start = tl.program_id(1) * span
    for first in range(start, tl.minimum(start + span, inputs), INPUTS):
        groups = first // GROUP + tl.arange(0, INPUTS // GROUP)
        ours = (outs < outputs)[:, None] & (groups < inputs // GROUP)[None, :]
        at = outs[:, None] * (inputs // GROUP) + groups[None, :]
        there = data + at[:, :, None] * (GROUP // 2) + pairs[None, None, :]
        nibbles = tl.load(there, mask=ours[:, :, None], other=0).to(tl.int32)
        scale = tl.load(absmax + at, mask=ours, other=0.0)[:, :, None]
        even, odd = tl.load(table + (nibbles >> 4)) * scale, tl.load(table + (nibbles & 15)) * scale
        even, odd = tl.reshape(even, [OUTPUTS, INPUTS // 2]), tl.reshape(odd, [OUTPUTS, INPUTS // 2])
        total = _two_products(x, x_row, count, first, inputs, even, odd, total, ROWS, INPUTS, TYPE)
    _store(parts, total, count, outs, outputs, ROWS)


def int4(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """As reference.int4: TILE rows at a time, for each of which the matrix is read again."""
    return _launch(_int4, x, (codes, scales), codes.shape[0], quantize.GROUP)


def nf4(x: torch.Tensor, data: torch.Tensor, absmax: torch.Tensor, outputs: int) -> torch.Tensor:
    """As reference.nf4, so many rows at a time, and for matrices whose rows are whole blocks."""
    return _launch(_nf4, x, (data, absmax, _table(x.device)), outputs, quantize.NF4_BLOCK)


def _launch(kernel: Any, x: torch.Tensor, matrix: tuple[torch.Tensor, ...], outputs: int, group: int) -> torch.Tensor:
    count, inputs = x.shape
    if count > TILE:
        return torch.cat([_launch(kernel, some, matrix, outputs, group) for some in torch.split(x, TILE)])
    assert x.stride(-1) == 1
    assert inputs % group == 0
    assert all(part.is_contiguous() for part in matrix)
    blocks = triton.cdiv(outputs, OUTPUTS)
    span = INPUTS * triton.cdiv(triton.cdiv(inputs, INPUTS), max(1, PROGRAMS // blocks))
    parts = torch.empty(triton.cdiv(inputs, span), count, outputs, dtype=torch.float32, device=x.device)
    kernel[blocks, len(parts)](
        x, *matrix, parts, x.stride(0), count, inputs, outputs, span,
        GROUP=group, ROWS=LEAST if count <= LEAST else TILE, OUTPUTS=OUTPUTS, INPUTS=INPUTS,
        TYPE=operand(x.dtype),
    )  # fmt: skip
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(x.dtype)


_tables: dict[torch.device, torch.Tensor] = {}


def _table(device: torch.device) -> torch.Tensor:
    """NF4's values, once for each device."""
    if device not in _tables:
        _tables[device] = torch.tensor(NF4, device=device)
    return _tables[device]
