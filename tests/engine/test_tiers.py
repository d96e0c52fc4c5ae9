"""Adapters on disk, in RAM and on the device: no step waits for a load, and nobody pays for another's trouble."""

import random
from collections.abc import Callable
from pathlib import Path

import adapters
import pytest
from models import Models
from plain import some_tokens
from workbench import Bench

from persona.engine import adapter_file, protocol
from persona.engine.protocol import AdapterRef, AllScores, Done, ScoreRequest
from persona.engine.tiers import Tiers

PROMPT = some_tokens(20, seed=1)


class Shelf:
    """A loader whose loads end when the test says so."""

    def __init__(self) -> None:
        self.loads: list[Callable[[], None]] = []

    def __call__(self, load: Callable[[], None]) -> None:
        self.loads.append(load)

    def deliver(self) -> None:
        while self.loads:
            self.loads.pop(0)()


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
    return bench.tiers.find(ref) is not None


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
    shelf.deliver()
    slow.work()
    slow.finish()
    assert slow.text(cold) == Bench(models).alone(PROMPT, ref) != slow.text(warm)


def test_many_who_wait_for_one_adapter_cause_one_load(slow: Bench, shelf: Shelf, tmp_path: Path) -> None:
    ref = made(slow, tmp_path)
    jobs = [slow.generate(PROMPT, ref) for _ in range(5)]
    staged = slow.ask(lambda job: protocol.Stage(job, ref))
    assert len(shelf.loads) == 1
    shelf.deliver()
    slow.work()
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
    shelf.deliver()
    slow.work()
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
    shelf.deliver()
    slow.work()
    slow.finish()
    assert slow.end(fine) == "length"
    assert [slow.failure(job).kind for job in ill] == ["AdapterError"] * 2
    if trouble != "foreign":  # nothing bad is remembered: a repaired file serves
        file.write_bytes(whole)
        again = slow.generate(PROMPT, bad)
        shelf.deliver()
        slow.work()
        slow.finish()
        assert slow.end(again) == "length"


def test_what_is_dropped_meanwhile_is_not_kept(slow: Bench, shelf: Shelf, tmp_path: Path) -> None:
    ref, other = made(slow, tmp_path, user=1), made(slow, tmp_path, user=2)
    for one in (ref, other):
        slow.ask(lambda job, one=one: protocol.Stage(job, one))  # type: ignore[misc]
    slow.ask(lambda job: protocol.Drop(job, 1))
    shelf.deliver()
    slow.work()
    assert [on_device(slow, one) for one in (ref, other)] == [False, True]
    assert slow.tiers.host_nbytes == adapter_bytes(slow, other)


def adapter_bytes(bench: Bench, ref: AdapterRef) -> int:
    return adapter_file.read(Path(ref.path), ref.sha256, bench.prepared.base, bench.shape).nbytes()


# --- between the tiers


def test_what_left_the_device_comes_back_from_ram_without_its_file(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, budget=1)  # one adapter at a time
    first, second = made(bench, tmp_path, user=1), made(bench, tmp_path, user=2)
    wanted = bench.alone(PROMPT, first)
    bench.alone(PROMPT, second)
    assert not on_device(bench, first)
    (Path(first.path) / adapter_file.FILE).unlink()
    assert bench.alone(PROMPT, first) == wanted
    assert (bench.health().loads, bench.health().disk_loads, bench.health().resident) == (3, 2, 1)


def test_without_room_in_ram_it_comes_back_from_disk(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, budget=1, host=1)
    refs = [made(bench, tmp_path, user) for user in (1, 2, 3)]
    wanted = [bench.alone(PROMPT, ref) for ref in refs]
    assert [bench.alone(PROMPT, ref) for ref in refs] == wanted
    assert bench.health().disk_loads == 6


def test_adapters_in_use_stay_whatever_the_budget(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, budget=1)
    refs = [made(bench, tmp_path, user) for user in range(1, 7)]
    alone = [bench.alone(PROMPT, ref) for ref in refs]
    jobs = [bench.generate(PROMPT, ref) for ref in refs]
    assert bench.health().resident == 6
    bench.finish()
    assert [bench.text(job) for job in jobs] == alone


def test_a_scoring_may_need_more_adapters_than_have_room(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, budget=1)
    refs = [made(bench, tmp_path, user) for user in range(1, 5)]
    job = bench.score_all([ScoreRequest(PROMPT, [5, 6], ref) for ref in (*refs, None)])
    bench.finish()
    (answer,) = bench.answers[job]
    assert isinstance(answer, AllScores)
    assert len({tuple(values) for values in answer.logprobs}) == 5


def test_hundreds_of_adapters_pass_through_a_device_that_holds_eight(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, running=4, waiting=1000)
    refs = [made(bench, tmp_path, user) for user in range(1, 121)]
    size = bench.tiers.nbytes
    bench.alone(PROMPT, refs[0])
    bench = Bench(models, running=4, waiting=1000, budget=8 * (bench.tiers.nbytes - size))
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
    assert bench.health().resident <= 8


# --- who leaves


def plain(budget: int) -> Tiers:
    """Tiers of values without tensors, loaded at once."""

    class Value:
        def nbytes(self) -> int:
            return 1

    return Tiers(
        lambda ref: Value(),  # type: ignore[arg-type, return-value]
        lambda value: Value(),  # type: ignore[arg-type, return-value]
        device_budget=budget,
        host_budget=100,
        submit=lambda load: load(),
    )


def ref(user: int, number: int = 1) -> AdapterRef:
    return AdapterRef(user, number, "", "")


def use(tiers: Tiers, one: AdapterRef) -> None:
    if tiers.find(one) is None:
        tiers.fetch(one)
        tiers.landed(())


def here(tiers: Tiers, *users: int) -> list[int]:
    return [user for user in users if tiers._device.__contains__(ref(user))]


def test_the_popular_stay_and_who_was_popular_once_leaves_in_time() -> None:
    tiers = plain(3)
    for _ in range(5):
        use(tiers, ref(1))
    for user in range(2, 6):
        use(tiers, ref(user))
    assert here(tiers, 1, 2, 3, 4, 5) == [1, 4, 5]
    for _ in range(8):
        for user in range(2, 6):
            use(tiers, ref(user))
    assert 1 not in here(tiers, 1)


def test_older_versions_leave_first_after_a_flip() -> None:
    tiers = plain(3)
    for _ in range(9):
        use(tiers, ref(1, 1))
    use(tiers, ref(1, 2))
    use(tiers, ref(2))
    tiers.flip(ref(1, 2))
    use(tiers, ref(3))
    assert tiers.find(ref(1, 1)) is None
    assert here(tiers, 2, 3) == [2, 3]
