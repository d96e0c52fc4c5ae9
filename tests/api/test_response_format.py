"""response_format with OpenAI's client: text, any object, or a schema, and what cannot be followed is refused."""

import json
from typing import Any

import openai
import pydantic
import pytest
from live import Live

HI: Any = [{"role": "user", "content": "hi"}]


class Lamp(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")  # a random model would go on with properties of its own

    room: str = pydantic.Field(max_length=6)
    on: bool
    level: int = pydantic.Field(ge=0, le=100)


def of(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "lamp", "schema": schema, **more}}


async def test_a_real_model_answers_in_the_form_that_was_asked_for(tiny: Live) -> None:
    client = await tiny.openai()
    parsed = await client.chat.completions.parse(
        model="base", messages=HI, response_format=Lamp, max_tokens=200, n=2, temperature=1.0, seed=1
    )
    for choice in parsed.choices:
        assert isinstance(choice.message.parsed, Lamp)
        assert choice.finish_reason == "stop"
    options: Any = {"model": "persona", "messages": HI, "max_tokens": 200, "temperature": 0}
    stream = await client.chat.completions.create(**options, response_format=of(Lamp.model_json_schema()), stream=True)
    text = "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])
    assert Lamp.model_validate_json(text)
    assert (await tiny.history())[-1] == ("assistant", text)
    started = await client.chat.completions.create(
        **options | {"max_tokens": 8}, response_format={"type": "json_object"}
    )
    assert str(started.choices[0].message.content).startswith("{")
    free = await client.chat.completions.create(**options, response_format={"type": "text"})
    assert free.choices[0].finish_reason == "length"
    said = await (await tiny.ollama()).chat("base", HI, format=Lamp.model_json_schema(), options={"seed": 2})
    assert Lamp.model_validate_json(said.message.content or "")


async def test_the_form_reaches_the_engine(live: Live) -> None:
    await live.say("hi", response_format={"type": "json_object"})
    await live.say("hi", response_format=of({"type": "object"}, strict=True, description="A lamp."))
    first, second = (request.sampling.grammar for request in live.engine.requests)
    assert json.loads(first) == json.loads(second)
    await live.say("hi", response_format={"type": "text"})
    assert live.engine.requests[-1].sampling.grammar == ""


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


# Keeps a compiler busy for minutes, in 13 kB.
BOMB = {"allOf": [{"type": "string", "pattern": f".*{chr(97 + j % 26)}.{{{j}}}b.*"} for j in range(500)]}


@pytest.mark.parametrize(
    ("form", "param", "word"),
    [
        ("json", "response_format", "is an object whose type"),
        ([], "response_format", "is an object whose type"),
        ({}, "response_format.type", "text, json_object or json_schema"),
        ({"type": "xml"}, "response_format.type", "text, json_object or json_schema"),
        ({"type": ["text"]}, "response_format.type", "text, json_object or json_schema"),
        ({"type": "json_schema"}, "response_format.json_schema", "under schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema", "under schema"),
        (of(True), "response_format.json_schema", "under schema"),
        (of([1]), "response_format.json_schema", "under schema"),
        (of(deep(70)), "response_format.json_schema.schema", "64 levels"),
        (of({"enum": ["x" * 70_000]}), "response_format.json_schema.schema", "65536 bytes"),
        (of({"type": "strin"}), "response_format", "type is not one"),
        (of({"not": {}}), "response_format", "not supported: not"),
        (of({"type": "string", "pattern": "(?=ann)"}), "response_format", "look-around"),
        (of({"$ref": "file:///etc/passwd"}), "response_format", "another document"),
        (of({"type": "integer", "minimum": 2, "maximum": 1}), "response_format", "nothing satisfies"),
        (of(BOMB), "response_format", "too large or too complex"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_a_form_that_cannot_be_followed_is_refused_before_anything_is_stored(
    live: Live, form: Any, param: str, word: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=word) as caught:
        await (await live.openai()).chat.completions.create(model="persona", messages=HI, response_format=form)
    assert caught.value.param == param
    assert live.engine.requests == []
    assert await live.history() == []


async def test_others_are_answered_while_a_schema_is_tried_out(live: Live) -> None:
    """And what came of it is remembered: the second time nothing has to be tried."""
    client = await live.openai()
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match="too complex"):
            await client.chat.completions.create(model="persona", messages=HI, response_format=of(BOMB))
        assert (await live.say("hi"))["choices"][0]["message"]["content"] == "Hello."
    assert len(live.services.chat._schemas._known) == 1
