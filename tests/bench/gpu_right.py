"""Whether the GPU path is right on the device: each kernel and whole steps against plain torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from gpu_bench import Bench, path
from gpu_model import PAGE, Size, adapters, cache, decoder, pages, sequences

from persona.engine import quantize
from persona.engine.buckets import Layout
from persona.engine.graphs import DecodeGraphs
from persona.engine.kernels import reference
from persona.engine.kernels.choice import Kernels
from persona.engine.kernels.reference import BLOCK, FEW, QUERIES, DecodeRows, Piece, PromptGroups, PromptRows
from persona.engine.runner import Runner
from persona.engine.sequence import Plan, Segment
from persona.engine.shape import TARGETS

ROUNDING = 2.0**-8  # of one bf16 value


@dataclass(frozen=True, slots=True)
class Error:
    """The largest difference from plain torch, as a share of the row's largest value."""

    what: str
    found: float
    limit: float

    @property
    def wrong(self) -> bool:
        return not self.found <= self.limit  # NaN is wrong


def errors(bench: Bench) -> Iterator[Error]:
    """Of each kernel alone, against fp32; of steps of a model of two layers, against the same steps in plain torch."""
    limit = 2 * ROUNDING if bench.dtype == torch.bfloat16 else 1e-4
    yield Error("attention", attention_error(bench), limit)
    yield Error("attention of prompts", prompt_attention_error(bench), limit)
    yield Error("adapters", adapter_error(bench), limit)
    yield Error("adapters of prompts", prompt_adapter_error(bench), limit)
    for form in ("nf4", "int4"):
        for target in TARGETS:
            yield Error(f"{form} {target}", product_error(bench, form, target), limit)
    for form in ("nf4", "int4"):
        for way, found in zip(("launched", "replayed"), step_errors(bench, form), strict=True):
            yield Error(f"{form} step {way}", found, 10 * limit)
        yield Error(f"{form} step with prompts", prompt_step_error(bench, form), 10 * limit)


def share(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found.float() - wanted).abs() / wanted.abs().amax(-1, keepdim=True)).max())


def attention_error(bench: Bench) -> float:
    """Rows around page edges, and NaN behind every row's end."""
    shape = bench.size.shape
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, *bench.size.lengths]
    width = pages(max(lengths))
    keys, values = (bench.random(len(lengths) * width, PAGE, shape.kv_heads, shape.head_dim) for _ in range(2))
    table = torch.randperm(len(keys), device=bench.device).view(len(lengths), width)
    for row, length in enumerate(lengths):
        for place in range(length // PAGE, width):
            at = table[row, place], slice(max(0, length - place * PAGE), None)
            keys[at] = values[at] = torch.nan
    rows = DecodeRows.of(table, torch.tensor(lengths, device=bench.device), PAGE)
    q = bench.random(len(lengths), shape.heads, shape.head_dim)
    wanted = reference.attend(q.float(), keys.float().nan_to_num(), values.float().nan_to_num(), rows)
    return share(bench.kernels.attend(q, keys, values, rows), wanted)


def prompt_attention_error(bench: Bench) -> float:
    """Two pieces of a prompt's beginning and one behind the longest context, each a little more than a block."""
    shape, count, longest = bench.size.shape, QUERIES + 3, max(bench.size.lengths)
    width = pages(longest + count)
    keys, values = (bench.random(3 * width, PAGE, shape.kv_heads, shape.head_dim) for _ in range(2))
    table = torch.randperm(len(keys)).view(3, width).tolist()
    pieces = [
        Piece(number * count, number * count + count, first, table[number][: pages(first + count)])
        for number, first in enumerate((0, PAGE - 1, longest))
    ]
    q = bench.random(3 * count, shape.heads, shape.head_dim)
    plain, ours = PromptGroups.of(pieces, PAGE, bench.device), PromptRows.of(pieces, bench.device)
    wanted = reference.attend_prompts(q.float(), keys.float(), values.float(), plain)
    return share(bench.kernels.attend_prompts(q, keys, values, ours), wanted)


def adapter_error(bench: Bench) -> float:
    outputs, inputs = bench.size.shape.projection("qkv")
    pairs = [
        (bench.random(inputs, rank) * inputs**-0.5, bench.random(rank, outputs) / 8) if rank else None
        for rank in (64, 0, 1, 17, *bench.size.ranks, 0)
    ]
    lines = [
        [0, 0, 0] if pair is None else [pair[0].data_ptr(), pair[1].data_ptr(), pair[0].shape[1]] for pair in pairs
    ]
    x, y = bench.random(len(pairs), inputs), bench.random(len(pairs), outputs)
    wanted = y.float().clone()
    reference.adapt(x.float(), wanted, [None if p is None else (p[0].float(), p[1].float()) for p in pairs])
    bench.kernels.adapt(x, y, torch.tensor(lines, device=bench.device))
    return share(y, wanted)


def prompt_adapter_error(bench: Bench) -> float:
    """Two prompts and rows of nobody between them."""
    outputs, inputs = bench.size.shape.projection("qkv")
    pairs = [(bench.random(inputs, rank) * inputs**-0.5, bench.random(rank, outputs) / 8) for rank in (64, 17)]
    blocks = torch.tensor([(0, BLOCK), (BLOCK, 5), (BLOCK + 8, 9)], dtype=torch.int32, device=bench.device)
    x, y = bench.random(BLOCK + 17, inputs), bench.random(BLOCK + 17, outputs)
    wanted = y.float().clone()
    for (a, b), rows in zip(pairs, (slice(0, BLOCK + 5), slice(BLOCK + 8, BLOCK + 17)), strict=True):
        wanted[rows] += x[rows].float() @ a.float() @ b.float()
    lines = [[a.data_ptr(), b.data_ptr(), a.shape[1]] for a, b in (pairs[0], *pairs)]
    bench.kernels.adapt_blocks(x, y, torch.tensor(lines, device=bench.device), blocks)
    return share(y, wanted)


def product_error(bench: Bench, form: str, target: str) -> float:
    outputs, inputs = bench.size.shape.projection(target)
    parts = {
        k: part.to(bench.device)
        for k, part in quantize.encode(torch.randn(outputs, inputs, device=bench.device), form).items()
    }
    x = bench.random(FEW // 2 + 1, inputs)
    if form == "nf4":
        dense = reference.nf4_dense(parts["bytes"], parts["absmax"], outputs)
        found = bench.kernels.nf4(x, parts["bytes"], parts["absmax"], outputs)
    else:
        dense = quantize.int4_dense(quantize.unpack_nibbles(parts["codes"]), parts["scales"])
        found = bench.kernels.int4(x, parts["codes"], parts["scales"])
    return share(found, x.float() @ dense.to(x.dtype).float().t())


def two_layers(bench: Bench) -> Size:
    return replace(bench.size, shape=replace(bench.size.shape, layers=min(2, bench.size.shape.layers)))


def prompt_step_error(bench: Bench, form: str) -> float:
    """Two users' prompts beside replies, more rows together than kernels take at a time."""
    size, replies = two_layers(bench), 3 if bench.device.type == "cpu" else FEW - 4
    base = decoder(size, form, bench.device)
    store, mine = cache(size, base, replies + 2, 2 * PAGE), adapters(size, base, 3)
    filled = store.memory.bytes.clone()

    def step(kernels: Kernels | None) -> torch.Tensor:
        store.memory.bytes.copy_(filled)
        some = sequences(replies + 2, PAGE - 1, 2 * PAGE)
        for sequence in some[replies:]:
            sequence.computed = 0
        prompts = [Segment(sequence, 0, sequence.prompt) for sequence in some[replies:]]
        with path(kernels):
            result = Runner(base, store).run(Plan(some[:replies], prompts), {s.id: mine[s.id % 3] for s in some})
        places = {sequence.id: place for place, sequence in enumerate(result.next)}
        return result.logits[[places[place] for place in range(replies + 2)]]

    return share(step(bench.kernels), step(None))


def step_errors(bench: Bench, form: str) -> tuple[float, float]:
    """Three rows (a replay fills up a fourth), one without an adapter, two steps."""
    size = two_layers(bench)
    base = decoder(size, form, bench.device)
    store, (one, other) = cache(size, base, 3, 2 * PAGE), adapters(size, base, 2)
    filled = store.memory.bytes.clone()

    def steps(kernels: Kernels | None, *, replayed: bool) -> torch.Tensor:
        store.memory.bytes.copy_(filled)
        layout = Layout(PAGE, store.stride, 2, scratch=3 * 2)
        made = DecodeGraphs(base, store, layout, bench.kernels, bench.recorder()) if replayed else None
        some, found = sequences(3, PAGE - 1, 2 * PAGE), []
        with path(kernels):
            run = Runner(base, store, made)
            for _ in range(2):
                found.append(run.run(Plan(some, []), {0: one, 1: None, 2: other}))
                for sequence in some:
                    sequence.tokens.append(1)
        if made is not None and not all(made.made.values()):
            raise RuntimeError("a step was not recorded: the log says why")
        return torch.cat(
            [result.logits[[s.id for s in result.next].index(row)][None] for result in found for row in range(3)]
        )

    wanted = steps(None, replayed=False)
    launched, replayed = (steps(bench.kernels, replayed=way) for way in (False, True))
    return share(launched, wanted), share(replayed, wanted)
