"""The measuring client against the real service: what it hears, what it counts as a refusal, what as an error."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from aiohttp import web
from live import Live, Start

from persona.cli_bench_client import Limit, Measured, Run, Target
from persona.engine.protocol import GenerateRequest
from persona.engine.scripted import ScriptedEngine
from persona.errors import Busy, EngineDown, PersonaError
from persona.wording import Wording
from persona.workload import Range, Workload

WORDS = Wording(1, {"word": 1})
WORK = Workload(2, Range(4, 9), Range(3, 5), turns=True)


async def measure(url: str, keys: list[str], limit: Limit, work: Workload = WORK, clients: int = 2) -> Measured:
    async with Target.open(url, keys) as target:
        run = Run(target, "persona", WORDS, work, clients)
        await run.go(limit)
        return run.found


async def keys(live: Live) -> list[str]:
    return [await live.key("ann"), await live.key("bob")]


async def test_replies_are_streamed_and_have_exactly_the_length_that_was_asked_for(live: Live) -> None:
    found = await measure(live.url + "/v1/", await keys(live), Limit(requests=10))
    assert [outcome.failure for outcome in found.outcomes] == [""] * 10
    assert all(o.tokens == o.request.reply == len(o.pieces) for o in found.outcomes)
    assert all(o.start <= o.pieces[0] <= o.pieces[-1] <= o.end <= found.seconds for o in found.outcomes)
    assert (found.sent, found.complete) == (10, True)
    assert {request.user_id for request in live.engine.requests} == {1, 2}
    assert all(request.sampling.temperature == 0 for request in live.engine.requests)
    assert await live.history("ann") == []


async def test_a_closed_loop_has_as_many_requests_under_way_as_clients_and_never_more(start: Start) -> None:
    under_way: set[int] = set()
    most, together = 0, asyncio.Barrier(3)

    class Counting(ScriptedEngine):
        async def generate(self, request: GenerateRequest) -> Any:
            nonlocal most
            under_way.add(id(request))
            most = max(most, len(under_way))
            await together.wait()
            try:
                async with aclosing(super().generate(request)) as chunks:  # type: ignore[type-var]
                    async for chunk in chunks:
                        yield chunk
            finally:
                under_way.discard(id(request))

    live = await start(Counting())
    found = await measure(live.url, await keys(live), Limit(requests=21), clients=3)
    assert [outcome.failure for outcome in found.outcomes] == [""] * 21
    assert most == 3


async def test_an_open_loop_sends_what_is_due_however_many_are_under_way(start: Start) -> None:
    live = await start(ScriptedEngine(delay=0.02))
    work = Workload(2, Range(4, 4), Range(5, 5), rate=500.0)
    found = await measure(live.url, await keys(live), Limit(requests=30), work)
    assert all(not outcome.failure for outcome in found.outcomes)
    assert max(outcome.start for outcome in found.outcomes) < min(outcome.end for outcome in found.outcomes)


@pytest.mark.parametrize("rate", [None, 200.0])
async def test_a_run_of_some_seconds_sends_nothing_after_them_and_waits_for_every_reply(
    start: Start, rate: float | None
) -> None:
    live = await start(ScriptedEngine(delay=0.005))
    work = Workload(2, Range(4, 4), Range(3, 3), rate=rate)
    found = await measure(live.url, await keys(live), Limit(seconds=0.2), work)
    assert found.complete
    assert found.sent == len(found.outcomes) > 0
    assert all(outcome.start < 0.2 for outcome in found.outcomes)


@pytest.mark.parametrize(
    ("error", "failure", "refused"),
    [
        (Busy("Too many requests are waiting.", retry_after=5), "busy", True),
        (Busy("Slow down.", status=429, code="rate_limited"), "rate_limited", True),
        (EngineDown("The engine is being restarted.", retry_after=5), "engine_unavailable", False),
        (PersonaError("Something broke."), "internal_error", False),
    ],
)
async def test_a_full_service_refuses_and_a_broken_one_fails(
    live: Live, error: PersonaError, failure: str, refused: bool
) -> None:
    live.engine.failure = error
    found = await measure(live.url, await keys(live), Limit(requests=2))
    assert {(outcome.failure, outcome.refused) for outcome in found.outcomes} == {(failure, refused)}


async def test_a_wrong_key_and_a_shorter_reply_are_errors(start: Start) -> None:
    live = await start(prompt={"max_reply_tokens": 4})
    found = await measure(live.url, [await live.key("ann"), "pk-wrong"], Limit(requests=2))
    assert {outcome.failure for outcome in found.outcomes if outcome.request.user == 1} == {"invalid_api_key"}
    work = Workload(1, Range(4, 4), Range(5, 5))
    found = await measure(live.url, await keys(live), Limit(requests=1), work)
    assert found.outcomes[0].failure == "wrong_length"


async def test_nobody_there_is_an_error_of_each_request_and_a_sentence_beforehand(unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    found = await measure(url, ["a", "b"], Limit(requests=2))
    assert {outcome.failure for outcome in found.outcomes} == {"connection"}
    async with Target.open(url, ["a"]) as target:
        assert await target.engine() == {}
        with pytest.raises(PersonaError, match="Nobody answers"):
            await target.wording("persona", WORK)


BODIES = {
    "broken_off": 'data: {"choices": [{"delta": {"content": "one"}}]}\n\n',
    "wrong_length": 'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n',
    "not_openai": "data: {{{\n\n",
    "odd": 'data: {"error": {"message": "no", "code": "odd"}}\n\n',
}


@pytest.mark.parametrize("failure", BODIES)
async def test_a_stream_that_is_no_whole_reply_is_an_error(aiohttp_server: Any, failure: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(text=BODIES[failure], content_type="text/event-stream")

    application = web.Application()
    application.router.add_post("/v1/chat/completions", answer)
    server = await aiohttp_server(application)
    found = await measure(str(server.make_url("/")), ["a", "b"], Limit(requests=2))
    assert {outcome.failure for outcome in found.outcomes} == {failure}


async def test_another_server_is_named_as_none_of_ours(aiohttp_server: Any) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"detail": "hello"})

    application = web.Application()
    application.router.add_post("/v1/me/why", answer)
    server = await aiohttp_server(application)
    async with Target.open(str(server.make_url("/")), ["a"]) as target:
        with pytest.raises(PersonaError, match="is no persona"):
            await target.wording("persona", WORK)


async def test_a_run_that_is_cancelled_keeps_what_it_found(start: Start) -> None:
    live = await start(ScriptedEngine(delay=0.01))
    async with Target.open(live.url, await keys(live)) as target:
        run = Run(target, "persona", WORDS, WORK, 2)
        task = asyncio.create_task(run.go(Limit(requests=10_000)))
        async with asyncio.timeout(30):
            while len(run.found.outcomes) < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not run.found.complete
    assert run.found.sent > len(run.found.outcomes) >= 3
    assert run.found.seconds > 0


async def test_the_engine_tells_what_it_counts(live: Live) -> None:
    async with Target.open(live.url, await keys(live)) as target:
        told = await target.engine()
    assert {"steps", "loads", "loaded_bytes", "resident", "resident_bytes", "memory"} <= told.keys()
