"""Who may have schemas tried out, whose turn it is, and what is remembered of it."""

import asyncio
from collections import deque

import pytest

from persona import chat_format
from persona.chat_format import Schemas
from persona.chat_turns import Turns
from persona.engine import schema
from persona.errors import Busy, RequestError

ANN, BOB, EVE = 1, 2, 3


class Bench:
    """In place of the process: each trial takes until `let`."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self._held: deque[asyncio.Future[str]] = deque()

    async def tried(self, grammar: str) -> str:
        self.begun.append(grammar)
        held = asyncio.get_running_loop().create_future()
        self._held.append(held)
        try:
            return await held
        finally:
            self.ended.append(grammar)

    async def let(self, problem: str = "") -> None:
        """End the trial under way."""
        self._held.popleft().set_result(problem)
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench()
    monkeypatch.setattr(chat_format, "_tried", made.tried)
    return made


async def asked(schemas: Schemas, user_id: int, *grammars: str) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(schemas.check(grammar, user_id)) for grammar in grammars]
    await settle()
    return tasks


async def test_a_user_may_have_two_new_schemas_tried_at_a_time(bench: Bench) -> None:
    schemas = Schemas()
    first = await asked(schemas, ANN, "a1", "a2")
    with pytest.raises(Busy, match="already") as caught:
        await schemas.check("a3", ANN)
    assert (caught.value.status, caught.value.retry_after) == (429, schema.SECONDS)
    await bench.let()
    third = await asked(schemas, ANN, "a3")
    await bench.let()
    await bench.let()
    await asyncio.gather(*first, *third)
    assert bench.begun == ["a1", "a2", "a3"]
    await schemas.check("a3", ANN)  # known: nothing is tried


async def test_threat_32_what_was_tried_out_can_be_forgotten(bench: Bench) -> None:
    schemas = Schemas()
    for _ in range(2):
        (task,) = await asked(schemas, ANN, "a1")
        await bench.let()
        await task
        schemas.forget()
    assert bench.begun == ["a1", "a1"]


async def test_a_turn_goes_to_another_user_who_waits(bench: Bench) -> None:
    schemas = Schemas()
    tasks = await asked(schemas, EVE, "e1", "e2")
    tasks += await asked(schemas, ANN, "a1", "a2")
    tasks += await asked(schemas, BOB, "b1")
    await bench.let()
    tasks += await asked(schemas, EVE, "e3")
    for _ in range(5):
        await bench.let()
    await asyncio.gather(*tasks)
    assert bench.begun == ["e1", "a1", "e2", "b1", "a2", "e3"]


async def test_many_requests_with_one_new_schema_are_one_trial(bench: Bench) -> None:
    schemas = Schemas()
    tasks = await asked(schemas, ANN, *["same"] * 5) + await asked(schemas, BOB, "same")
    assert bench.begun == ["same"]
    await bench.let("it is bad")
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, RequestError) and "it is bad" in result.message for result in results)


async def test_a_trial_that_nobody_waits_for_any_more_ends(bench: Bench) -> None:
    schemas = Schemas()
    left, stays = await asked(schemas, ANN, "a", "a")
    (waits,) = await asked(schemas, BOB, "b")
    left.cancel()
    await settle()
    assert bench.ended == []
    stays.cancel()
    await settle()
    assert (bench.ended, bench.begun) == (["a"], ["a", "b"]), "and the next one has its turn"
    waits.cancel()
    await settle()
    assert schemas._trials == {}
    assert not schemas._turns._taken


async def test_who_gives_up_waiting_leaves_the_turns_of_others_as_they_were() -> None:
    turns, order = Turns(), list[int]()

    async def take(user_id: int) -> None:
        async with turns.of(user_id):
            order.append(user_id)
            await asyncio.sleep(0)

    async with turns.of(ANN):
        tasks = [asyncio.create_task(take(user_id)) for user_id in (ANN, BOB, EVE)]
        await settle()
        tasks[1].cancel()
        await settle()
    tasks[2].cancel()  # to whom the turn was just handed
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [ANN]
    async with turns.of(BOB):
        assert turns._waiting == {}


async def test_a_wait_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy says nothing of a schema: it is tried out again, and is good."""
    schemas, grammar = Schemas(), schema.grammar({"type": "object"})
    with monkeypatch.context() as busy:
        busy.setattr(chat_format, "_WAIT", 0.0)
        with pytest.raises(Busy, match="too busy"):
            await schemas.check(grammar, ANN)
    await schemas.check(grammar, ANN)
    assert schemas._known == {grammar: ""}


async def test_whom_nobody_named_may_try_any_number(bench: Bench) -> None:
    schemas = Schemas()
    tasks = await asked(schemas, 0, "1", "2", "3", "4")
    for _ in tasks:
        await bench.let()
    await asyncio.gather(*tasks)
    assert bench.begun == ["1", "2", "3", "4"]
