"""The official ollama client is the client, and Home Assistant's way of using it the story."""

import asyncio
import contextlib
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import aiohttp
import msgspec
import ollama
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as rules
from hypothesis import strategies as st
from live import Live, Start

import persona
from persona import chat_ollama
from persona.chat_sampling import Limits
from persona.engine.protocol import GenerateRequest
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.errors import Busy, EngineDown, PersonaError
from persona.wire import decode

HI: Any = [{"role": "user", "content": "hi"}]
LAMP: Any = {
    "type": "function",
    "function": {
        "name": "HassTurnOn",
        "description": "Turns on a device.",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
    },
}
CALL = '<tool_call>\n{"name": "HassTurnOn", "arguments": {"name": "desk lamp"}}\n</tool_call>'


def read(request: GenerateRequest) -> str:
    """The prompt as the model reads it."""
    return ScriptedText().decode(request.tokens)


async def refused(call: Any, status: int, match: str) -> None:
    with pytest.raises(ollama.ResponseError, match=match) as caught:
        await call
    assert caught.value.status_code == status


# Models.


async def test_the_models_are_the_callers_own_under_ollamas_names(live: Live) -> None:
    number = await live.publish("bob")
    mine = (await (await live.ollama("ann")).list()).models
    assert [model.model for model in mine] == ["persona:latest", "me:latest", "base:latest"]
    theirs = (await (await live.ollama("bob")).list()).models
    assert [model.model for model in theirs][3:] == [f"persona@{number}:latest"]
    assert theirs[0].digest == theirs[3].digest != theirs[2].digest == "scripted"
    assert theirs[0].size == len(b"weights")
    assert theirs[0].modified_at is not None
    assert theirs[0].modified_at <= datetime.now(UTC)


async def test_one_model_is_in_memory_whatever_its_names(live: Live) -> None:
    (model,) = (await (await live.ollama()).ps()).models
    assert (model.model, model.context_length) == ("persona:latest", 8192)
    assert model.expires_at is not None
    assert model.expires_at.year == 9999


async def test_nothing_is_in_memory_while_the_engine_is_down(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    async def health() -> None:
        raise EngineDown("It is being restarted.")

    monkeypatch.setattr(live.engine, "health", health)
    assert (await (await live.ollama()).ps()).models == []


async def test_a_model_is_shown_with_what_it_can_do(live: Live) -> None:
    client = await live.ollama()
    shown = await client.show("me")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo["persona.context_length"] == live.services.settings.engine.context
    await refused(client.show("llama3.2"), 404, "does not exist")


async def test_the_version_is_personas(live: Live) -> None:
    assert await live.call("GET", "/api/version") == {"version": persona.__version__}


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_is_pulled(live: Live, stream: bool) -> None:
    client = await live.ollama()
    await refused(pulled(client, stream), 400, "Nothing is pulled here: choose one of the models")


async def pulled(client: ollama.AsyncClient, stream: bool) -> None:
    if not stream:
        await client.pull("llama3.2")
    else:
        async for _ in await client.pull("llama3.2", stream=True):
            raise AssertionError


# Chat.


async def test_a_whole_answer(live: Live) -> None:
    answer = await (await live.ollama()).chat("persona", HI)
    assert (answer.model, answer.message.role, answer.message.content) == ("persona", "assistant", "Hello.")
    assert (answer.done, answer.done_reason, answer.eval_count) == (True, "stop", 1)
    assert answer.message.tool_calls is None
    assert answer.message.thinking is None
    assert await live.history() == [("user", "hi"), ("assistant", "Hello.")]


async def test_a_streamed_answer(start: Start) -> None:
    live = await start(ScriptedEngine("one two three"))
    parts = [part async for part in await (await live.ollama()).chat("persona:latest", HI, stream=True)]
    assert [part.message.content for part in parts] == ["one", " two", " three", ""]
    assert [part.done for part in parts] == [False, False, False, True]
    assert {part.model for part in parts} == {"persona:latest"}
    assert {part.message.role for part in parts} == {"assistant"}
    assert parts[-1].done_reason == "stop"


async def test_an_answer_is_streamed_unless_told_otherwise(live: Live) -> None:
    headers = {"Authorization": f"Bearer {await live.key()}"}
    async with live.http.post("/api/chat", json={"model": "persona", "messages": HI}, headers=headers) as answer:
        lines = (await answer.text()).splitlines()
        assert answer.content_type == "application/x-ndjson"
        assert answer.headers["x-persona-recorded"] == "true"
    assert [json.loads(line)["done"] for line in lines] == [False, True]
    assert json.loads(lines[-1])["persona"]["turn"] == 2


async def test_counts_and_durations_are_measured(start: Start) -> None:
    live = await start(ScriptedEngine("one two three", delay=0.05))
    answer = await (await live.ollama()).chat("persona", HI)
    assert answer.prompt_eval_count == len(live.engine.requests[-1].tokens)
    assert answer.eval_count == 3
    assert answer.prompt_eval_duration >= 50_000_000
    assert 100_000_000 <= answer.eval_duration < answer.total_duration
    assert answer.prompt_eval_duration + answer.eval_duration == pytest.approx(answer.total_duration, abs=10)
    assert answer.load_duration is None


async def test_the_synchronous_client_works_too(live: Live) -> None:
    headers = {"Authorization": f"Bearer {await live.key()}"}

    def talk() -> tuple[str | None, str]:
        with contextlib.closing(ollama.Client(live.url, headers=headers)) as client:
            assert len(client.list().models) == 3
            streamed = client.chat("persona", HI, stream=True)
            return client.chat("persona", HI).message.content, "".join(part.message.content or "" for part in streamed)

    assert await asyncio.to_thread(talk) == ("Hello.", "Hello.")


async def test_options_reach_the_engine_as_asked(live: Live) -> None:
    client = await live.ollama()
    options = {"temperature": 0.25, "top_p": 0.5, "seed": 7, "stop": ["\n", "END"], "num_predict": 9}
    await client.chat("persona", HI, options=options)
    sampling = live.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.25, 0.5, 7)
    assert (sampling.stop, sampling.max_tokens) == (("\n", "END"), 9)


async def test_every_option_of_sampling_reaches_the_engine(live: Live) -> None:
    client = await live.ollama()
    options = {"top_k": 40, "min_p": 0.05, "repeat_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    await client.chat("persona", HI, options=options)
    asked = live.engine.requests[-1].sampling
    assert (asked.top_k, asked.min_p, asked.repetition_penalty) == (40, 0.05, 1.1)
    assert (asked.presence_penalty, asked.frequency_penalty) == (0.5, -0.5)


async def test_options_that_only_a_loader_heeds_are_ignored(live: Live) -> None:
    client = await live.ollama()
    options = {"num_ctx": 8192, "num_gpu": 99, "repeat_last_n": 64, "num_predict": -1, "mirostat": 0}
    for keep_alive in ("5m", -1, 0):
        await client.chat("persona", HI, options=options, keep_alive=keep_alive, format="", logprobs=False)
    assert live.engine.requests[-1].sampling.max_tokens == live.services.settings.prompt.max_reply_tokens


async def test_a_reply_cut_by_its_length_says_so(start: Start) -> None:
    live = await start(ScriptedEngine("one two three"))
    answer = await (await live.ollama()).chat("persona", HI, options={"num_predict": 2})
    assert (answer.message.content, answer.done_reason) == ("one two", "length")


@pytest.mark.parametrize("name", ["persona", "persona:latest", "persona@1", "persona@1:latest", "me:latest", "base"])
async def test_models_go_by_either_name(live: Live, name: str) -> None:
    await live.publish()
    answer = await (await live.ollama()).chat(name, HI)
    assert answer.model == name
    assert (live.engine.requests[-1].adapter is None) is (name == "base")


@pytest.mark.parametrize("name", ["llama3.2:latest", "persona:7", "persona@9", ":latest", "persona:latest:latest"])
async def test_an_unknown_model_is_not_found(live: Live, name: str) -> None:
    client = await live.ollama()
    await refused(client.chat(name, HI), 404, "does not exist")
    with pytest.raises(ollama.ResponseError) as caught:
        [_ async for _ in await client.chat(name, HI, stream=True)]
    assert caught.value.status_code == 404


async def test_thoughts_go_out_apart_from_the_answer(start: Start) -> None:
    live = await start(ScriptedEngine("<think>\nA greeting. </think>\n\nHello there."))
    client = await live.ollama()
    for options in ({}, {"think": True}, {"think": "low"}):
        answer = await client.chat("persona", HI, **options)
        assert (answer.message.content, answer.message.thinking) == ("Hello there.", "\nA greeting. ")
    parts = [part.message async for part in await client.chat("persona", HI, stream=True)]
    assert "".join(part.content for part in parts) == "Hello there."
    assert "".join(part.thinking or "" for part in parts) == "\nA greeting. "
    assert await live.history() == [("user", "hi"), ("assistant", "Hello there.")]


async def test_thoughts_that_nobody_wants_are_not_sent(start: Start) -> None:
    live = await start(ScriptedEngine("<think> secret plan </think> Hello."))
    client = await live.ollama()
    assert (await client.chat("persona", HI, think=False)).message.content == "Hello."
    parts = [part.message async for part in await client.chat("persona", HI, think=False, stream=True)]
    assert "".join(part.content for part in parts) == "Hello."
    assert not any(part.thinking for part in parts)


@pytest.mark.parametrize("text", ["<think>never ends", "<thin", " x", "What <think> means: </think>.", "<", " \n"])
async def test_what_is_no_thought_before_an_answer_is_not_lost(start: Start, text: str) -> None:
    live = await start(ScriptedEngine(text))
    message = (await (await live.ollama()).chat("base", HI)).message
    assert f"{message.content}{message.thinking or ''}" == text.removeprefix("<think>")


# What Ollama's own program asks.


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_the_program_finds_somebody_at_the_root_of_its_address(live: Live, method: str) -> None:
    key = await live.key("ann")
    async with aiohttp.ClientSession() as session:
        for path, headers, status in (
            (f"/key/{key}/", {}, 200),
            ("/", {"Authorization": f"Bearer {key}"}, 200),
            ("/", {}, 401),
            ("/key/pk-wrong/", {}, 401),
        ):
            async with session.request(method, f"{live.url}{path}", headers=headers) as answer:
                assert answer.status == status


async def test_a_request_without_words_finds_the_model_loaded(live: Live) -> None:
    client = await live.ollama()
    answer = await client.chat("persona", [])
    assert (answer.done, answer.done_reason, answer.message.content) == (True, "load", "")
    made = await client.generate("persona:latest", "")
    assert (made.done, made.done_reason, made.response) == (True, "load", "")
    await refused(client.generate("persona@9", ""), 404, "does not exist")
    assert live.engine.requests == []


async def test_a_prompt_is_answered_as_a_message(start: Start) -> None:
    live = await start(ScriptedEngine("<think>hm</think>Hello there."))
    client = await live.ollama()
    answer = await client.generate("persona", "hi", system="Be short.", options={"num_predict": 5})
    assert (answer.response, answer.thinking, answer.done_reason) == ("Hello there.", "hm", "stop")
    assert "Be short." in read(live.engine.requests[-1])
    assert live.engine.requests[-1].sampling.max_tokens == 5
    parts = [part async for part in await client.generate("persona", "hi", stream=True)]
    assert "".join(part.response for part in parts) == "Hello there."
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert await live.history() == [("user", "hi"), ("assistant", "Hello there.")]


@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", "end"), ("template", "{{ .Prompt }}"), ("raw", True), ("context", [1, 2]), ("images", ["aGk="])],
)
async def test_what_cannot_be_done_with_a_prompt_is_refused_by_name(live: Live, field: str, value: Any) -> None:
    body = {"model": "persona", "prompt": "hi", field: value}
    answer = await live.call("POST", "/api/generate", json=body, status=400)
    assert field in answer["error"].lower()
    assert live.engine.requests == []


# Refusals, in Ollama's form.


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"format": "xml"}, "format"),
        ({"format": 5}, "format"),
        ({"format": {"type": "strin"}}, "type is not one"),
        ({"format": "json", "tools": [LAMP]}, "format or tools"),
        ({"logprobs": True}, "logprobs"),
        ({"options": {"mirostat": 1}}, "options.mirostat"),
        ({"options": {"presence_penalty": 2.5}}, "options.presence_penalty"),
        ({"options": {"repeat_penalty": -1}}, "options.repeat_penalty"),
        ({"options": {"top_k": -5}}, "options.top_k"),
        ({"options": {"temperature": 9}}, "options.temperature"),
        ({"options": {"num_predict": 10**9}}, "options.num_predict"),
        ({"options": {"num_predict": 0}}, "options.num_predict"),
        ({"options": {"seed": 1 << 70}}, "options.seed"),
        ({"options": {"stop": [""]}}, "options.stop"),
        ({"options": {"stop": 5}}, "options.stop"),
        ({"messages": [*HI, {"role": "user", "content": ""}]}, "last message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "Images are not supported"),
        ({"messages": "x"}, "messages"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "function with a name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "function with a name"),
        ({"tools": [{"type": "function"}]}, "function"),
    ],
    ids=str,
)
async def test_what_is_not_served_is_refused_by_name_before_anything_is_stored(
    live: Live, change: dict[str, Any], word: str
) -> None:
    body = {"model": "persona", "messages": HI, **change}
    answer = await live.call("POST", "/api/chat", json=body, status=400)
    assert set(answer) == {"error"}
    assert word in answer["error"]
    assert live.engine.requests == []
    assert await live.history() == []


def nested(levels: int) -> Any:
    return {"a": nested(levels - 1)} if levels else {}


async def test_deep_nesting_is_refused_wherever_it_stands(live: Live) -> None:
    for levels in (70, 300, 800):
        deep = nested(levels)
        tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
        body = {"model": "persona", "messages": HI, "tools": [tool]}
        assert "nested" in (await live.call("POST", "/api/chat", json=body, status=400))["error"]
        calls = [{"function": {"name": "f", "arguments": deep}}]
        body = {"model": "persona", "messages": [{"role": "assistant", "tool_calls": calls}, *HI]}
        assert "nested" in (await live.call("POST", "/api/chat", json=body, status=400))["error"]


async def test_too_many_tools_are_too_large(live: Live) -> None:
    client = await live.ollama()
    await refused(client.chat("persona", HI, tools=[LAMP] * 129), 413, "at most 128 tools")
    long = {"type": "function", "function": {"name": "f", "description": "x" * 70_000}}
    await refused(client.chat("persona", HI, tools=[long]), 413, "at most 65536 bytes")


async def test_a_conversation_that_does_not_fit_says_how_much_does(start: Start) -> None:
    live = await start(engine={"context": 256})
    client = await live.ollama()
    await refused(client.chat("persona", [{"role": "user", "content": "x" * 999}]), 400, "Send fewer messages")


async def test_a_wrong_key_is_an_error_that_home_assistant_knows(live: Live) -> None:
    client = await live.ollama(headers={"Authorization": "Bearer pk-wrong"})
    await refused(client.list(), 401, "Send a valid key")


async def test_a_busy_engine_is_a_503(start: Start) -> None:
    live = await start()
    live.engine.failure = Busy("Too many requests wait.", retry_after=1)
    client = await live.ollama()
    await refused(client.chat("persona", HI), 503, "Too many")
    with pytest.raises(ollama.ResponseError, match="Too many"):
        [_ async for _ in await client.chat("persona", HI, stream=True)]


async def test_an_engine_that_fails_in_mid_stream_ends_it_with_an_error_line(start: Start) -> None:
    live = await start(ScriptedEngine("one two three four five", delay=0.02))
    stream = await (await live.ollama()).chat("persona", HI, stream=True)
    assert (await anext(stream)).message.content == "one"
    live.engine.failure = EngineDown("The engine is being restarted.")
    with pytest.raises(ollama.ResponseError, match="being restarted"):
        [_ async for _ in stream]
    assert (await live.history())[-1][1].startswith("one")


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/create"), ("POST", "/api/embed"), ("DELETE", "/api/delete"), ("GET", "/api/nothing")],
)
async def test_what_is_not_there_is_told_in_ollamas_form(live: Live, method: str, path: str) -> None:
    assert await live.call(method, path, status=404) == {"error": "There is nothing at this path."}
    assert set(await live.call(method, path, user=None, status=401)) == {"error"}
    wrong = await live.call("DELETE", "/api/chat", status=405)
    assert set(wrong) == {"error"}


async def test_silence_is_bridged_by_empty_parts(start: Start) -> None:
    live = await start(ScriptedEngine("slow", delay=0.35), http={"ping_seconds": 0.1})
    parts = [part async for part in await (await live.ollama()).chat("persona", HI, stream=True)]
    assert len(parts) > 3
    assert (parts[0].message.content, parts[0].done) == ("", False)
    assert "".join(part.message.content for part in parts) == "slow"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is watched has no event
            await asyncio.sleep(0.01)


async def gone(live: Live) -> None:
    """Wait until the reply is aborted and on record."""
    await until(lambda: live.engine.aborted == 1 and not live.services.chat.running)


async def test_a_client_that_leaves_ends_the_generation(start: Start) -> None:
    live = await start(ScriptedEngine(" ".join(["word"] * 500), delay=0.01))
    stream = await (await live.ollama()).chat("persona", HI, stream=True)
    await anext(stream)
    await stream.aclose()
    await gone(live)
    page = await live.call("GET", "/v1/me/history")
    assert [entry["finish"] for entry in page["data"]] == [None, "abort"]


# Tools.


class Home:
    """What Home Assistant does with a conversation: asks, runs the tools that are called, and asks again."""

    def __init__(self, client: ollama.AsyncClient, model: str = "persona:latest") -> None:
        self.client = client
        self.model = model
        self.messages: list[ollama.Message] = [ollama.Message(role="system", content="You are a voice assistant.")]
        self.done: list[tuple[str, dict[str, Any]]] = []

    async def say(self, text: str) -> str:
        self.messages.append(ollama.Message(role="user", content=text))
        for _ in range(10):
            message = await self._ask()
            self.messages.append(message)
            if not message.tool_calls:
                return message.content or ""
            for call in message.tool_calls:
                self.done.append((call.function.name, dict(call.function.arguments)))
                result = json.dumps({"data": {"success": True}, "error": None})
                self.messages.append(ollama.Message(role="tool", content=result))
        raise AssertionError("it calls tools for ever")

    async def _ask(self) -> ollama.Message:
        stream = await self.client.chat(
            model=self.model,
            messages=list(self.messages),
            tools=[LAMP],
            stream=True,
            keep_alive=-1,
            options={"num_ctx": 8192},
            think=False,
            format=None,
        )
        content, calls = "", []
        async for part in stream:
            content += part.message.content or ""
            calls += part.message.tool_calls or []
        return ollama.Message(role="assistant", content=content, tool_calls=calls or None)


def obliging(request: GenerateRequest) -> str:
    """A model that calls the tool it was told about, once it is asked to, and then reports."""
    prompt = read(request)
    if prompt.rstrip().endswith("</tool_response>"):
        return "The lamp is on."
    return f"One moment. {CALL}" if "HassTurnOn" in prompt and prompt.endswith("turn on the lamp") else "Fine."


async def test_home_assistant_turns_on_a_lamp(start: Start) -> None:
    live = await start(ScriptedEngine(obliging))
    home = Home(await live.ollama())
    assert await home.say("turn on the lamp") == "The lamp is on."
    assert home.done == [("HassTurnOn", {"name": "desk lamp"})]
    assert await home.say("thanks") == "Fine."


async def test_the_model_sees_tools_call_and_result(start: Start) -> None:
    live = await start(ScriptedEngine(obliging))
    await Home(await live.ollama()).say("turn on the lamp")
    first, second = (read(request) for request in live.engine.requests)
    assert '<tools>\n{"type":"function","function":{"name":"HassTurnOn"' in first
    assert first.index("<tools>") < first.index("You are a voice assistant.") < first.index("turn on the lamp")
    call = '<tool_call>\n{"name":"HassTurnOn","arguments":{"name":"desk lamp"}}\n</tool_call>'
    result = '<tool_response>\n{"data": {"success": true}, "error": null}\n</tool_response>'
    assert second == f"{first}One moment. \n\n{call}{result}"


async def test_calls_and_results_are_no_history(start: Start) -> None:
    live = await start(ScriptedEngine(obliging))
    home = Home(await live.ollama())
    await home.say("turn on the lamp")
    await home.say("thanks")
    assert await live.history() == [
        ("user", "turn on the lamp"),
        ("assistant", "One moment."),
        ("assistant", "The lamp is on."),
        ("user", "thanks"),
        ("assistant", "Fine."),
    ]
    page = await live.call("GET", "/v1/me/history")
    assert len({entry["conversation"] for entry in page["data"]}) == 1


async def test_a_reply_that_only_calls_is_no_turn(start: Start) -> None:
    live = await start(ScriptedEngine([CALL, "Done."]))
    home = Home(await live.ollama())
    assert await home.say("turn on the lamp") == "Done."
    assert await live.history() == [("user", "turn on the lamp"), ("assistant", "Done.")]


async def test_a_call_in_a_whole_answer(start: Start) -> None:
    live = await start(ScriptedEngine(f"Sure. {CALL}\n{CALL}"))
    message = (await (await live.ollama()).chat("persona", HI, tools=[LAMP])).message
    assert message.content == "Sure. \n"
    assert [call.function.arguments for call in message.tool_calls] == [{"name": "desk lamp"}] * 2


async def test_no_part_of_a_tag_leaks_and_text_before_it_streams_on(start: Start) -> None:
    live = await start(ScriptedEngine(f"I will do <tool _now> it {CALL}"))
    stream = await (await live.ollama()).chat("persona", HI, tools=[LAMP], stream=True)
    parts = [part.message async for part in stream]
    assert [part.content for part in parts if part.content] == ["I", " will", " do", " ", "<tool _now>", " it", " "]
    assert [len(part.tool_calls) for part in parts if part.tool_calls] == [1]


async def test_a_broken_call_goes_out_as_text(start: Start) -> None:
    broken = '<tool_call>\n{"name": "HassTurnOn", "arguments": {"name": desk}}\n</tool_call>'
    live = await start(ScriptedEngine(broken))
    client = await live.ollama()
    message = (await client.chat("persona", HI, tools=[LAMP])).message
    assert (message.content, message.tool_calls) == (broken, None)
    parts = [part.message async for part in await client.chat("persona", HI, tools=[LAMP], stream=True)]
    assert "".join(part.content for part in parts) == broken


async def test_without_tools_a_tag_is_text(start: Start) -> None:
    live = await start(ScriptedEngine(CALL))
    message = (await (await live.ollama()).chat("persona", HI)).message
    assert (message.content, message.tool_calls) == (CALL, None)


async def test_a_conversation_cut_to_its_end_is_answered(live: Live) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": ""},
    ]
    answer = await (await live.ollama()).chat("persona", messages, tools=[LAMP])
    assert answer.message.content == "Hello."
    assert "(no output)" in read(live.engine.requests[-1])


async def test_a_call_that_a_client_does_not_wait_for_is_no_history(start: Start) -> None:
    words = " ".join(["word"] * 500)
    live = await start(ScriptedEngine(f'Wait. <tool_call> {{"name": "{words}', delay=0.01))
    stream = await (await live.ollama()).chat("persona", HI, tools=[LAMP], stream=True)
    await anext(stream)
    (reply,) = live.services.chat.running
    await until(lambda: reply.tokens > 5)
    await stream.aclose()
    await gone(live)
    assert await live.history() == [("user", "hi"), ("assistant", "Wait.")]


async def test_a_real_engine_hears_of_tools_and_goes_on_after_their_results(tiny: Live) -> None:
    client = await tiny.ollama()
    (loaded,) = (await client.ps()).models
    assert loaded.size > 0
    assert (loaded.size_vram, loaded.details.quantization_level) == (0, "int4")
    assert all(model.size > 0 for model in (await client.list()).models)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    messages: Any = [*HI, call, {"role": "tool", "content": '{"data": 1}'}]
    options = {"num_predict": 12, "temperature": 0}
    # The second one finds the first's beginning in the prefix cache; the third finds what the second found.
    _, whole = [await client.chat("persona", messages, tools=[LAMP], options=options, think=False) for _ in "ab"]
    stream = await client.chat("persona", messages, tools=[LAMP], options=options, think=False, stream=True)
    parts = [part async for part in stream]
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert parts[-1].eval_count == whole.eval_count == 12
    assert parts[-1].prompt_eval_duration > 0


# Devices, and clients that know nothing but an address.


async def device(live: Live) -> str:
    async with live.admin.post("/admin/users/ann/keys", json={"device": True}) as answer:
        return str((await answer.json())["key"])


async def test_what_is_said_to_a_shared_device_is_answered_and_not_recorded(start: Start) -> None:
    live = await start(ScriptedEngine(obliging))
    await live.key("ann")
    client = await live.ollama(headers={"Authorization": f"Bearer {await device(live)}"})
    assert await Home(client).say("turn on the lamp") == "The lamp is on."
    assert await live.history("ann") == []


async def test_a_device_that_is_a_tenant_of_its_own_does_not_learn(live: Live) -> None:
    async with live.admin.post("/admin/users", json={"name": "kitchen", "device": True}) as answer:
        live.keys["kitchen"] = (await answer.json())["key"]
    assert (await (await live.ollama("kitchen")).chat("persona", HI)).message.content == "Hello."
    assert await live.history("kitchen") == []


async def test_the_key_may_stand_in_the_address(start: Start) -> None:
    live = await start(ScriptedEngine(obliging))
    await live.key("ann")
    client = ollama.AsyncClient(f"{live.url}/key/{await device(live)}/")
    live.stack.push_async_callback(client.close)
    assert len((await client.list()).models) == 3
    assert len((await client.ps()).models) == 1
    assert await Home(client).say("turn on the lamp") == "The lamp is on."
    await refused(client.pull("llama3.2"), 400, "Nothing is pulled")
    assert (await client.generate("persona", "hi")).response
    await refused(client.embed("persona", "hi"), 404, "nothing at this path")


async def test_the_key_in_the_address_opens_nothing_but_ollamas_routes(live: Live) -> None:
    key = await live.key()
    for path in ("/v1/me", "/v1/me/history", "/metrics", "/admin/status", "", "/api/"):
        await live.call("GET", f"/key/{key}{path}", user=None, status=404)


@pytest.mark.parametrize("key", ["pk-wrong", "%20", "k%C3%A9y", "x" * 4000, "a%2Fb"])
async def test_a_wrong_key_in_the_address_is_refused_whatever_the_header_says(live: Live, key: str) -> None:
    answer = await live.call("GET", f"/key/{key}/api/tags", user="ann", status=401)
    assert set(answer) == {"error"}


async def test_wrong_keys_in_the_address_count_as_any_others(start: Start) -> None:
    live = await start(http={"failures_per_minute": 3})
    for number in range(3):
        await live.call("GET", f"/key/pk-{number}/api/tags", user=None, status=401)
    assert "Too many wrong keys" in str(await live.call("GET", "/key/pk-4/api/tags", user=None, status=429))


async def test_on_the_admin_socket_a_header_names_the_user(live: Live) -> None:
    await live.key("ann")
    async with live.admin.get("/api/tags", headers={"x-persona-user": "ann"}) as answer:
        assert len((await answer.json())["models"]) == 3
    async with live.admin.get("/api/tags") as answer:
        assert answer.status == 401


# Hostile bodies.

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"])},
    optional={
        "content": st.none() | st.text(max_size=20),
        "tool_calls": st.lists(
            st.fixed_dictionaries(
                {"function": st.fixed_dictionaries({"name": st.text(max_size=5), "arguments": VALUES})}
            )
        ),
        "images": VALUES,
    },
)
TOOLS = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.text(max_size=5), "parameters": VALUES})})
BODIES = st.fixed_dictionaries(
    {"model": st.just("persona"), "messages": st.lists(MESSAGES, max_size=5) | VALUES},
    optional={"tools": st.lists(TOOLS, max_size=3) | VALUES, "options": VALUES, "think": VALUES, "stream": VALUES},
)


async def test_no_body_whatever_is_our_own_fault(live: Live) -> None:
    key, loop = await live.key(), asyncio.get_running_loop()

    async def status(body: Any) -> int:
        headers = {"Authorization": f"Bearer {key}"}
        async with live.http.post("/api/chat", data=io.BytesIO(msgspec.json.encode(body)), headers=headers) as answer:
            lines = [json.loads(line) for line in (await answer.text()).splitlines()]
            assert answer.status == 200 or list(lines[0]) == ["error"]
            assert answer.status != 200 or lines[-1]["done"] is True
            return answer.status

    @given(BODIES)
    @rules(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    def answered(body: Any) -> None:
        assert asyncio.run_coroutine_threadsafe(status(body), loop).result(10) in (200, 400)

    await asyncio.to_thread(answered)


@given(st.sampled_from(sorted(chat_ollama.Question.__struct_fields__)), VALUES)
def test_any_value_of_a_known_field_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    body = msgspec.json.encode({"model": "persona", "messages": HI, name: value})
    with contextlib.suppress(PersonaError):
        assert chat_ollama.understand(decode(body, chat_ollama.Question), Limits(100, 1000)).messages
