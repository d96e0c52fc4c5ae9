"""One memory for context and adapters: each gives way to the other, and neither sees what the other left."""

from collections.abc import Callable
from pathlib import Path

import adapters
import pytest
import torch
from models import Models
from plain import some_tokens
from workbench import ADAPTER, PAGE, Bench

from persona.engine import adapter_file, awaiting, lora, protocol
from persona.engine.attention import KvCache
from persona.engine.memory import Memory
from persona.engine.protocol import AdapterRef

PROMPT = some_tokens(20, seed=1)


def made(bench: Bench, folder: Path, user: int, rank: int = 8) -> AdapterRef:
    place = folder / f"{user}"
    return adapters.sparse(place, bench.shape, bench.prepared.base, user=user, rank=rank, size=0.5)


def test_idle_adapters_give_way_to_a_long_prompt_and_come_back(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=3 * ADAPTER + 4)
    refs = [made(bench, tmp_path, user) for user in (1, 2, 3)]
    wanted = [bench.alone(PROMPT, ref) for ref in refs]
    assert (bench.health().resident, bench.health().adapter_pages) == (3, 3 * ADAPTER)
    long = some_tokens(20 * PAGE, seed=2)
    bench.alone(long, count=PAGE)
    assert bench.health().resident == 1
    assert [bench.alone(PROMPT, ref) for ref in refs] == wanted


def test_cached_text_gives_way_to_an_adapter(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=ADAPTER + 12)
    for user in range(2, 9):
        bench.alone(some_tokens(3 * PAGE, seed=user), count=PAGE, user=user)
    assert bench.health().cached_pages > 12
    ref = made(bench, tmp_path, 1)
    assert bench.alone(PROMPT, ref) == Bench(models).alone(PROMPT, ref)
    assert bench.health().adapter_pages == ADAPTER
    assert bench.health().cached_pages <= 12


def test_neither_starves_the_other_when_both_are_wanted_all_the_time(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=4 * ADAPTER, running=4)
    refs = [made(bench, tmp_path, user) for user in range(1, 9)]
    seen = []
    for turn in range(40):
        ref = refs[turn % 2 if turn % 4 else turn % 8]
        bench.alone(some_tokens(30, seed=ref.user_id), ref, 8, user=ref.user_id)
        seen.append((bench.health().resident, bench.health().cached_pages))
    assert min(resident for resident, _ in seen[8:]) >= 2
    assert min(cached for _, cached in seen[8:]) >= 4
    assert bench.health().cached_tokens > 0


def test_who_finds_no_room_for_an_adapter_waits_their_turn_and_nobody_overtakes(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=2 * ADAPTER)
    first, second = made(bench, tmp_path, 1), made(bench, tmp_path, 2)
    running = bench.generate(PROMPT, first, 60)  # ten pages and an adapter: no room for another
    bench.work()
    waiting, later = bench.generate(PROMPT, second), bench.generate(PROMPT[:5], count=3)  # this one would have room
    bench.work(20)
    assert bench.end(running) is None
    assert waiting not in bench.answers
    assert later not in bench.answers
    bench.finish()
    assert [bench.end(job) for job in (running, waiting, later)] == ["length"] * 3
    assert bench.text(waiting) == Bench(models).alone(PROMPT, second)


def test_a_staged_version_waits_for_room_and_comes_before_those_who_wait(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=2 * ADAPTER)
    running = bench.generate(PROMPT, made(bench, tmp_path, 1), 60)
    bench.work()
    staged = bench.ask(lambda job: protocol.Stage(job, made(bench, tmp_path, 2)))
    bench.work(5)
    assert staged not in bench.answers
    bench.finish()
    assert bench.end(running) == "length"
    assert isinstance(bench.answers[staged][0], protocol.Done)


def test_a_staged_version_is_not_kept_out_by_an_endless_stream_of_requests(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the pages of one that ended, and there are never as many neighbours as an adapter wants."""
    monkeypatch.setattr(awaiting, "PATIENT", 30)
    bench = Bench(models, pages=2 * ADAPTER, running=64)
    seeds = iter(range(10_000))
    jobs: list[int] = []

    def crowd() -> None:
        while bench.health().waiting < 3:
            seed = next(seeds)
            jobs.append(bench.generate(some_tokens(10, seed=seed), count=20 + 7 * seed % 30, user=seed % 5))
        bench.work()

    for _ in range(30):
        crowd()
    staged = bench.ask(lambda job: protocol.Stage(job, made(bench, tmp_path, 9)))
    for _ in range(25):
        crowd()
    assert staged not in bench.answers
    for _ in range(75):
        crowd()
    assert isinstance(bench.answers[staged][0], protocol.Done)
    ended = sum(bench.end(job) is not None for job in jobs)
    for _ in range(60):
        crowd()
    assert sum(bench.end(job) is not None for job in jobs) > ended + 5, "newcomers come in again"
    bench.finish()
    assert all(bench.end(job) == "length" for job in jobs)


def test_a_waiting_stage_that_is_aborted_leaves_nothing(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=2 * ADAPTER)
    running = bench.generate(PROMPT, made(bench, tmp_path, 1), 60)
    bench.work()
    scored = bench.score_all([protocol.ScoreRequest(PROMPT, [3], made(bench, tmp_path, 2))])
    bench.work(5)
    bench.abort(scored)
    assert bench.failure(scored).kind == "Busy"
    bench.finish()
    assert bench.end(running) == "length"
    assert bench.health().resident == 1


def test_an_adapter_larger_than_memory_is_refused(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=ADAPTER - 1)
    failed = bench.failure(bench.generate([5, 6], made(bench, tmp_path, 1), 2))
    assert (failed.kind, failed.code) == ("TooLarge", "adapter_too_large")  # nothing against its file
    assert "engine.memory_mb" in failed.message
    assert bench.loop.idle


def test_a_request_that_fits_only_without_its_adapter_is_refused(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=ADAPTER + 3)
    ref = made(bench, tmp_path, 1)
    job = bench.generate(PROMPT, ref)  # four pages
    bench.finish()
    assert (bench.failure(job).kind, bench.failure(job).code) == ("TooLarge", "context_length_exceeded")
    assert bench.alone(PROMPT[:12], ref) == Bench(models).alone(PROMPT[:12], ref)
    bench.alone(PROMPT)


def test_context_and_adapters_live_in_the_one_memory_and_nowhere_else(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=4 * ADAPTER)
    low = bench.memory.bytes.data_ptr()
    high = low + bench.memory.bytes.nbytes
    assert bench.memory.bytes.nbytes == 4 * ADAPTER * bench.memory.page_bytes
    jobs = [bench.generate(PROMPT, made(bench, tmp_path, user), 20) for user in range(1, 9)]
    while not bench.loop.idle:
        bench.work()
        for lease in bench.tiers.shelf.leases:
            assert lease.value is not None
            first, *_, last = (half for pair in lease.value.factors.values() for half in pair)
            assert first.data_ptr() == low + lease.pages[0] * bench.memory.page_bytes
            assert last.data_ptr() + last.nbytes <= low + (lease.pages[-1] + 1) * bench.memory.page_bytes <= high
            assert lease.value.nbytes() <= len(lease.pages) * bench.memory.page_bytes
            halves = (half for pair in lease.value.factors.values() for half in pair)
            assert all(half.is_contiguous() and half.data_ptr() % lora.ALIGN == low % lora.ALIGN for half in halves)
    assert [bench.end(job) for job in jobs] == ["length"] * 8


NAN = 0xFF  # of every byte: NaN in fp32 and bf16


@pytest.mark.parametrize("spoil", [lambda memory: memory.bytes.fill_(NAN), lambda memory: memory.bytes.fill_(0x7F)])
def test_bits_of_an_earlier_owner_are_never_seen_as_numbers(
    models: Models, tmp_path: Path, spoil: Callable[[Memory], object]
) -> None:
    wanted: dict[int, str] = {}
    for bench in (Bench(models), Bench(models, pages=ADAPTER + 6)):
        refs = [made(bench, tmp_path, 1), made(bench, tmp_path, 2, rank=3)]
        for turn, ref in enumerate([refs[0], None, refs[1], refs[0], None]):
            job = bench.generate(some_tokens(20 + turn, seed=turn), ref)
            bench.finish()
            assert wanted.setdefault(turn, bench.text(job)) == bench.text(job)
            bench.ask(lambda job: protocol.Drop(job, 1))
            bench.ask(lambda job: protocol.Drop(job, 2))
            assert bench.scheduler.pool.free == bench.scheduler.pool.total
            spoil(bench.memory)  # whatever stood there: all pages are free


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["sparse", "lora"])
def test_factors_in_pages_are_those_of_the_file(models: Models, tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    bench = Bench(models)
    write = adapters.sparse if form == "sparse" else adapters.lora
    ref = write(tmp_path, bench.shape, bench.prepared.base, rank=5)
    adapter = adapter_file.read(Path(ref.path), ref.sha256, bench.prepared.base, bench.shape)
    memory = Memory(40, KvCache.page_bytes(bench.shape, PAGE, dtype), bench.decoder.device)
    memory.bytes.fill_(NAN)
    pages = list(range(3, 3 + memory.needed(lora.nbytes(adapter, bench.shape, dtype))))
    resident = lora.expand(adapter, bench.shape, dtype, memory.run(pages))
    for (layer, target), (a, b) in resident.factors.items():
        pair = adapter.factors(layer, target, bench.shape)
        assert pair is not None
        assert torch.equal(a, torch.from_numpy(pair[0]).t().to(dtype))
        assert torch.equal(b, torch.from_numpy(pair[1]).t().to(dtype))
    assert resident.nbytes() <= len(pages) * memory.page_bytes
    assert bool((memory.bytes[: 3 * memory.page_bytes] == NAN).all())
    assert bool((memory.bytes[(pages[-1] + 1) * memory.page_bytes :] == NAN).all())
