"""Adapters on disk, in RAM and on the device: no step waits for a load, and nobody pays for another's trouble."""

import errno
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import adapters
import pytest
from models import Models
from plain import some_tokens
from workbench import ADAPTER, PAGE, Bench, plain_tiers

from persona.engine import adapter_file, protocol
from persona.engine.pages import PagePool
from persona.engine.protocol import AdapterRef, AllScores, Done, GenerateRequest, Sampling, ScoreRequest
from persona.engine.shelf import Absent
from persona.engine.tiers import Tiers

PROMPT = some_tokens(20, seed=1)
ONE = ADAPTER + 8  # pages for one adapter, not for two


class Shelf:
    """A loader whose loads end when the test says so."""

    def __init__(self) -> None:
        self.loads: list[Callable[[], None]] = []

    def __call__(self, load: Callable[[], None]) -> None:
        self.loads.append(load)

    def deliver(self, bench: Bench) -> None:
        """Read from disk, then expanded into pages that the loop has reserved meanwhile."""
        while self.loads:
            self.loads.pop(0)()
            bench.work()


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def slow(models: Models, shelf: Shelf) -> Bench:
    return Bench(models, submit=shelf)


def made(bench: Bench, folder: Path, user: int = 1, number: int = 1) -> AdapterRef:
    return adapters.sparse(
        folder / f"{user}-{number}", bench.shape, bench.prepared.base, user=user, number=number, size=0.5
    )


def on_device(bench: Bench, ref: AdapterRef) -> bool:
    lease = bench.tiers.shelf.hold(ref)
    if lease is not None:
        bench.tiers.release(lease, used=False)
    return lease is not None


# --- while a load is under way


def test_steps_go_on_and_who_waits_is_answered_when_it_has_come(
    models: Models, slow: Bench, shelf: Shelf, tmp_path: Path
) -> None:
    ref = made(slow, tmp_path)
    cold = slow.generate(PROMPT, ref)
    warm = slow.generate(PROMPT, count=30)
    slow.work(20)
    assert len(slow.text(warm)) > 0
    assert cold not in slow.answers
    slow.finish()
    assert slow.end(warm) == "length"
    assert cold not in slow.answers
    shelf.deliver(slow)
    slow.finish()
    assert slow.text(cold) == Bench(models).alone(PROMPT, ref) != slow.text(warm)


def test_many_who_wait_for_one_adapter_cause_one_load(slow: Bench, shelf: Shelf, tmp_path: Path) -> None:
    ref = made(slow, tmp_path)
    jobs = [slow.generate(PROMPT, ref) for _ in range(5)]
    staged = slow.ask(lambda job: protocol.Stage(job, ref))
    assert len(shelf.loads) == 1
    shelf.deliver(slow)
    slow.finish()
    assert len({slow.text(job) for job in jobs}) == 1
    assert isinstance(slow.answers[staged][0], Done)


def test_an_abort_meanwhile_is_answered_and_leaves_nothing(slow: Bench, shelf: Shelf, tmp_path: Path) -> None:
    ref = made(slow, tmp_path)
    chat, other = slow.generate(PROMPT, ref), slow.generate(PROMPT, ref)
    score = slow.score(PROMPT, ref)
    slow.abort(chat)
    slow.abort(score)
    assert slow.end(chat) == "abort"
    assert slow.failure(score).kind == "Busy"
    shelf.deliver(slow)
    slow.finish()
    assert slow.end(other) == "length"
    assert len(slow.answers[chat]) == len(slow.answers[score]) == 1


def test_who_waits_for_a_load_counts_as_waiting(models: Models, shelf: Shelf, tmp_path: Path) -> None:
    bench = Bench(models, submit=shelf, waiting=3)
    for user in range(1, 4):
        bench.generate(PROMPT, made(bench, tmp_path, user))
    assert bench.failure(bench.generate(PROMPT)).kind == "Busy"


@pytest.mark.parametrize("trouble", ["corrupt", "missing", "foreign"])
def test_a_bad_file_fails_those_who_want_it_and_nobody_else(
    slow: Bench, shelf: Shelf, tmp_path: Path, trouble: str
) -> None:
    good, bad = made(slow, tmp_path, user=1), made(slow, tmp_path, user=2)
    file = Path(bad.path) / adapter_file.FILE
    whole = file.read_bytes()
    if trouble == "corrupt":
        file.write_bytes(whole[:-7])
    elif trouble == "missing":
        file.unlink()
    else:
        bad = adapters.sparse(tmp_path / "foreign", slow.shape, "another base", user=2)
    fine, ill = slow.generate(PROMPT, good), [slow.generate(PROMPT, bad) for _ in range(2)]
    shelf.deliver(slow)
    slow.finish()
    assert slow.end(fine) == "length"
    assert [slow.failure(job).kind for job in ill] == ["AdapterError"] * 2
    if trouble != "foreign":  # nothing bad is remembered: a repaired file serves
        file.write_bytes(whole)
        again = slow.generate(PROMPT, bad)
        shelf.deliver(slow)
        slow.finish()
        assert slow.end(again) == "length"


def test_a_file_that_cannot_be_read_now_is_asked_for_again_later(
    slow: Bench, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = made(slow, tmp_path)

    def crowded(self: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    first = slow.generate(PROMPT, ref)
    example = protocol.Example(PROMPT, [3, 4])
    with monkeypatch.context() as now:
        now.setattr(Path, "read_bytes", crowded)
        shelf.deliver(slow)
        trained = slow.train(protocol.TrainRequest([example], protocol.Plan(), str(tmp_path), ref))
    assert [slow.failure(job).kind for job in (first, trained)] == ["Busy"] * 2  # not AdapterError: no quarantine
    again = slow.generate(PROMPT, ref)
    shelf.deliver(slow)
    slow.finish()
    assert slow.end(again) == "length"


def test_what_goes_wrong_between_disk_and_device_fails_who_waits_and_is_tried_again(
    slow: Bench, shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = made(slow, tmp_path)
    first = slow.generate(PROMPT, ref)
    with monkeypatch.context() as broken:
        broken.setattr(slow.tiers.shelf, "reserve", lambda *_: 1 / 0)
        shelf.loads.pop(0)()
    slow.work()
    assert slow.failure(first).kind == "Busy"
    again = slow.generate(PROMPT, ref)
    shelf.deliver(slow)
    slow.finish()
    assert slow.end(again) == "length"


@pytest.mark.parametrize("deliveries", [0, 1])
def test_what_is_dropped_while_it_is_read_or_expanded_is_not_kept(
    slow: Bench, shelf: Shelf, tmp_path: Path, deliveries: int
) -> None:
    ref, other = made(slow, tmp_path, user=1), made(slow, tmp_path, user=2)
    jobs = [slow.generate(PROMPT, one) for one in (ref, other)]
    for _ in range(2 * deliveries):
        shelf.loads.pop(0)()
    slow.work()
    slow.abort(jobs[0])
    slow.ask(lambda job: protocol.Drop(job, 1))
    shelf.deliver(slow)
    assert [on_device(slow, one) for one in (ref, other)] == [False, True]
    told = slow.health()
    assert (told.host, told.host_bytes, told.adapter_pages) == (1, adapter_bytes(slow, other), ADAPTER)


def adapter_bytes(bench: Bench, ref: AdapterRef) -> int:
    return adapter_file.read(Path(ref.path), ref.sha256, bench.prepared.base, bench.shape).nbytes()


# --- while a step computes


def test_what_is_asked_for_in_a_step_is_there_at_its_end(models: Models, tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(1) as inbox:
        bench = Bench(models, submit=loader.submit)
        ref = made(bench, tmp_path)
        request = GenerateRequest(PROMPT, Sampling(max_tokens=12), ref)
        run = bench.loop._runner.run

        def computing(*given: Any) -> Any:
            inbox.submit(bench.loop.expect, protocol.Generate(0, request)).result(timeout=30)
            loader.submit(lambda: None).result(timeout=30)  # it has done what it was given
            return run(*given)

        bench.generate(PROMPT, count=30)
        bench.loop._runner.run = computing  # type: ignore[method-assign]
        bench.work()
        cold = bench.generate(PROMPT, ref)
        bench.work()
        assert len(bench.answers[cold]) == 1  # its first token
        bench.finish()
    assert bench.text(cold) == Bench(models).alone(PROMPT, ref)
    assert bench.health().loads == 1


def test_loads_and_steps_beside_each_other_leave_everybody_their_own(models: Models, tmp_path: Path) -> None:
    """Four adapters have room, eight users ask, and the threads meet as they like."""
    with ThreadPoolExecutor(1) as loader, ThreadPoolExecutor(2) as inbox:
        bench = Bench(models, pages=4 * ADAPTER + 24, running=4, submit=loader.submit)
        refs = [made(bench, tmp_path, user) for user in range(1, 9)]
        wanted = {ref: Bench(models).alone(PROMPT, ref, 4) for ref in refs}
        source, asked = random.Random(2), list[tuple[int, AdapterRef]]()
        for _ in range(150):
            ref = source.choice(refs)
            request = GenerateRequest(PROMPT, Sampling(max_tokens=4), ref, ref.user_id)
            inbox.submit(bench.loop.expect, protocol.Generate(0, request))
            if source.random() < 0.5 and bench.scheduler.waiting < 20:
                asked.append((bench.generate(PROMPT, ref, 4, user=ref.user_id), ref))
            bench.loop.work()
        give_up = time.monotonic() + 60
        while any(bench.end(job) is None for job, _ in asked) and time.monotonic() < give_up:
            bench.loop.work()
    assert all(bench.text(job) == wanted[ref] for job, ref in asked)
    bench.finish()


# --- between the tiers


def test_what_left_the_device_comes_back_from_ram_without_its_file(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=ONE)
    first, second = made(bench, tmp_path, user=1), made(bench, tmp_path, user=2)
    wanted = bench.alone(PROMPT, first)
    bench.alone(PROMPT, second)
    assert not on_device(bench, first)
    (Path(first.path) / adapter_file.FILE).unlink()
    assert bench.alone(PROMPT, first) == wanted
    assert (bench.health().loads, bench.health().disk_loads, bench.health().resident) == (3, 2, 1)


def test_without_room_in_ram_it_comes_back_from_disk(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=ONE, host=1)
    refs = [made(bench, tmp_path, user) for user in (1, 2, 3)]
    wanted = [bench.alone(PROMPT, ref) for ref in refs]
    assert [bench.alone(PROMPT, ref) for ref in refs] == wanted
    assert bench.health().disk_loads == 6


def test_a_scoring_may_need_more_adapters_than_have_room(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=ONE)
    refs = [made(bench, tmp_path, user) for user in range(1, 5)]
    asked = [ScoreRequest(PROMPT, [5, 6], ref) for ref in (*refs, None, *refs)]
    job = bench.score_all([*asked[:3], ScoreRequest(PROMPT, []), *asked[3:]])
    bench.finish()
    (answer,) = bench.answers[job]
    assert isinstance(answer, AllScores)
    assert answer.logprobs.pop(3) == []
    assert len({tuple(values) for values in answer.logprobs}) == 5
    assert answer.logprobs[5:] == answer.logprobs[:4]
    assert bench.health().loads == 4


def test_hundreds_of_adapters_pass_through_a_device_that_holds_eight(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, running=4, waiting=1000)
    refs = [made(bench, tmp_path, user) for user in range(1, 121)]
    bench = Bench(models, running=4, waiting=1000, pages=8 * ADAPTER + 6)
    source = random.Random(1)
    asked = [source.choice(refs) for _ in range(300)]
    jobs = [bench.generate(PROMPT[:5], ref, 2) for ref in asked[:100]]
    bench.finish()
    jobs += [bench.generate(PROMPT[:5], ref, 2) for ref in asked[100:]]
    bench.finish()
    assert all(bench.end(job) == "length" for job in jobs)
    said: dict[AdapterRef, set[str]] = {}
    for job, ref in zip(jobs, asked, strict=True):
        said.setdefault(ref, set()).add(bench.text(job))
    assert all(len(texts) == 1 for texts in said.values())
    assert len({text for texts in said.values() for text in texts}) > 0.6 * len(said), "adapters that say the same"
    assert 6 <= bench.health().resident <= 8


# --- who leaves


def ref(user: int, number: int = 1) -> AdapterRef:
    return AdapterRef(user, number, "", "")


def use(tiers: Tiers, one: AdapterRef) -> None:
    while isinstance(lease := tiers.hold(one), Absent):
        tiers.landed()
    tiers.release(lease)


def here(tiers: Tiers, *users: int) -> list[int]:
    return [user for user in users if ref(user) in tiers.shelf]


def test_the_popular_stay_and_who_was_popular_once_leaves_in_time() -> None:
    tiers = plain_tiers(PagePool(3, PAGE))
    for _ in range(5):
        use(tiers, ref(1))
    for user in range(2, 6):
        use(tiers, ref(user))
    assert here(tiers, 1, 2, 3, 4, 5) == [1, 4, 5]
    for _ in range(8):
        for user in range(2, 6):
            use(tiers, ref(user))
    assert 1 not in here(tiers, 1)


def test_those_whose_turn_is_near_leave_last_and_the_last_in_line_first() -> None:
    pool = PagePool(4, PAGE)
    tiers = plain_tiers(pool)
    for user in (1, 2, 3, 4, 4, 4):
        use(tiers, ref(user))
    tiers.shelf.expect([ref(1), ref(2), ref(3), ref(1)])
    left = []
    for _ in range(4):
        before = here(tiers, 1, 2, 3, 4)
        assert pool.take(1)
        left += set(before) - set(here(tiers, 1, 2, 3, 4))
    assert left == [4, 3, 2, 1]


def test_older_versions_leave_first_after_a_flip() -> None:
    tiers = plain_tiers(PagePool(3, PAGE))
    for _ in range(9):
        use(tiers, ref(1, 1))
    use(tiers, ref(1, 2))
    use(tiers, ref(2))
    tiers.flip(ref(1, 2))
    use(tiers, ref(3))
    assert ref(1, 1) not in tiers.shelf
    assert here(tiers, 2, 3) == [2, 3]
