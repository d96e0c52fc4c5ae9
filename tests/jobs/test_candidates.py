"""What may come of a training besides the whole of it, and which of it serves."""

from collections.abc import Callable
from pathlib import Path

import pytest
from world import Tell, World

from persona.domain import EntryId, RunState, User, VersionState
from persona.engine.protocol import ScoreRequest
from persona.errors import AdapterError

HALF = b" by half"


def content(path: str) -> bytes:
    return Path(path, "adapter.safetensors").read_bytes()


def losing(whole: tuple[float, float], half: tuple[float, float]) -> Callable[[ScoreRequest], list[float]]:
    """Losses on (the user's words, the reference set); the bare base has 2 on both."""

    def score(request: ScoreRequest) -> list[float]:
        loss = (2.0, 2.0)
        if request.adapter:
            loss = half if content(request.adapter.path).endswith(HALF) else whole
        neutral = request.tokens[request.targets[0] - 1] == 258
        return [-loss[neutral]] * len(request.targets)

    return score


async def test_where_the_whole_costs_too_much_half_of_it_serves(world: World, ann: User, tell: Tell) -> None:
    world.engine.predicts = losing(whole=(1.5, 2.1), half=(1.7, 2.01))
    await tell(40)
    run = await world.train(ann)
    assert (run.state, run.version) == (RunState.KEPT, 2)
    assert run.reason is not None
    assert run.reason.startswith("Half of it serves. Better: 2.000 → 1.700")
    assert "What was trained: Drift 5.00% on the reference set; 1.00% is allowed." in run.reason
    version = await world.adapters.active(ann.id)
    assert version is not None
    assert (version.number, version.run_id, version.metrics["half"]) == (2, run.id, True)
    assert version.watermark > 0
    assert content(version.path).endswith(HALF)
    assert world.folders() == [f"{ann.id}/2"]


async def test_where_the_whole_is_kept_no_half_is_made(world: World, ann: User, tell: Tell) -> None:
    world.engine.predicts = losing(whole=(1.7, 2.0), half=(1.5, 2.0))
    await tell(40)
    run = await world.train(ann)
    assert (run.state, run.version) == (RunState.KEPT, 1)
    assert [version.number for version in await world.adapters.list(ann.id)] == [1]
    assert world.folders() == [f"{ann.id}/1"]


async def test_where_both_are_refused_nothing_serves_and_nothing_is_left(world: World, ann: User, tell: Tell) -> None:
    world.engine.predicts = losing(whole=(2.1, 2.0), half=(1.7, 2.1))
    await tell(40)
    run = await world.train(ann)
    assert (run.state, run.version) == (RunState.REJECTED, 1)
    assert run.reason is not None
    assert run.reason.startswith("Not surely better: 2.000 → 2.100")
    assert {version.state for version in await world.adapters.list(ann.id)} == {VersionState.REJECTED}
    assert world.folders() == []


async def test_the_next_run_goes_on_from_half(world: World, ann: User, tell: Tell) -> None:
    world.engine.predicts = losing(whole=(1.5, 2.1), half=(1.7, 2.0))
    await tell(40)
    await world.train(ann)
    await tell(40)
    await world.train(ann)
    start = world.engine.trained[1].start
    assert start is not None
    assert (start.user_id, start.number) == (ann.id, 2)


async def test_whose_entry_is_deleted_loses_half_as_well(world: World, ann: User, tell: Tell) -> None:
    world.engine.predicts = losing(whole=(1.5, 2.1), half=(1.7, 2.0))
    await tell(40)
    await world.train(ann)
    await world.history.delete(ann.id, EntryId(5))
    assert await world.adapters.active(ann.id) is None


async def test_an_engine_that_cannot_stage_half_leaves_neither(
    world: World, ann: User, tell: Tell, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.engine.predicts = losing(whole=(1.5, 2.1), half=(1.7, 2.0))
    stage = world.engine.stage

    async def only_whole(ref):  # type: ignore[no-untyped-def]
        if content(ref.path).endswith(HALF):
            raise AdapterError("It cannot be read.")
        await stage(ref)

    monkeypatch.setattr(world.engine, "stage", only_whole)
    await tell(40)
    run = await world.train(ann)
    assert (run.state, run.reason) == (RunState.FAILED, "It cannot be read.")
    assert world.folders() == []
