"""Steps by compiled code: the same as plain torch layer by layer, and the same whoever stands beside a row.

Plain torch computes in fp32 here, with the base's matrices written out. Tolerances are those of a logit, where logits
spread by 1.4 or more: 1e-3 for code in fp32, and 0.1 where the CPU multiplies bf16, to which each product's input is
rounded.
"""

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from models import Models
from parts import program
from watched import Operations

from persona.engine import device, lora
from persona.engine.attention import KvCache
from persona.engine.kernels import native
from persona.engine.kernels.native import NativeSteps, Part, _Tables
from persona.engine.lora import Resident
from persona.engine.memory import Memory
from persona.engine.protocol import Sampling
from persona.engine.runner import Runner
from persona.engine.sampler import Sampler
from persona.engine.sequence import Plan, Segment, Sequence
from persona.engine.shape import TARGETS, Shape
from persona.engine.weights import Int4
from persona.engine.words import Words

PAGE, PAGES, CONTEXT = 16, 64, 256
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 100)  # tokens of each sequence, the last one not computed yet
RANKS = (2, 0, 8, 64, 0, 1, 3, 16, 4)
KINDS = ("llama", "llama-untied", "llama3-rope", "llama-biased", "mistral", "qwen2", "qwen3")
WAYS = {"this CPU": (), "without bf16": ("-mno-avx512bf16",), "narrow vectors": ("-mno-avx512f",)}


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    program("cc")
    monkeypatch.setattr(Int4, "FEW", 0)


class World:
    """Sequences with their contexts in the cache, computed by plain torch."""

    def __init__(self, models: Models, kind: str, dtype: torch.dtype = torch.float32) -> None:
        self.folder = models.root / "kernels"
        self.decoder = models.decoder(kind)
        self.decoder.dtype = dtype
        shape = self.decoder.shape
        self.memory = Memory(PAGES, KvCache.page_bytes(shape, PAGE, dtype), torch.device("cpu"))
        self.memory.bytes.view(dtype).fill_(float("nan"))  # what is read beside a row's own context shows
        self.cache = KvCache(self.memory, shape, PAGE, dtype)
        self.plain = Runner(self.decoder, self.cache)
        self.adapters = {n: adapter(shape, rank, dtype) for n, rank in enumerate(RANKS)}
        drawn, pages = random.Random(5), list(range(PAGES))
        drawn.shuffle(pages)
        self.sequences = []
        for number, length in enumerate(LENGTHS):
            tokens = [drawn.randrange(3, shape.vocab) for _ in range(length)]
            mine = tuple(pages.pop() for _ in range(-(-length // PAGE)))
            self.sequences.append(Sequence(number, tokens, length - 1, CONTEXT, pages=mine))
            if length > 1:
                self.plain.run(Plan([], [Segment(self.sequences[-1], 0, length - 1)]), self.adapters)
            else:
                self.cache.clear(mine)
        self.free, self.spare = tuple(pages), tuple(pages[:6])

    def steps(self, *flags: str) -> NativeSteps:
        path = native.library(self.folder, self.decoder.dtype, *flags)
        assert path is not None
        return NativeSteps(path, self.decoder, self.cache, CONTEXT)

    def logits(self, steps: NativeSteps | None, which: list[int]) -> torch.Tensor:
        """Of those sequences' next step: [rows, vocab], in that order. The cache is as before afterwards."""
        some, before = [self.sequences[n] for n in which], self.memory.bytes.clone()
        result = Runner(self.decoder, self.cache, steps).run(Plan(some, []), self.adapters)
        logits = {sequence.id: row.clone() for sequence, row in zip(result.next, result.logits, strict=True)}
        self.written = self.memory.bytes.clone()
        self.memory.bytes.copy_(before)
        for sequence in some:
            sequence.computed -= 1
        return torch.stack([logits[n] for n in which])

    def piece(self, steps: NativeSteps, sequence: Sequence, *ends: int) -> torch.Tensor:
        """The logits behind a prompt that is computed up to each of `ends`. The cache is as before afterwards."""
        before = self.memory.bytes.clone()
        for start, end in pairwise([0, *ends]):
            plan = Plan([], [Segment(sequence, start, end)])
            result = Runner(self.decoder, self.cache, steps).run(plan, {sequence.id: self.adapters[2]})
        self.memory.bytes.copy_(before)
        return result.logits[0].clone()


def adapter(shape: Shape, rank: int, dtype: torch.dtype) -> Resident | None:
    """Random factors on most projections."""
    if not rank:
        return None
    generator = torch.Generator().manual_seed(rank)
    factors = {}
    for layer in range(shape.layers):
        for target in TARGETS:
            out, inputs = shape.projection(target)
            a = torch.randn(inputs, rank, generator=generator) / inputs**0.5
            b = torch.randn(rank, out, generator=generator) / 4
            if (layer, target) != (0, "o"):
                factors[layer, target] = a.to(dtype), b.to(dtype)
    return lora.resident(factors, shape.layers)


def eight_bits(vocab: int, hidden: int, seed: int) -> Words:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (vocab, hidden), dtype=torch.int8, generator=generator)
    return Words(codes, torch.rand(vocab, hidden // 32, generator=generator).half().float() / 500)


ALL = list(range(len(LENGTHS)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_plain_torch(models: Models, kind: str, way: str) -> None:
    world = World(models, kind)
    wanted = world.logits(None, ALL)
    cache = world.written.view(torch.float32).clone()
    found = world.logits(world.steps(*WAYS[way]), ALL)
    assert wanted.std() > 1.4
    tolerance = 0.1 if way == "this CPU" and torch.cpu._is_avx512_bf16_supported() else 1e-3
    assert (found - wanted).abs().max() < tolerance
    kept = torch.isfinite(cache)
    assert (world.written.view(torch.float32)[kept] - cache[kept]).abs().max() < tolerance
    assert torch.isfinite(world.written.view(torch.float32)).equal(kept)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "llama-untied"])
def test_words_in_eight_bits_are_those_in_bf16(models: Models, kind: str, way: str) -> None:
    world = World(models, kind)
    shape, tied = world.decoder.shape, world.decoder.shape.tied
    compact = [eight_bits(shape.vocab, shape.hidden, seed) for seed in (1, 2)]
    world.decoder.embed, world.decoder.head = compact[0], compact[0 if tied else 1]
    found = world.logits(world.steps(*WAYS[way]), ALL)
    numbers = [Words(one[:]) for one in compact]
    world.decoder.embed, world.decoder.head = numbers[0], numbers[0 if tied else 1]
    assert torch.equal(world.logits(world.steps(*WAYS[way]), ALL), found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_written_out_as_torch_writes_it(models: Models, dtype: torch.dtype, way: str) -> None:
    world = World(models, "llama", dtype)
    matrices = [p for layer in world.decoder.layers for p in layer.projections.values()]
    plain = [p.dense(dtype) for p in matrices]
    steps = world.steps(*WAYS[way])
    assert all(isinstance(p, Int4) and p.writer is not None for p in matrices)
    assert all(torch.equal(p.dense(dtype), wanted) for p, wanted in zip(matrices, plain, strict=True))
    other = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    assert all(p.dense(other).dtype is other for p in matrices)
    assert steps is not None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("eight", [False, True])
def test_words_are_written_out_as_torch_writes_them(models: Models, eight: bool, way: str) -> None:
    world = World(models, "llama-untied")
    shape = world.decoder.shape
    if eight:
        world.decoder.head = eight_bits(shape.vocab, shape.hidden, 3)
    head = world.decoder.head
    pieces = [slice(0, shape.vocab), slice(5, 6), slice(shape.vocab - 7, shape.vocab)]
    plain = [head.floats(piece) for piece in pieces]
    steps = world.steps(*WAYS[way])
    assert head.writer is not None
    assert all(torch.equal(head.floats(piece), wanted) for piece, wanted in zip(pieces, plain, strict=True))
    assert steps is not None


def test_a_step_with_a_cache_in_bf16(models: Models) -> None:
    world = World(models, "llama", torch.bfloat16)
    wanted, found = world.logits(None, ALL), world.logits(world.steps(), ALL)
    assert (found - wanted).abs().max() < 0.5  # plain torch rounds every activation here
    exact = World(models, "llama").logits(None, ALL)
    assert (found - exact).abs().mean() < 0.8 * (wanted - exact).abs().mean()


@pytest.mark.parametrize("way", WAYS)
def test_a_row_is_the_same_bit_for_bit_whoever_stands_beside_it(models: Models, way: str) -> None:
    world = World(models, "llama")
    steps = world.steps(*WAYS[way])
    together = world.logits(steps, ALL)
    for row in ALL:
        assert torch.equal(world.logits(steps, [row])[0], together[row])
    some = [7, 2, 4]
    assert torch.equal(world.logits(steps, some), together[some])


def test_what_a_step_keeps_of_the_last_one_is_never_stale(models: Models) -> None:
    """Rows that come, go, change places, pages or adapters, or go on: as by steps that have kept nothing."""
    world, drawn = World(models, "llama"), random.Random(3)
    steps, which, free = world.steps(), [3, 1, 8], list(world.free[6:])
    for _ in range(40):
        one = world.sequences[drawn.choice(which)]
        match drawn.randrange(5):
            case 0:
                which = drawn.sample(ALL, drawn.randrange(1, len(ALL) + 1))
            case 1:
                world.adapters[one.id] = world.adapters[drawn.choice(ALL)]
            case 2:
                moved = tuple(free.pop() for _ in one.pages)
                pages = world.memory.bytes.view(PAGES, -1)
                pages[list(moved)] = pages[list(one.pages)]
                free[:0], one.pages = one.pages, moved
            case 3 if len(one.tokens) < PAGE * len(one.pages):
                world.plain.run(Plan([one], []), world.adapters)
                one.tokens.append(drawn.randrange(3, world.decoder.shape.vocab))
        if drawn.random() < 0.3:  # a piece of somebody's prompt beside them
            newcomer = [Sequence(99, [7] * 40, 40, CONTEXT, pages=world.spare[:3]) for _ in range(2)]
            alone = world.piece(world.steps(), newcomer[0], 40)
            assert torch.equal(world.piece(steps, newcomer[1], 13, 40), alone)
        assert torch.equal(world.logits(steps, which), world.logits(world.steps(), which))


def test_tables_grow_with_the_largest_step_and_not_with_their_number(models: Models) -> None:
    adapter, tables = World(models, "llama").adapters[0], _Tables()
    for longest in range(1, 130):
        tables.filled([Part([1], 16 * longest - 1, tuple(range(longest)), adapter, True)])
    for rows in range(1, 70):
        tables.filled([Part([1], 5, (3,), adapter, True)] * rows)
    assert tables._pages.shape[0] <= 2 * 69
    assert tables._pages.shape[1] <= 2 * 129
    assert tables._rows.shape[1] <= 2 * 69


def test_tables_that_could_not_be_filled_are_filled_the_next_time(models: Models) -> None:
    adapters, tables = World(models, "llama").adapters, _Tables()
    before = [Part([1, 2], 0, (3,), adapters[0], True)]
    tables.filled(before)
    unknown = Resident({}, ())  # was not promoted: has no table
    with pytest.raises(AssertionError):
        tables.filled([Part([1], 0, (4,), None, True), Part([2], 0, (5,), unknown, True)])
    assert tables.filled(before).spoken == 1
    assert tables._rows[2, :2].tolist() == [0, 0]
    assert tables._pages[0, 0] == 3


def test_while_the_same_rows_go_on_no_tensor_is_made_and_no_page_told_again(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(models, "llama")
    steps, some = world.steps(), [world.sequences[n] for n in (3, 1, 8)]
    runner, filled, fill = Runner(world.decoder, world.cache, steps), list[int](), _Tables._fill
    monkeypatch.setattr(_Tables, "_fill", lambda *args: (filled.append(1), fill(*args)))

    def step() -> list[str]:
        with Operations() as mode:
            steps.draw(runner.run(Plan(some, []), world.adapters).logits, np.array([Sampler(Sampling()).wish()] * 3))
        for sequence in some:
            sequence.computed -= 1
        return [name for name, _ in mode.seen]

    step()
    assert step() == ["aten::slice"]  # of the memory for logits
    assert len(filled) == 1
    some.reverse()
    step()
    assert len(filled) == 2


def test_threads_change_nothing(models: Models) -> None:
    world, threads = World(models, "llama"), torch.get_num_threads()
    alone = world.logits(world.steps(), ALL)
    try:
        torch.set_num_threads(3)
        assert torch.equal(world.logits(world.steps(), ALL), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_is_that_of_plain_torch_in_pieces_of_any_length(models: Models, way: str) -> None:
    world = World(models, "llama")
    drawn = random.Random(9)
    tokens = [drawn.randrange(3, world.decoder.shape.vocab) for _ in range(90)]
    pages, adapters = world.free[:6], dict.fromkeys(range(8), world.adapters[2])

    def prompt(steps: NativeSteps | None, *ends: int) -> torch.Tensor:
        sequence = Sequence(1, tokens, 90, CONTEXT, pages=pages)
        for start, end in pairwise([0, *ends]):
            result = Runner(world.decoder, world.cache, steps).run(Plan([], [Segment(sequence, start, end)]), adapters)
            assert sequence.computed == end
            assert len(result.logits) == (end == 90)
        assert [s.id for s in result.next] == [1]
        return result.logits[0].clone()

    exact, steps = prompt(None, 90), world.steps(*WAYS[way])
    whole = prompt(steps, 90)
    tolerance = 0.1 if way == "this CPU" and torch.cpu._is_avx512_bf16_supported() else 1e-3
    assert (whole - exact).abs().max() < tolerance
    assert torch.equal(prompt(steps, 1, 17, 18, 64, 90), whole)


def test_a_prompt_beside_them_changes_nothing_for_decode_rows(models: Models) -> None:
    world = World(models, "llama")
    alone = world.logits(world.steps(), [5, 6])
    newcomer = Sequence(99, [7] * 20, 20, CONTEXT, pages=world.free[:2])
    runner = Runner(world.decoder, world.cache, world.steps())
    plan = Plan([world.sequences[5], world.sequences[6]], [Segment(newcomer, 0, 20)])
    result = runner.run(plan, {**world.adapters, 99: None})
    assert [s.id for s in result.next][-1] == 99
    rows = {sequence.id: row for sequence, row in zip(result.next, result.logits, strict=True)}
    assert torch.equal(torch.stack([rows[5], rows[6]]), alone)
    assert [s.computed for s in plan.decode] == [len(s.tokens) for s in plan.decode]
    assert newcomer.computed == 20


def test_a_score_is_told_beside_them_and_a_silent_prompt_says_nothing(models: Models) -> None:
    world = World(models, "llama")
    alone = world.logits(world.steps(), [5])
    scored = Sequence(98, [7] * 20, 20, 20, targets=(3, 4), pages=world.free[:2])
    silent = Sequence(99, [7] * 20, 20, 20, silent=True, pages=world.free[2:4])
    plan = Plan([world.sequences[5]], [Segment(scored, 0, 20), Segment(silent, 0, 20)])
    result = Runner(world.decoder, world.cache, world.steps()).run(plan, {**world.adapters, 98: None, 99: None})
    assert [s.id for s in result.next] == [5]
    assert torch.equal(result.logits, alone)
    assert [(s.id, len(found)) for s, found in result.scores] == [(98, 2)]
    assert (scored.computed, silent.computed) == (20, 20)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ranks", [(32, 48, 5), (80, 128, 7), (112, 256, 9)])
def test_wide_adapters_are_those_of_plain_torch(models: Models, ranks: tuple[int, ...], way: str) -> None:
    world = World(models, "llama")
    for place in ALL:
        world.adapters[place] = adapter(world.decoder.shape, ranks[place % len(ranks)], torch.float32)
    found, wanted = world.logits(world.steps(*WAYS[way]), ALL), world.logits(None, ALL)
    tolerance = 0.1 if way == "this CPU" and torch.cpu._is_avx512_bf16_supported() else 1e-3
    assert (found - wanted).abs().max() < tolerance
    assert torch.equal(world.logits(world.steps(*WAYS[way]), [4])[0], found[4])


def test_an_adapter_of_a_rank_that_it_does_not_know_is_left_to_torch(models: Models) -> None:
    world = World(models, "llama")
    world.adapters[1] = adapter(world.decoder.shape, 300, torch.float32)
    assert torch.equal(world.logits(world.steps(), ALL), world.logits(None, ALL))


def test_a_network_that_it_does_not_know_is_left_to_torch(models: Models) -> None:
    world = World(models, "llama")
    assert native.steps(world.folder, world.decoder, world.cache, CONTEXT) is not None
    dense = models.decoder("llama", "none")
    assert native.steps(world.folder, dense, world.cache, CONTEXT) is None


def test_without_a_compiler_there_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "c_compiler", lambda: None)
    assert native.library(tmp_path, torch.float32) is None


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path) -> None:
    assert native.library(tmp_path, torch.float32, "-fno-such-option") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["/nowhere/cc"], ["/etc/passwd"]])
def test_a_compiler_that_does_not_start_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(device, "c_compiler", lambda: command)
    assert native.library(tmp_path, torch.float32) is None


def test_damaged_code_is_left_to_torch_and_compiled_again(models: Models, tmp_path: Path) -> None:
    world = World(models, "llama")
    made = native.library(tmp_path, torch.float32)
    assert made is not None
    made.write_bytes(made.read_bytes()[:100])
    assert native.steps(tmp_path, world.decoder, world.cache, CONTEXT) is None
    assert native.steps(tmp_path, world.decoder, world.cache, CONTEXT) is not None


def test_code_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = native.library(tmp_path, torch.float32)
    assert made is not None
    monkeypatch.setattr(native, "SECONDS", 0)  # no time to compile
    monkeypatch.setattr(native, "_fingerprint", lambda *_: made.stem.removeprefix("step-"))
    assert native.library(tmp_path, torch.float32) == made
