"""The official openai client is the client: sync and async, whole and streamed, and every error as it knows it."""

import asyncio
from typing import Any

import openai
import pytest
from live import Live, Start

from persona.domain import Rendered
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.errors import Busy, EngineDown

HI: Any = [{"role": "user", "content": "hi"}]


async def test_a_whole_answer(live: Live) -> None:
    client = await live.openai()
    answer = await client.chat.completions.create(model="persona", messages=HI)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "Hello."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == "persona"
    assert answer.system_fingerprint == "fp_scripted_0"
    assert answer.usage.completion_tokens == 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 1


async def test_the_answer_carries_the_turn_id_and_the_headers_say_the_same(live: Live) -> None:
    client = await live.openai()
    raw = await client.chat.completions.with_raw_response.create(model="persona", messages=HI)
    about = raw.parse().model_extra["persona"]
    assert about["recorded"] is True
    assert raw.headers["x-persona-turn"] == str(about["turn"])
    assert raw.headers["x-persona-conversation"] == about["conversation"]
    assert raw.headers["x-persona-recorded"] == "true"
    assert raw.headers["x-persona-version"] == "0"


async def test_the_fingerprint_names_the_version(live: Live) -> None:
    number = await live.publish()
    client = await live.openai()
    answer = await client.chat.completions.create(model="persona", messages=HI)
    assert answer.system_fingerprint == f"fp_scripted_{number}"


async def test_a_streamed_answer(start: Start) -> None:
    live = await start(ScriptedEngine("one two three"))
    client = await live.openai()
    stream = await client.chat.completions.create(model="persona", messages=HI, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["stop"]
    assert len({(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert chunks[-1].model_extra["persona"]["turn"] == 2
    assert chunks[-1].usage is None


async def test_a_reply_that_ignores_the_end_of_text_is_as_long_as_asked(live: Live) -> None:
    client = await live.openai()
    answer = await client.chat.completions.create(
        model="persona", messages=HI, max_tokens=7, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7
    assert answer.choices[0].message.content == "Hello." * 7


async def test_a_stream_ends_with_usage_when_asked(live: Live) -> None:
    client = await live.openai()
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [c async for c in await client.chat.completions.create(model="persona", messages=HI, **options)]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_synchronous_client_works_too(live: Live) -> None:
    key = await live.key()

    def talk() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) as client:
            whole = client.chat.completions.create(model="persona", messages=HI)
            with client.chat.completions.create(model="persona", messages=HI, stream=True) as stream:
                streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            return str(whole.choices[0].message.content), streamed

    assert await asyncio.to_thread(talk) == ("Hello.", "Hello.")


async def test_the_stream_helper_puts_the_pieces_together(start: Start) -> None:
    live = await start(ScriptedEngine("one two three"))
    client = await live.openai()
    async with client.chat.completions.stream(model="persona", messages=HI) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "one two three"


async def test_the_models_are_the_callers_own(live: Live) -> None:
    await live.publish("bob")
    client = await live.openai("ann")
    assert [model.id async for model in client.models.list()] == ["persona", "me", "base"]
    bob = await live.openai("bob")
    assert [model.id async for model in bob.models.list()] == ["persona", "me", "base", "persona@1"]
    assert (await bob.models.retrieve("persona@1")).owned_by == "persona"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("persona@1")


async def test_a_wrong_key_is_an_authentication_error(live: Live) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="pk-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()
    assert caught.value.code == "invalid_api_key"


async def test_an_unknown_model_is_a_not_found_error(live: Live) -> None:
    client = await live.openai()
    with pytest.raises(openai.NotFoundError) as caught:
        await client.chat.completions.create(model="gpt-4o", messages=HI)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


async def test_a_value_that_is_not_served_is_a_bad_request(live: Live) -> None:
    client = await live.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="persona", messages=HI, modalities=["audio"])
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "modalities")


async def test_a_prompt_that_does_not_fit_is_a_bad_request_as_openai_has_it(start: Start) -> None:
    live = await start(engine={"context": 256})
    client = await live.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="persona", messages=[{"role": "user", "content": "x" * 999}])
    assert caught.value.code == "context_length_exceeded"


async def test_a_busy_engine_is_a_503_that_the_client_retries(start: Start) -> None:
    engine = ScriptedEngine()
    engine.failure = Busy("Too many requests wait.", retry_after=1)
    live = await start(engine)
    client = await live.openai(max_retries=1)
    with pytest.raises(openai.InternalServerError) as caught:
        await client.chat.completions.create(model="persona", messages=HI)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "1"
    assert len(engine.requests) == 2


async def test_a_request_that_is_wrong_is_not_retried(start: Start) -> None:
    live = await start(http={"failures_per_minute": 100})
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="pk-wrong", max_retries=3) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.models.list()
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert live.services.metrics.refused_keys._value.get() == 1


async def test_an_engine_that_fails_in_mid_stream_ends_it_with_an_error_event(start: Start) -> None:
    engine = ScriptedEngine("one two three four five", delay=0.02)
    live = await start(engine)
    client = await live.openai()
    stream = await client.chat.completions.create(model="persona", messages=HI, stream=True)
    heard = [(await anext(stream)).choices[0].delta.content for _ in range(3)]
    engine.failure = EngineDown("The engine is being restarted.")
    with pytest.raises(openai.APIError, match="restarted"):
        heard += [chunk.choices[0].delta.content async for chunk in stream]
    assert heard[1] == "one"
    assert (await live.history())[-1][1].startswith("one")


async def test_an_engine_that_fails_before_the_first_word_is_a_status_even_for_a_stream(start: Start) -> None:
    engine = ScriptedEngine()
    engine.failure = EngineDown("The engine is being restarted.")
    live = await start(engine)
    client = await live.openai()
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(model="persona", messages=HI, stream=True)


async def test_silence_is_bridged_by_comments(start: Start) -> None:
    live = await start(ScriptedEngine("slow", delay=0.35), http={"ping_seconds": 0.1})
    headers = {"Authorization": f"Bearer {await live.key()}"}
    body = {"model": "persona", "messages": HI, "stream": True}
    async with live.http.post("/v1/chat/completions", json=body, headers=headers) as answer:
        text = await answer.text()
    assert answer.content_type == "text/event-stream"
    assert text.startswith(": ping\n\n")
    assert text.endswith("data: [DONE]\n\n")


async def test_feedback_rates_a_reply_by_its_turn(live: Live) -> None:
    client = await live.openai()
    answer = await client.chat.completions.create(model="persona", messages=HI)
    turn = answer.model_extra["persona"]["turn"]
    rated = await live.call("POST", "/v1/feedback", json={"turn": turn, "rating": 1, "correction": "Hello, Ann."})
    assert (rated["rating"], rated["correction"]) == (1, "Hello, Ann.")


async def test_what_records_nothing_rates_nothing(live: Live) -> None:
    turn = (await live.say("hi"))["persona"]["turn"]
    async with live.admin.post("/admin/users/ann/keys", json={"learn": False}) as made:
        live.keys["ann"] = (await made.json())["key"]
    for body in ({"turn": turn, "rating": 1}, {"turn": turn, "correction": "Buy gold."}):
        refused = await live.call("POST", "/v1/feedback", json=body, status=400)
        assert refused["error"]["code"] == "learning_disabled"
        await live.call("POST", "/v1/me/events/feedback", json=body, status=400)
    page = await live.call("GET", "/v1/me/history")
    assert {(entry["rating"], entry["correction"]) for entry in page["data"]} == {(None, None)}


@pytest.mark.parametrize("body", [{"turn": 2, "rating": 2}, {"turn": 2}, {"rating": 1}, {"turn": "2", "rating": 1}])
async def test_feedback_that_says_nothing_is_refused(live: Live, body: dict[str, Any]) -> None:
    await live.say("hi")
    await live.call("POST", "/v1/feedback", json=body, status=400)


async def test_a_users_own_words_cannot_be_rated(live: Live) -> None:
    await live.say("hi")
    await live.call("POST", "/v1/feedback", json={"turn": 1, "rating": 1}, status=404)


async def test_the_conversation_id_of_the_client_is_kept(live: Live) -> None:
    answer = await live.say("hi", metadata={"conversation_id": "kitchen-1"})
    assert answer["persona"]["conversation"] == "kitchen-1"
    await live.say("hi", metadata={"conversation_id": "no spaces"}, status=400)


async def test_sampling_reaches_the_engine_as_asked(live: Live) -> None:
    await live.say("hi", temperature=0.25, top_p=0.5, seed=7, stop=["\n", "END"], max_completion_tokens=9)
    sampling = live.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.25, 0.5, 7)
    assert (sampling.stop, sampling.max_tokens) == (("\n", "END"), 9)


async def test_usage_tells_what_the_prefix_cache_had(tiny: Live) -> None:
    client = await tiny.openai()
    first = await client.chat.completions.create(model="persona", messages=HI, max_tokens=3)
    said = {"role": "assistant", "content": "One two three."}
    messages: Any = [*HI, said, {"role": "user", "content": "And then?"}]
    second = await client.chat.completions.create(model="persona", messages=messages, max_tokens=3)
    found = [one.usage.prompt_tokens_details.cached_tokens for one in (first, second)]  # type: ignore[union-attr]
    assert found[0] == 0
    assert 0 < found[1] < first.usage.prompt_tokens  # type: ignore[operator, union-attr]
    assert found[1] % 32 == 0  # whole pages


# Models that think.


class Thinking(ScriptedText):
    """A base whose template opens the thought itself, unless it is told not to let the model think."""

    def render(self, messages: Any, *, reply: bool, think: bool | None = None) -> Rendered:
        made = super().render(messages, reply=reply)
        begins = self.encode("<think>\n" if think is not False else "<think>\n\n</think>\n\n")
        return Rendered([*made.tokens, *begins] if reply else made.tokens, made.spans)


THOUGHT = "<think>\nA greeting. </think>\n\nHello there."


async def test_thoughts_stand_beside_the_answer(start: Start) -> None:
    live = await start(ScriptedEngine(THOUGHT))
    client = await live.openai()
    message = (await client.chat.completions.create(model="persona", messages=HI)).choices[0].message
    assert (message.content, message.model_extra["reasoning_content"]) == ("Hello there.", "\nA greeting. ")
    said, thought = "", ""
    async for chunk in await client.chat.completions.create(model="persona", messages=HI, stream=True):
        delta = chunk.choices[0].delta
        said += delta.content or ""
        thought += (delta.model_extra or {}).get("reasoning_content", "")
    assert (said, thought) == ("Hello there.", "\nA greeting. ")
    assert await live.history() == [("user", "hi"), ("assistant", "Hello there.")]


@pytest.mark.parametrize("text", ["Hello.", "What <think> means: </think>.", "<thin", "<"])
async def test_an_answer_without_a_thought_is_whole(start: Start, text: str) -> None:
    client = await (await start(ScriptedEngine(text))).openai()
    message = (await client.chat.completions.create(model="base", messages=HI)).choices[0].message
    assert (message.content, message.model_extra) == (text, {})
    stream = await client.chat.completions.create(model="base", messages=HI, stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text


async def test_a_template_that_opens_the_thought_has_it_told_apart_too(start: Start) -> None:
    live = await start(ScriptedEngine("A greeting. </think>\n\nHello there."), tokenizer=Thinking())
    message = (await (await live.openai()).chat.completions.create(model="base", messages=HI)).choices[0].message
    assert (message.content, message.model_extra["reasoning_content"]) == ("Hello there.", "A greeting. ")
    answer = await (await live.ollama()).chat("base", [{"role": "user", "content": "hi"}])
    assert (answer.message.content, answer.message.thinking) == ("Hello there.", "A greeting. ")


@pytest.mark.parametrize("limit", [2, None])
async def test_a_thought_is_never_on_record_however_the_reply_ends(start: Start, limit: int | None) -> None:
    live = await start(ScriptedEngine("A greeting to all. </think>\n\nHello there."), tokenizer=Thinking())
    client = await live.openai()
    answer = await client.chat.completions.create(model="persona", messages=HI, max_tokens=limit)
    said = answer.choices[0].message.content
    assert said == ("" if limit else "Hello there.")
    assert await live.history() == [("user", "hi"), *([("assistant", said)] if said else [])]


async def test_a_reply_of_a_form_is_no_thought(start: Start) -> None:
    live = await start(ScriptedEngine('{"a": 1}'), tokenizer=Thinking())
    form: Any = {"type": "json_object"}
    client = await live.openai()
    answer = await client.chat.completions.create(model="base", messages=HI, response_format=form)
    assert answer.choices[0].message.content == '{"a": 1}'
    assert ScriptedText().decode(live.engine.requests[-1].tokens).endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("wish", "thinks"),
    [
        ({}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False, "messages": []}}}, False),
        ({"extra_body": {"chat_template_kwargs": {"thinking": True}}}, True),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": "no"}}}, True),
    ],
)
async def test_thinking_can_be_switched_off(start: Start, wish: dict[str, Any], thinks: bool) -> None:
    live = await start(ScriptedEngine("Hello there."), tokenizer=Thinking())
    await (await live.openai()).chat.completions.create(model="base", messages=HI, **wish)
    prompt = ScriptedText().decode(live.engine.requests[-1].tokens)
    assert prompt.endswith("<think>\n") == thinks
    await (await live.ollama()).chat("base", [{"role": "user", "content": "hi"}], think=thinks)
    assert ScriptedText().decode(live.engine.requests[-1].tokens) == prompt
