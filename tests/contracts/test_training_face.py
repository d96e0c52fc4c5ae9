"""The training face: progress while it runs, a file at its end; of an abandoned one its state, where that is kept."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from house import House, digest

from persona.engine.adapter_file import FILE
from persona.engine.protocol import AdapterRef, Example, GenerateRequest, Plan, Progress, Sampling, TrainRequest
from persona.errors import Busy

pytestmark = pytest.mark.asyncio(loop_scope="session")
PLAN = Plan(rank=8, alpha=16.0, layers=1.0, batch_tokens=64, slice_tokens=64)


def request(out: Path, passes: int = 1) -> TrainRequest:
    examples = [Example([(7 * i + j) % 300 + 3 for j in range(24)], list(range(4, 24))) for i in range(12)]
    return TrainRequest(examples, Plan(**{**_fields(PLAN), "passes": passes}), str(out))


def _fields(plan: Plan) -> dict[str, object]:
    return {name: getattr(plan, name) for name in plan.__struct_fields__}


async def at_rest(house: House) -> None:
    async with asyncio.timeout(30):
        while (await house.engine.health()).training:  # noqa: ASYNC110 - the engine has no event for it
            await asyncio.sleep(0.05)


async def test_training_yields_progress_and_writes_an_adapter_that_serves(house: House, tmp_path: Path) -> None:
    steps = [step async for step in house.engine.train(request(tmp_path))]
    assert [step.done for step in steps] == [False] * (len(steps) - 1) + [True]
    assert [step.step for step in steps] == sorted(step.step for step in steps)
    assert steps[-1].tokens >= steps[0].tokens > 0
    ref = AdapterRef(house.user(), 1, str(tmp_path), digest(tmp_path))
    await house.engine.stage(ref)


async def test_closing_the_iterator_abandons_the_run(house: House, tmp_path: Path) -> None:
    run = house.engine.train(request(tmp_path, passes=100))
    await anext(run)
    await run.aclose()  # type: ignore[attr-defined]
    await at_rest(house)
    assert not (tmp_path / FILE).exists()


def kept(home: Path, passes: int = 4) -> TrainRequest:
    """A training whose state is kept."""
    for name in ("out", "kept"):
        (home / name).mkdir(parents=True, exist_ok=True)
    return msgspec.structs.replace(request(home / "out", passes), checkpoint=str(home / "kept"))


async def begin(house: House, made: TrainRequest, steps: int = 3) -> Progress:
    """Train so many steps and abandon it."""
    run = house.engine.train(made)
    for _ in range(steps):
        progress = await anext(run)
    await run.aclose()  # type: ignore[attr-defined]
    await at_rest(house)
    return progress


async def test_the_same_request_goes_on_from_the_state_of_an_abandoned_run(house: House, tmp_path: Path) -> None:
    straight, stopped = kept(tmp_path / "straight"), kept(tmp_path / "stopped")
    assert [step async for step in house.engine.train(straight)][-1].resumed == 0
    await begin(house, stopped)
    steps = [step async for step in house.engine.train(stopped)]
    assert steps[0].resumed >= 1
    assert [step.step for step in steps] == [*range(steps[0].resumed + 1, steps[0].steps + 1), steps[0].steps]
    assert steps[-1].done
    assert digest(Path(stopped.out)) == digest(Path(straight.out))


async def test_another_request_begins_anew_and_removes_that_state(house: House, tmp_path: Path) -> None:
    made = kept(tmp_path)
    await begin(house, made)
    other = msgspec.structs.replace(made, examples=made.examples[1:])
    assert (await begin(house, other, steps=1)).resumed == 0
    assert (await begin(house, made, steps=1)).resumed == 0


async def test_a_folder_of_the_state_that_is_taken_away_does_not_come_back(house: House, tmp_path: Path) -> None:
    made = kept(tmp_path)
    run = house.engine.train(made)
    await anext(run)
    (tmp_path / "kept").rename(tmp_path / "gone")
    assert [step async for step in run][-1].done
    assert not (tmp_path / "kept").exists()


async def test_a_second_training_is_busy_and_does_not_disturb_the_first(house: House, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    run = house.engine.train(request(first, passes=2))
    await anext(run)
    with pytest.raises(Busy):
        await anext(house.engine.train(request(second)))
    assert [step async for step in run][-1].done
    assert (first / FILE).exists()
    assert not (second / FILE).exists()


async def test_after_an_abandoned_run_the_next_may_start(house: House, tmp_path: Path) -> None:
    run = house.engine.train(request(tmp_path, passes=100))
    await anext(run)
    await run.aclose()  # type: ignore[attr-defined]
    await at_rest(house)
    assert [step async for step in house.engine.train(request(tmp_path))][-1].done


async def test_a_pause_holds_the_run_until_resume(house: House, tmp_path: Path) -> None:
    run = house.engine.train(request(tmp_path, passes=2))
    await anext(run)
    await house.engine.pause()
    rest: list[bool] = []

    async def follow() -> None:
        async for step in run:
            rest.append(step.done)  # noqa: PERF401 - counted while it grows

    task = asyncio.create_task(follow())
    await asyncio.sleep(0.5)  # what was on its way has arrived
    seen = len(rest)
    await asyncio.sleep(1.0)
    assert len(rest) == seen
    assert not task.done()
    await house.engine.resume()
    async with asyncio.timeout(60):
        await task
    assert rest[-1]


async def test_serving_goes_on_beside_training(house: House, tmp_path: Path) -> None:
    run = house.engine.train(request(tmp_path, passes=100))
    await anext(run)
    chunks = [c async for c in house.engine.generate(GenerateRequest([5, 6, 7], Sampling(max_tokens=8)))]
    assert chunks[-1].finish
    await run.aclose()  # type: ignore[attr-defined]
    await at_rest(house)
