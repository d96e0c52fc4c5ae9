"""logprobs and top_logprobs of a chat, as OpenAI's client reads them."""

from typing import Any

import openai
import pytest
from live import Live, Start

from persona.engine.scripted import ScriptedEngine

HI: Any = [{"role": "user", "content": "hi"}]


async def test_a_whole_answer_tells_of_every_token(start: Start) -> None:
    live = await start(ScriptedEngine("one two"))
    answer = await (await live.openai()).chat.completions.create(
        model="persona", messages=HI, logprobs=True, top_logprobs=2
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert [(one.token, one.logprob, one.bytes) for one in told.content] == [("o", -1.0, [111]), (" ", -1.0, [32])]
    assert [(one.token, one.logprob) for one in told.content[0].top_logprobs] == [("o", -1.0), ("p", -2.0)]


async def test_a_stream_tells_of_tokens_beside_their_text(start: Start) -> None:
    live = await start(ScriptedEngine("one two three"))
    client = await live.openai()
    stream = await client.chat.completions.create(model="persona", messages=HI, logprobs=True, stream=True)
    seen = [
        (choice.delta.content, [one.token for one in choice.logprobs.content])
        async for chunk in stream
        for choice in chunk.choices
        if choice.logprobs and choice.logprobs.content
    ]
    assert seen == [("one", ["o"]), (" two", [" "]), (" three", [" "])]


async def test_nobody_is_told_who_did_not_ask(live: Live) -> None:
    client = await live.openai()
    answer = await client.chat.completions.create(model="persona", messages=HI)
    assert answer.choices[0].logprobs is None
    assert live.engine.requests[-1].sampling.logprobs is None


@pytest.mark.parametrize(
    ("change", "param", "word"),
    [
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs to be true"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs", "needs logprobs to be true"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "between 0 and 20"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs", "between 0 and 20"),
        ({"top_logprobs": "all", "logprobs": True}, "top_logprobs", "Expected int"),
        ({"logprobs": 5}, "logprobs", "Expected bool"),
    ],
)
async def test_what_cannot_be_told_is_refused(live: Live, change: dict[str, Any], param: str, word: str) -> None:
    with pytest.raises(openai.BadRequestError, match=word) as caught:
        await (await live.openai()).chat.completions.create(model="persona", messages=HI, extra_body=change)
    assert caught.value.param == param
    assert live.engine.requests == []


async def test_a_real_model_says_the_same_whole_and_streamed(tiny: Live) -> None:
    client = await tiny.openai()
    options: Any = {"model": "base", "messages": HI, "max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    whole = await client.chat.completions.create(**options, temperature=0, n=2, frequency_penalty=0.5)
    first, second = (choice.logprobs.content for choice in whole.choices)  # type: ignore[union-attr]
    assert first is not None
    assert second is not None
    assert [one.bytes for one in first] == [one.bytes for one in second]
    spelled = b"".join(bytes(one.bytes or []) for one in first)
    assert spelled.decode(errors="replace") == whole.choices[0].message.content
    assert all(len(one.top_logprobs) == 3 for one in first)
    stream = await client.chat.completions.create(**options, temperature=0, frequency_penalty=0.5, stream=True)
    told = [
        one
        async for chunk in stream
        for choice in chunk.choices
        for one in (choice.logprobs.content if choice.logprobs else None) or []
    ]
    assert [one.token for one in told] == [one.token for one in first]
    assert [one.logprob for one in told] == pytest.approx([one.logprob for one in first], abs=0.05)
