"""Adapters on the device, and their batched products: rows of one step may each carry another adapter, or none.

Decode rows of equal shape go through one batched product, so ranks are never padded to a neighbour's; each prompt
segment has a plain product of its own. The base's product is untouched: y = base(x) + B(A x).

    A of one layer and target: [in, rank]
    B of one layer and target: [rank, out]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from persona.engine.adapter_file import Adapter, Array
from persona.engine.shape import TARGETS, Shape
from persona.engine.weights import product

Factors = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
ALIGN = 64  # bytes: a cache line, and what vector loads like best


@dataclass(frozen=True, eq=False, slots=True)
class Resident:
    """One version's factors on the device: views of its pages, which are its own while it is here."""

    factors: Factors
    kind: tuple[object, ...]  # adapters of one kind fit into one batched product

    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.factors.values())


def nbytes(adapter: Adapter, shape: Shape, dtype: torch.dtype) -> int:
    """Bytes that `expand` fills."""
    sizes = [
        _aligned(adapter.rank(layer, target) * size * dtype.itemsize)
        for layer in range(shape.layers)
        for target in TARGETS
        for size in shape.projection(target)
    ]
    return sum(sizes)


def expand(adapter: Adapter, shape: Shape, dtype: torch.dtype, memory: torch.Tensor) -> Resident:
    """Write a verified adapter's factors into `memory` (uint8), where they stay.

    | A of layer 0, qkv | B | A of layer 0, o | B | …   each begins at a multiple of 64 bytes
    """
    factors: Factors = {}
    start = 0

    def placed(values: Array) -> torch.Tensor:
        """values: [n, m] → a view [m, n] of the next bytes."""
        nonlocal start
        view = memory[start : start + values.size * dtype.itemsize].view(dtype).view(values.shape[::-1])
        start += _aligned(view.nbytes)
        return view.copy_(torch.from_numpy(values).t())

    for layer in range(shape.layers):
        for target in TARGETS:
            if (pair := adapter.factors(layer, target, shape)) is not None:
                factors[layer, target] = placed(pair[0]), placed(pair[1])
    kind = tuple((key, a.shape[1]) for key, (a, _) in factors.items())
    return Resident(factors, kind)


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class _Group:
    """Consecutive decode rows whose adapters have one kind. stacks[key]: A [rows, in, rank] and B [rows, rank, out]."""

    start: int
    end: int
    stacks: Factors

    def add(self, key: tuple[int, str], x: torch.Tensor, y: torch.Tensor) -> None:
        """x: [tokens, in] · y: [tokens, out], changed in place at this group's rows."""
        if (found := self.stacks.get(key)) is None:
            return
        a, b = found
        part, out = x[self.start : self.end].unsqueeze(1), y[self.start : self.end].unsqueeze(1)
        if b.dtype == y.dtype:
            out.baddbmm_(torch.bmm(part, a), b)
        else:
            out += torch.bmm(torch.bmm(part.to(b.dtype), a), b)


class StepAdapters:
    """The adapters of one step's rows. Decode stacks are kept from step to step while the rows stay the same."""

    def __init__(self) -> None:
        self._rows: tuple[Resident | None, ...] = ()
        self._groups: list[_Group] = []
        self._segments: list[tuple[int, int, Resident]] = []

    def arrange(self, decode: Sequence[Resident | None], segments: list[tuple[int, int, Resident]]) -> None:
        """`decode`: one per row, sorted so that equal kinds are neighbours. `segments`: (start, end, adapter)."""
        rows = tuple(decode)
        if len(rows) != len(self._rows) or any(a is not b for a, b in zip(rows, self._rows, strict=True)):
            self._rows, self._groups = rows, _grouped(rows)
        self._segments = segments

    def add(self, layer: int, target: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in] · y: [tokens, out] → y with every row's adapter added, in place."""
        key = layer, target
        for group in self._groups:
            group.add(key, x, y)
        for start, end, adapter in self._segments:
            if key in adapter.factors:
                a, b = adapter.factors[key]
                y[start:end] += product(product(x[start:end], a), b)
        return y


def _grouped(rows: Sequence[Resident | None]) -> list[_Group]:
    groups, start = [], 0
    for kind, members in groupby(rows, key=lambda row: row.kind if row else None):
        adapters = [member for member in members if member is not None]
        if kind is not None:
            groups.append(_stack(start, adapters))
            start += len(adapters)
        else:
            break  # rows without an adapter come last
    return groups


def _stack(start: int, adapters: list[Resident]) -> _Group:
    stacks: Factors = {}
    for key in adapters[0].factors:
        pairs = [adapter.factors[key] for adapter in adapters]
        stacks[key] = _quick(torch.stack([a for a, _ in pairs])), _quick(torch.stack([b for _, b in pairs]))
    return _Group(start, start + len(adapters), stacks)


def _quick(stack: torch.Tensor) -> torch.Tensor:
    """The stack in the type whose small products are quickest: on the CPU a bf16 one costs four fp32 ones."""
    return stack.float() if stack.device.type == "cpu" else stack
