"""Chat over MQTT: one answer to each request, on the asker's own topic, with the limits of HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiomqtt
import pytest
from broker import PASSWORD, Mosquitto
from live import Start
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from persona.engine.protocol import Chunk, GenerateRequest
from persona.engine.scripted import ScriptedEngine
from persona.ingest.talk import MOST, MOST_OF_ONE

SET, CHAT = "persona/u/{}/chat/set", "persona/u/{}/chat"


class Talker:
    """A device that asks and listens."""

    def __init__(self, client: aiomqtt.Client, name: str) -> None:
        self.client, self.name = client, name

    async def ask(self, payload: Any, properties: Properties | None = None) -> None:
        content = payload if isinstance(payload, bytes) else json.dumps(payload)
        await self.client.publish(SET.format(self.name), content, qos=1, properties=properties)

    async def hear(self) -> tuple[str, dict[str, Any], bytes | None]:
        async with asyncio.timeout(10):
            message = await anext(aiter(self.client.messages))
        assert isinstance(message.payload, bytes)
        correlation = getattr(message.properties, "CorrelationData", None)
        return str(message.topic), json.loads(message.payload), correlation

    async def answer(self, payload: Any) -> dict[str, Any]:
        await self.ask(payload)
        return (await self.hear())[1]

    async def silence(self, seconds: float = 0.5) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(seconds):
                await anext(aiter(self.client.messages))


@asynccontextmanager
async def talker(broker: Mosquitto, name: str = "ann", **options: Any) -> AsyncIterator[Talker]:
    async with broker.client(name, **options) as client:
        for topic in (CHAT, f"{CHAT}/answers"):
            await client.subscribe(topic.format(name), qos=1)
        yield Talker(client, name)


def said(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


async def test_a_text_is_answered_with_a_completion_and_both_become_history(begin: Start, broker: Mosquitto) -> None:
    live = await begin(ScriptedEngine("Good morning."))
    async with talker(broker) as ann:
        answer = await ann.answer({"text": "Hello?", "correlation": {"id": 7}})
    assert (said(answer), answer["correlation"]) == ("Good morning.", {"id": 7})
    assert answer["persona"]["recorded"] is True
    assert await live.history() == [("user", "Hello?"), ("assistant", "Good morning.")]


async def test_the_body_of_the_chat_api_works_as_it_stands(begin: Start, broker: Mosquitto) -> None:
    await begin(ScriptedEngine("one two three four"))
    body = {
        "model": "base",
        "messages": [{"role": "user", "content": "count"}],
        "max_tokens": 2,
        "store": False,
        "metadata": {"conversation_id": "kitchen"},
    }
    async with talker(broker) as ann:
        answer = await ann.answer(body)
    assert (said(answer), answer["model"], answer["choices"][0]["finish_reason"]) == ("one two", "base", "length")


async def test_a_stream_comes_in_pieces_and_ends_with_the_whole(begin: Start, broker: Mosquitto) -> None:
    words = " ".join(f"word{number}" for number in range(30))
    await begin(ScriptedEngine(words, delay=0.02))
    pieces = []
    async with talker(broker) as ann:
        await ann.ask({"text": "talk", "stream": True, "correlation": "s"})
        while (answer := (await ann.hear())[1])["object"] == "chat.completion.chunk":
            assert answer["correlation"] == "s"
            pieces.append(answer["choices"][0]["delta"]["content"])
    assert "".join(pieces) == words == said(answer)
    assert 2 < len(pieces) < 30, "several tokens go into one message"


async def test_correlation_data_and_response_topic_of_mqtt_5_are_honoured(begin: Start, broker: Mosquitto) -> None:
    await begin(ScriptedEngine("Yes."))
    properties = Properties(PacketTypes.PUBLISH)
    properties.CorrelationData = b"\x00\x01request"
    properties.ResponseTopic = CHAT.format("ann") + "/answers"
    async with talker(broker) as ann:
        await ann.ask({"text": "Well?"}, properties)
        topic, answer, correlation = await ann.hear()
    assert (topic, said(answer), correlation) == ("persona/u/ann/chat/answers", "Yes.", b"\x00\x01request")


@pytest.mark.parametrize(
    "topic",
    ["persona/u/bob/chat", "persona/u/ann/chat/set", "persona/u/annex/chat", "homeassistant/x", "persona/u/ann/chatx"],
)
async def test_threat_22_a_response_topic_of_somebody_else_is_refused_on_the_own_one(
    begin: Start, broker: Mosquitto, topic: str
) -> None:
    live = await begin()
    properties = Properties(PacketTypes.PUBLISH)
    properties.ResponseTopic = topic
    async with talker(broker) as ann, broker.client("persona", identifier="spy") as spy:
        await spy.subscribe(topic, qos=1)
        await ann.ask({"text": "hi"}, properties)
        where, answer, _ = await ann.hear()
        assert (where, answer["error"]["code"]) == ("persona/u/ann/chat", "unsupported_value")
        await ann.silence(0.3)
    assert await live.history() == []


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"{", "invalid_json"),
        (b"\xff", "invalid_json"),
        ([1], "invalid_type"),
        ({}, "invalid_type"),
        ({"text": ""}, "invalid_request"),
        ({"text": "hi", "model": "gpt-9"}, "model_not_found"),
        ({"text": "hi", "n": 2}, "unsupported_value"),
        ({"text": "hi", "max_tokens": 10**9}, "unsupported_value"),
        ({"text": "hi", "correlation": "x" * 300}, "invalid_request"),
        ({"text": "x" * 40_000}, "context_length_exceeded"),
    ],
)
async def test_what_cannot_be_answered_is_refused_with_the_error_of_http(
    begin: Start, broker: Mosquitto, payload: Any, code: str
) -> None:
    live = await begin()
    async with talker(broker) as ann:
        answer = await ann.answer(payload)
    assert answer["error"]["code"] == code
    assert answer["error"]["message"].endswith(".")
    assert await live.history() == []


async def test_a_payload_above_the_limit_is_refused_by_its_size(begin: Start, broker: Mosquitto) -> None:
    await begin(mqtt={"max_payload": 1000})
    async with talker(broker) as ann:
        assert (await ann.answer({"text": "x" * 2000}))["error"]["code"] == "too_large"


async def test_a_user_whom_persona_does_not_know_is_told_so(begin: Start, broker: Mosquitto) -> None:
    await begin()
    async with talker(broker, "bob") as bob:
        assert (await bob.answer({"text": "hi"}))["error"]["code"] == "user_not_found"


async def test_a_user_who_does_not_learn_is_answered_and_not_recorded(begin: Start, broker: Mosquitto) -> None:
    live = await begin(ScriptedEngine("It is noon."))
    await live.key("bob", learn=False)
    async with talker(broker, "bob") as bob:
        answer = await bob.answer("what time is it?")
    assert (said(answer), answer["persona"]["recorded"]) == ("It is noon.", False)
    assert await live.history("bob") == []


async def test_a_stored_question_is_not_answered_again_at_every_start(begin: Start, broker: Mosquitto) -> None:
    async with broker.client("ann") as client:
        await client.publish(SET.format("ann"), '{"text": "old question"}', qos=1, retain=True)
    engine = ScriptedEngine("New.")
    await begin(engine)
    async with talker(broker) as ann:
        assert said(await ann.answer({"text": "new question"})) == "New."
        await ann.silence()
    assert len(engine.requests) == 1


async def test_a_failing_engine_is_an_answer_too(begin: Start, broker: Mosquitto) -> None:
    from persona.errors import EngineDown

    engine = ScriptedEngine()
    engine.failure = EngineDown("The language model is being restarted.", retry_after=5)
    await begin(engine)
    async with talker(broker) as ann:
        error = (await ann.answer({"text": "hi"}))["error"]
        assert (error["code"], error["retry_after"]) == ("engine_unavailable", 5)
        engine.failure = KeyError("secret words")
        assert "secret" not in json.dumps(await ann.answer({"text": "hi"}))


@pytest.mark.parametrize("seconds", [0.3, 5.0], ids=["cut short", "in time"])
async def test_threat_26_a_stop_lets_an_answer_end_within_its_limit(
    begin: Start, broker: Mosquitto, seconds: float
) -> None:
    words = " ".join(f"word{number}" for number in range(40))
    live = await begin(ScriptedEngine(words, delay=0.03), http={"shutdown_seconds": seconds})
    async with talker(broker) as ann:
        await ann.ask({"text": "talk"})
        async with asyncio.timeout(10):
            while not live.services.chat.running:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await live.stack.aclose()
        answer = (await ann.hear())[1]
    assert answer["persona"]["finish"] == ("abort" if seconds < 1 else "stop")
    assert words.startswith(said(answer))
    assert len(said(answer)) > 10


async def test_many_questions_at_once_are_each_answered_or_refused(begin: Start, broker: Mosquitto) -> None:
    await begin(ScriptedEngine("Yes.", delay=0.05))
    async with talker(broker) as ann:
        for number in range(150):
            await ann.ask({"text": "hi", "correlation": number, "store": False})
        answers = [(await ann.hear())[1] for _ in range(150)]
    assert {answer["correlation"] for answer in answers} == set(range(150))
    assert {answer["error"]["code"] for answer in answers if "error" in answer} <= {"busy"}


class Holding(ScriptedEngine):
    """Holds what the first user asked for until it is let go."""

    def __init__(self) -> None:
        super().__init__("Yes.")
        self.let_go = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        if request.user_id == 1:
            await self.let_go.wait()
        async for chunk in super().generate(request):
            yield chunk


async def test_one_user_does_not_take_the_places_of_others(begin: Start, broker: Mosquitto) -> None:
    engine = Holding()
    live = await begin(engine)
    await live.key("bob")
    asked = MOST + 10
    async with talker(broker) as ann, talker(broker, "bob") as bob:
        for number in range(asked):
            await ann.ask({"text": "hi", "correlation": number, "store": False})
        refused = [(await ann.hear())[1] for _ in range(asked - MOST_OF_ONE)]
        assert {answer["error"]["code"] for answer in refused} == {"busy"}
        assert "This user has 16 chats" in refused[0]["error"]["message"]
        assert said(await bob.answer({"text": "hi"})) == "Yes."
        engine.let_go.set()
        assert [said((await ann.hear())[1]) for _ in range(MOST_OF_ONE)] == ["Yes."] * MOST_OF_ONE
        assert said(await ann.answer({"text": "again"})) == "Yes."


async def test_events_before_a_question_stand_in_its_answer(begin: Start, broker: Mosquitto) -> None:
    engine = ScriptedEngine()
    live = await begin(engine)
    async with talker(broker) as ann:
        for number in range(20):
            await ann.client.publish("persona/u/ann/events/state", json.dumps({"key": "n", "value": number}), qos=1)
        await ann.answer({"text": "what is n?"})
    assert '"n": "19"' in live.services.tokenizer.decode(engine.requests[0].tokens)


async def test_a_device_of_mqtt_311_is_served_as_well(begin: Start, broker: Mosquitto) -> None:
    await begin(ScriptedEngine("Old but good."), mqtt={"version": "3.1.1"})
    async with talker(broker, protocol=aiomqtt.ProtocolVersion.V311) as ann:
        answer = await ann.answer({"text": "hi", "correlation": 1})
    assert (said(answer), answer["correlation"]) == ("Old but good.", 1)


async def test_an_answer_goes_out_by_the_connection_there_is(begin: Start, broker: Mosquitto) -> None:
    """That of the question is gone: a stranger took our name while the reply was made."""
    live = await begin(ScriptedEngine("word " * 40, delay=0.05))
    identifier = live.services.settings.mqtt_client.read_text().split()[0]
    options: Any = {"username": "persona", "password": PASSWORD.format("persona"), "identifier": identifier}
    async with talker(broker) as ann:
        await ann.ask({"text": "talk", "correlation": 1})
        await asyncio.sleep(0.5)
        async with aiomqtt.Client("127.0.0.1", broker.port, **options):
            await asyncio.sleep(0.2)
        assert live.house.mqtt is not None
        answer = (await ann.hear())[1]
        assert (said(answer), answer["correlation"]) == ("word " * 40, 1)
        assert live.house.mqtt.counts["connections"] > 1
        await ann.silence()
