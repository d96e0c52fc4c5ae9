"""Adapters on the device, and their batched products: rows of one step may each carry another adapter, or none.

A compiled step (kernels/step.c) follows the addresses in an adapter's table, and so do kernels: decode rows of whatever
ranks go through one, prompts through another. Without either, decode rows of adapters of one shape go through one
batched product, and so do their prompts, so ranks are never padded to a neighbour's. The base's product is untouched:
y = base(x) + B(A x).

    A of one layer and target: [in, rank]
    B of one layer and target: [rank, out]
    table of an adapter        int64 [layers · targets, 3]: address of A, address of B, rank; zeros where it has neither
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from persona.engine.adapter_file import Adapter, Array
from persona.engine.kernels.choice import Kernels
from persona.engine.kernels.reference import BLOCK
from persona.engine.shape import TARGETS, Shape
from persona.engine.weights import product

Factors = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
ALIGN = 64  # bytes: a cache line, and what vector loads like best


@dataclass(frozen=True, eq=False, slots=True)
class Resident:
    """One version's factors on the device: views of its pages, which are its own while it is here."""

    factors: Factors
    kind: tuple[object, ...]  # adapters of one kind fit into one batched product
    table: torch.Tensor | None = None  # on the CPU

    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.factors.values())


Span = tuple[int, int, Resident]  # rows of a prompt from start to end, and whose adapter they carry


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
    if adapter.header.form == "sparse":
        return _all_layers(adapter, shape, dtype, memory)
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
    return resident(factors, shape.layers)


def _all_layers(adapter: Adapter, shape: Shape, dtype: torch.dtype, memory: torch.Tensor) -> Resident:
    """The same where all layers are alike, a half of a target at a time: a fifth of the time."""
    header, item = adapter.header, dtype.itemsize
    sizes = {target: shape.projection(target) for target in TARGETS}
    layer_bytes = sum(_aligned(header.rank * size * item) for pair in sizes.values() for size in pair)
    flat = memory[: header.layers * layer_bytes].view(dtype)
    stacks: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    start = flat.storage_offset()
    for target, (out, inputs) in sizes.items():
        views = []
        for rows, columns in ((inputs, header.rank), (header.rank, out)):
            views.append(flat.as_strided((header.layers, rows, columns), (layer_bytes // item, columns, 1), start))
            start += _aligned(rows * columns * item) // item
        for view, values in zip(views, adapter.stacked(target), strict=True):
            view.copy_(torch.from_numpy(values).transpose(1, 2))
        stacks[target] = views[0], views[1]
    rows_of = {target: list(zip(a, b, strict=True)) for target, (a, b) in stacks.items()}
    factors = {(header.first + row, target): rows_of[target][row] for row in range(header.layers) for target in TARGETS}
    return resident(factors, shape.layers)


def resident(factors: Factors, layers: int) -> Resident:
    """From factors on the device, each contiguous."""
    return Resident(factors, tuple((key, a.shape[1]) for key, (a, _) in factors.items()), _table(factors, layers))


def _table(factors: Factors, layers: int) -> torch.Tensor:
    table = [[0, 0, 0] for _ in range(layers * len(TARGETS))]
    for key, (a, b) in factors.items():
        table[_line(*key)] = [a.data_ptr(), b.data_ptr(), a.shape[1]]
    return torch.tensor(table)


def _line(layer: int, target: str) -> int:
    return layer * len(TARGETS) + TARGETS.index(target)


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


@dataclass(frozen=True, slots=True)
class _Lone:
    """A prompt that no other is like: its rows stay where they are."""

    start: int
    end: int
    factors: Factors

    def add(self, key: tuple[int, str], x: torch.Tensor, y: torch.Tensor) -> None:
        """x: [tokens, in] · y: [tokens, out], changed in place at this prompt's rows."""
        if (found := self.factors.get(key)) is not None:
            y[self.start : self.end] += product(product(x[self.start : self.end], found[0]), found[1])


class _Pieces:
    """Prompts of much the same length whose adapters have one kind, each filled up with its last row: to a power of
    two, so that there are few shapes, as oneDNN compiles its products for each that it has not seen yet."""

    def __init__(self, prompts: Sequence[Span], power: int) -> None:
        self._stacks = _stacked([adapter for _, _, adapter in prompts])
        device = next(iter(self._stacks.values()))[0].device
        starts, ends = torch.tensor([(start, end) for start, end, _ in prompts], device=device).t().unsqueeze(2)
        filled = starts + torch.arange(1 << power, device=device)
        own = filled < ends
        self._rows = torch.minimum(filled, ends - 1)  # [prompts, 2 ** power], of the step
        self._own, self._places = filled[own], own.flatten().nonzero().flatten()  # [rows]: of the step, of the padded

    def add(self, key: tuple[int, str], x: torch.Tensor, y: torch.Tensor) -> None:
        """x: [tokens, in] · y: [tokens, out], changed in place at these prompts' rows."""
        if (found := self._stacks.get(key)) is None:
            return
        a, b = found
        y.index_add_(0, self._own, torch.bmm(torch.bmm(x[self._rows], a), b).flatten(0, 1)[self._places])


class Gathered:
    """The adapters of decode rows as the kernel wants them. table: [layers · targets, rows, 3] on the device.

    Who puts rows in keeps the adapters alive as long as the table is used.
    """

    def __init__(self, kernels: Kernels, layers: int, rows: int, device: torch.device) -> None:
        self._adapt = kernels.adapt
        self._table = torch.zeros(layers * len(TARGETS), rows, 3, dtype=torch.int64, device=device)

    def put(self, rows: Sequence[Resident | None]) -> None:
        """In place: a recorded step reads the same memory. Lines beyond `rows` become rows without an adapter."""
        lines, places, _ = self._table.shape
        bare = torch.zeros(lines, 3, dtype=torch.int64)
        found = [bare if row is None or row.table is None else row.table for row in rows]
        self._table.copy_(torch.stack(found + [bare] * (places - len(rows)), 1))

    def add(self, layer: int, target: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """x: [rows, in] · y: [rows, out], changed in place."""
        self._adapt(x, y, self._table[_line(layer, target)])


class Blocks:
    """The adapters of a step's prompts as the kernel wants them, a few rows of one prompt at a time.

    Who makes it keeps the adapters alive as long as it is used.
    """

    def __init__(self, kernels: Kernels, segments: Sequence[Span], device: torch.device) -> None:
        """segments: (start, end, adapter) of rows."""
        self._adapt = kernels.adapt_blocks
        some = [(at, min(BLOCK, end - at), one) for start, end, one in segments for at in range(start, end, BLOCK)]
        self._blocks = torch.tensor([(at, rows) for at, rows, _ in some], dtype=torch.int32, device=device)
        tables = [one.table for _, _, one in some if one.table is not None]
        assert len(tables) == len(some), "an adapter that was not promoted"
        self._table = torch.stack(tables, 1).to(device)  # [layers · targets, blocks, 3]

    def add(self, layer: int, target: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """x: [tokens, in] · y: [tokens, out], changed in place at the prompts' rows."""
        self._adapt(x, y, self._table[_line(layer, target)], self._blocks)


def compile_ahead(kernels: Kernels, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """The kernels of every projection, on a row without an adapter: no step shall wait for a compiler."""
    for target in TARGETS:
        out, inputs = shape.projection(target)
        x, y = (torch.zeros(1, size, dtype=dtype, device=device) for size in (inputs, out))
        bare = torch.zeros(1, 3, dtype=torch.int64, device=device)
        kernels.adapt(x, y, bare)
        kernels.adapt_blocks(x, y, bare, torch.tensor([[0, 1]], dtype=torch.int32, device=device))


class StepAdapters:
    """The adapters of one step's rows. What decode rows need is kept from step to step while the rows stay the same."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        """kernels: of the device; without them rows are stacked by kind."""
        self._kernels = kernels
        self._rows: tuple[Resident | None, ...] = ()
        self._groups: list[_Group] = []
        self._gathered: Gathered | None = None
        self._pieces: list[_Pieces | _Lone] = []
        self._blocks: Blocks | None = None

    def arrange(self, decode: Sequence[Resident | None], segments: list[Span]) -> None:
        """`decode`: one per row, sorted so that equal kinds are neighbours. `segments`: (start, end, adapter)."""
        rows = tuple(decode)
        if len(rows) != len(self._rows) or any(a is not b for a, b in zip(rows, self._rows, strict=True)):
            self._rows = rows
            if self._kernels is None:
                self._groups = _grouped(rows)
            else:
                self._gathered = _gather(self._kernels, rows)
        self._pieces, self._blocks = [], None
        if self._kernels is None:
            self._pieces = _pieces(segments)
        elif segments:
            (factor, _) = next(iter(segments[0][2].factors.values()))
            self._blocks = Blocks(self._kernels, segments, factor.device)

    def add(self, layer: int, target: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in] · y: [tokens, out] → y with every row's adapter added, in place."""
        for group in self._groups + self._pieces:
            group.add((layer, target), x, y)
        if self._gathered is not None:
            self._gathered.add(layer, target, x[: len(self._rows)], y[: len(self._rows)])
        if self._blocks is not None:
            self._blocks.add(layer, target, x, y)
        return y


def _gather(kernels: Kernels, rows: Sequence[Resident | None]) -> Gathered | None:
    adapters = [row for row in rows if row is not None]
    if not adapters:
        return None
    (factor, _), table = next(iter(adapters[0].factors.values())), adapters[0].table
    assert table is not None, "an adapter that was not promoted"
    gathered = Gathered(kernels, len(table) // len(TARGETS), len(rows), factor.device)
    gathered.put(rows)
    return gathered


def _grouped(rows: Sequence[Resident | None]) -> list[_Group]:
    groups, start = [], 0
    for kind, members in groupby(rows, key=lambda row: row.kind if row else None):
        adapters = [member for member in members if member is not None]
        if kind is not None:
            groups.append(_Group(start, start + len(adapters), _quick(_stacked(adapters))))
            start += len(adapters)
        else:
            break  # rows without an adapter come last
    return groups


def _pieces(segments: Sequence[Span]) -> list[_Pieces | _Lone]:
    alike: dict[tuple[object, int], list[Span]] = {}
    for start, end, adapter in segments:
        alike.setdefault((adapter.kind, (end - start - 1).bit_length()), []).append((start, end, adapter))
    return [
        _Pieces(some, power) if len(some) > 1 else _Lone(some[0][0], some[0][1], some[0][2].factors)
        for (_, power), some in alike.items()
    ]


def _stacked(adapters: Sequence[Resident]) -> Factors:
    stacks: Factors = {}
    for key in adapters[0].factors:
        pairs = [adapter.factors[key] for adapter in adapters]
        stacks[key] = torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    return stacks


def _quick(stacks: Factors) -> Factors:
    """In the type whose products of one row are quickest: on the CPU a bf16 one costs four fp32 ones."""
    return {key: (_wide(a), _wide(b)) for key, (a, b) in stacks.items()}


def _wide(stack: torch.Tensor) -> torch.Tensor:
    return stack.float() if stack.device.type == "cpu" else stack
