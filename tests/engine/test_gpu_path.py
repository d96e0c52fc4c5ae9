"""The path of a GPU through the whole engine, on a tiny model: kernels in the interpreter, recordings of decode steps.

A replay computes again from the recording's own memory, so everything is tested but CUDA itself. Compared in fp32, with
the path of the CPU: log-probabilities within 1e-3, and the same words.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import adapters
import pytest
import torch
from models import Models
from parts import library
from plain import some_tokens
from workbench import PAGE, Bench

from persona.engine import memory, refusals
from persona.engine.graphs import Work
from persona.engine.kernels import choice
from persona.engine.kernels.choice import Kernels
from persona.engine.memory import apart
from persona.engine.protocol import AdapterRef, Piece
from persona.engine.slices import settled

CLOSE = 1e-3


def bench(models: Models, kernels: Kernels | None = None, **options: int) -> Bench:
    return Bench(models, weights="nf4", pages=40, context=64, dtype=torch.float32, kernels=kernels, **options)


def refs(one: Bench, folder: Path) -> list[AdapterRef | None]:
    """Of ranks 8, 2 and 4 with 8, and no adapter."""
    shape, base = one.shape, one.prepared.base
    some = [adapters.sparse(folder / str(user), shape, base, user=user, rank=rank) for user, rank in ((1, 8), (2, 2))]
    return [*some, adapters.lora(folder / "3", shape, base, user=3), None]


def replies(one: Bench, who: list[AdapterRef | None], count: int = 3) -> list[list[tuple[int, float]]]:
    """Token and log-probability of each reply's tokens; prompts end around the edges of pages."""
    prompts = [some_tokens(PAGE - 2 + i, seed=i) for i in range(len(who))]
    return told(one, [one.generate(prompt, ref, count, logprobs=0) for prompt, ref in zip(prompts, who, strict=True)])


def told(one: Bench, jobs: list[int]) -> list[list[tuple[int, float]]]:
    one.finish()
    pieces = [[a.chunk for a in one.answers[job] if isinstance(a, Piece)] for job in jobs]
    return [[(found.token, found.logprob) for piece in some for found in piece.logprobs] for some in pieces]


def same(found: list[list[tuple[int, float]]], wanted: list[list[tuple[int, float]]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        assert max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True)) < CLOSE


def test_the_path_of_a_gpu_says_what_the_cpus_says(
    models: Models, tmp_path: Path, kernels: Kernels, request: pytest.FixtureRequest
) -> None:
    plain = bench(models)
    who = refs(plain, tmp_path)
    wanted = replies(plain, who)
    quick = bench(models, request.getfixturevalue("gpu_path"))
    same(replies(quick, who), wanted)
    assert quick.graphs is not None
    assert set(quick.graphs._made) == {(4, True)}
    assert len({tuple(token for token, _ in one) for one in wanted}) == 4


def test_long_prompts_beside_replies_are_adapted_row_by_row(
    models: Models, tmp_path: Path, kernels: Kernels, request: pytest.FixtureRequest
) -> None:
    """Blocks of 32 rows behind decode rows: of two prompts, one longer than a block and than what a step takes."""

    def said(one: Bench) -> list[list[tuple[int, float]]]:
        who = refs(one, tmp_path)
        running = one.generate(some_tokens(5), who[1], 8, logprobs=0)
        one.work(2)
        prompts = [(some_tokens(50, seed=3), who[0]), (some_tokens(20, seed=4), who[2]), (some_tokens(9, seed=5), None)]
        return told(one, [running, *(one.generate(tokens, ref, 3, logprobs=0) for tokens, ref in prompts)])

    wanted = said(bench(models, prefill=40))
    same(said(bench(models, request.getfixturevalue("gpu_path"), prefill=40)), wanted)


def test_rows_that_come_and_go_find_the_recording_of_their_number(
    models: Models, tmp_path: Path, gpu_path: Kernels
) -> None:
    one = bench(models, gpu_path)
    who = refs(one, tmp_path)
    first, alone = replies(one, who[:1]), replies(one, [None])
    same(replies(one, who)[:1], first)
    same(replies(one, who[:1]), first)
    same(replies(one, [None]), alone)
    assert one.graphs is not None
    assert set(one.graphs._made) == {(1, True), (1, False), (4, True)}
    one.loop._runner.forget()
    assert not any(recording.adapters for recording in one.graphs._made.values())


def test_a_step_beyond_every_recording_is_computed(models: Models, gpu_path: Kernels) -> None:
    """A sequence that is longer than the table of a recording is wide."""
    one = bench(models, gpu_path)
    assert one.graphs is not None
    one.graphs._layout = one.graphs._layout._replace(most=1)
    wanted = replies(bench(models), [None, None])
    same(replies(one, [None, None]), wanted)


def test_all_sizes_are_recorded_before_anybody_is_served(models: Models, tmp_path: Path, gpu_path: Kernels) -> None:
    one = bench(models, gpu_path)
    assert one.graphs is not None
    one.graphs.prepare(20)
    made = dict(one.graphs._made)
    assert set(made) == {(size, adapted) for size in (1, 2, 4, 8, 16, 32) for adapted in (True, False)}
    replies(one, refs(one, tmp_path))
    assert one.graphs._made == made


def test_a_size_that_cannot_be_recorded_is_launched_and_tried_once(models: Models, gpu_path: Kernels) -> None:
    one, tries = bench(models, gpu_path), list[Work]()

    def fails(work: Work) -> NoReturn:
        tries.append(work)
        raise torch.OutOfMemoryError("no memory for a graph")

    assert one.graphs is not None
    one.graphs._record = fails
    same(replies(one, [None, None]), replies(bench(models), [None, None]))
    assert len(tries) == 1
    assert one.graphs.made == {(2, False): False}
    replies(one, [None])
    assert len(tries) == 2, "a smaller one may have room"


def test_after_a_recording_that_came_to_nothing_none_is_tried(models: Models, gpu_path: Kernels) -> None:
    """torch's allocator may be in the middle of it."""
    one, tries = bench(models, gpu_path), list[Work]()

    def fails(work: Work) -> NoReturn:
        tries.append(work)
        raise RuntimeError  # with no word of why

    assert one.graphs is not None
    one.graphs._record = fails
    one.graphs.prepare(4)
    assert len(tries) == 1
    assert one.graphs.made == dict.fromkeys([(size, adapted) for size in (1, 2, 4) for adapted in (True, False)], False)
    same(replies(one, [None, None]), replies(bench(models), [None, None]))


def test_a_load_has_a_stream_of_its_own_and_is_there_when_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step waits for it; it waits for the steps that were launched before it, whose pages it may have got."""
    told: list[str] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            told.append("stream")

        def wait_stream(self, other: str) -> None:
            told.append(f"waits for {other}")

        def synchronize(self) -> None:
            told.append("done")

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        told.append("in it")
        try:
            yield
        finally:
            told.append("out of it")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the steps")
    memory._stream.cache_clear()

    def loaded(number: int) -> float:
        with apart(torch.device("cuda")):
            told.append("copies")
            return 1 / number

    loaded(1)
    load = ["waits for the steps", "in it", "copies", "out of it", "done"]
    assert told == ["stream", *load]
    with pytest.raises(ZeroDivisionError):
        loaded(0)
    assert told == ["stream", *load, *load], "nothing is being written when it fails, either"
    with apart(torch.device("cpu")):
        pass
    assert len(told) == 1 + 2 * len(load)
    memory._stream.cache_clear()


def test_spare_rows_write_to_the_scratch_page_and_nobody_reads_it(models: Models, gpu_path: Kernels) -> None:
    one, who = bench(models, gpu_path), [None, None, None]
    parts = [part for layer in range(one.shape.layers) for part in one.cache.layer(layer)]
    for part in parts:
        part[-1] = torch.nan
    same(replies(one, who), replies(bench(models), who))
    assert all(part[-1, 0].isfinite().all() and part[-1, 1:].isnan().all() for part in parts)
    assert one.scheduler.pool.total == one.memory.pages - 1, "no sequence is ever given the scratch page"


def test_the_cpu_takes_plain_torch_and_the_interpreter_serves_nobody() -> None:
    assert choice.kernels("cpu") is None
    assert choice.kernels("cuda") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_triton_does_not_start_cuda_takes_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    library("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choice.kernels.cache_clear()
    assert choice.kernels("cuda") is None
    choice.kernels.cache_clear()


@pytest.mark.parametrize(("capability", "starts"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_that_does_not_multiply_bf16_takes_plain_torch(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], starts: bool
) -> None:
    library("triton")
    from triton.runtime import driver

    target = SimpleNamespace(get_current_target=lambda: None)
    monkeypatch.setattr(type(driver), "active", target)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choice._starts() is starts


@pytest.mark.parametrize(("code", "lost"), [(700, True), (900, False), (901, False), (908, False), (None, True)])
def test_a_recording_that_fails_is_no_lost_device(code: int | None, lost: bool) -> None:
    error = torch.AcceleratorError("CUDA error")
    if code is not None:
        error.error_code = code
    assert refusals.fatal(error) is lost


def test_a_slice_ends_when_the_device_has_done_it() -> None:
    seen: list[str] = []

    def work() -> Generator[int, None, str]:
        try:
            for number in range(3):
                seen.append(f"queued {number}")
                yield number
        finally:
            seen.append("closed")
        return "done"

    slices = settled(work(), lambda: seen.append("settled"))
    assert next(slices) == 0
    assert seen == ["queued 0", "settled"]
    slices.close()
    assert seen[2:] == ["closed"]

    said: list[str] = []

    def whole() -> Generator[int, None, None]:
        said.append((yield from settled(work(), lambda: None)))

    assert list(whole()) == [0, 1, 2]
    assert said == ["done"]
