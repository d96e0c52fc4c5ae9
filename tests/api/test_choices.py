"""Several choices of one reply: each a sequence of its own, streamed side by side, each on record."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from live import Live, Start

from persona.engine.protocol import Chunk, GenerateRequest
from persona.engine.scripted import ScriptedEngine
from persona.errors import EngineDown

HI: Any = [{"role": "user", "content": "hi"}]


async def test_choices_are_different_replies_to_one_turn(start: Start) -> None:
    live = await start(ScriptedEngine(["one", "two", "three"]))
    answer = await (await live.openai()).chat.completions.create(model="persona", messages=HI, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == ["one", "two", "three"]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    assert await live.history() == [("user", "hi"), ("assistant", "one"), ("assistant", "two"), ("assistant", "three")]


async def test_each_choice_can_be_rated_and_continued(start: Start) -> None:
    live = await start(ScriptedEngine(["one", "two", "three"]))
    answer = await live.say("hi", n=2)
    turns = [choice["persona"]["turn"] for choice in answer["choices"]]
    assert answer["persona"] == answer["choices"][0]["persona"]
    assert len(set(turns)) == 2
    await live.call("POST", "/v1/feedback", json={"turn": turns[1], "rating": 1})
    second: Any = [*HI, {"role": "assistant", "content": "two"}, {"role": "user", "content": "and then?"}]
    again = await live.say("", messages=second)
    assert again["persona"]["conversation"] == answer["persona"]["conversation"]


async def test_choices_of_a_stream_come_side_by_side_and_each_ends_once(start: Start) -> None:
    live = await start(ScriptedEngine(["one two", "three", "four five six"], delay=0.01))
    client = await live.openai()
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    said: dict[int, str] = {}
    ended: list[int] = []
    async for chunk in await client.chat.completions.create(model="persona", messages=HI, n=3, **options):
        for choice in chunk.choices:
            said[choice.index] = said.get(choice.index, "") + (choice.delta.content or "")
            ended += [choice.index] if choice.finish_reason else []
    assert said == {0: "one two", 1: "three", 2: "four five six"}
    assert sorted(ended) == [0, 1, 2]
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 6


async def test_the_first_choice_has_begun_before_the_engine_is_asked_for_the_others(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their prompt is then known there, and computed once."""
    live = await start(ScriptedEngine("one two three"))
    said = 0
    seen: list[int] = []
    generate = live.engine.generate

    async def counted(request: GenerateRequest) -> AsyncIterator[Chunk]:
        nonlocal said
        seen.append(said)
        async for chunk in generate(request):
            said += 1
            yield chunk

    monkeypatch.setattr(live.engine, "generate", counted)
    await live.say("hi", n=3)
    assert seen[0] == 0
    assert min(seen[1:]) > 0


async def test_a_prompt_that_is_told_of_is_scored_once_for_all_its_choices(live: Live) -> None:
    body = {"model": "persona", "prompt": ["one two three", "four five"], "echo": True, "logprobs": 1, "max_tokens": 2}
    answer = await live.call("POST", "/v1/completions", json={**body, "n": 3})
    assert len(live.engine.scored) == 2
    told = [choice["logprobs"]["tokens"][:3] for choice in answer["choices"]]
    assert told[0] == told[1] == told[2] != told[3] == told[4] == told[5]


async def test_each_choice_has_a_seed_of_its_own(live: Live) -> None:
    await live.say("hi", n=3, seed=7)
    assert [request.sampling.seed for request in live.engine.requests] == [7, 8, 9]
    await live.say("hi", n=2)
    assert [request.sampling.seed for request in live.engine.requests[3:]] == [None, None]


async def test_when_one_choice_fails_the_others_end_with_it(start: Start) -> None:
    engine = ScriptedEngine("one two three four", delay=0.01)
    live = await start(engine)
    engine.failure = EngineDown("The engine is being restarted.")
    client = await live.openai()
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="persona", messages=HI, n=4)
    if others := [reply.task for reply in live.services.chat.running if reply.task]:
        await asyncio.wait(others, timeout=10)
    assert not live.services.chat.running


async def test_every_wish_reaches_the_engine(live: Live) -> None:
    wishes: dict[str, Any] = {"frequency_penalty": 0.5, "presence_penalty": -0.5, "repetition_penalty": 1.2}
    await live.say("hi", **wishes, top_k=40, min_p=0.05, logit_bias={"7": -100, "12": 3.5})
    asked = live.engine.requests[-1].sampling
    assert (asked.frequency_penalty, asked.presence_penalty, asked.repetition_penalty) == (0.5, -0.5, 1.2)
    assert (asked.top_k, asked.min_p, asked.logit_bias) == (40, 0.05, ((7, -100.0), (12, 3.5)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", "two"),
        ("n", 1.5),
        ("top_k", "many"),
        ("min_p", "0.1"),
        ("frequency_penalty", [1]),
        ("logit_bias", [5]),
        ("logit_bias", {"5": "a lot"}),
        ("logit_bias", {"5": None}),
    ],
)
async def test_a_value_of_another_type_is_refused_by_its_name(live: Live, field: str, value: Any) -> None:
    answer = await live.say("hi", status=400, **{field: value})
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"].startswith(field)
    assert await live.history() == []


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
@pytest.mark.parametrize("field", [b"temperature", b"frequency_penalty", b"min_p", b"repetition_penalty"])
async def test_what_is_no_number_is_refused(live: Live, field: bytes, number: bytes) -> None:
    body = b'{"model": "persona", "messages": [{"role": "user", "content": "hi"}], "%s": %s}' % (field, number)
    await live.call("POST", "/v1/chat/completions", data=body, status=400)
    assert live.engine.requests == []
