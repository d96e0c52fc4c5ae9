"""What a broker stores and delivers, seen from outside by a client of its own."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiomqtt
from broker import Mosquitto
from live import Live

from persona import app
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.settings import Settings

QUIET = 0.2  # seconds without a message after which the broker has shown what it stores


async def stored(broker: Mosquitto, *topics: str) -> dict[str, bytes]:
    """Every message that the broker stores, by topic. {}: it is away."""
    found: dict[str, bytes] = {}
    with contextlib.suppress(aiomqtt.MqttError, TimeoutError):
        async with broker.client("persona") as client:
            for topic in topics or ("persona/#", "homeassistant/#", "other/#"):
                await client.subscribe(topic, qos=1)
            while True:
                message = await asyncio.wait_for(anext(client.messages), QUIET)
                if message.retain:
                    assert isinstance(message.payload, bytes)
                    found[message.topic.value] = message.payload
    return found


async def held(broker: Mosquitto, topic: str) -> Any:
    """The JSON that the broker stores on `topic`; None: nothing."""
    found = await stored(broker, topic)
    return json.loads(found[topic]) if topic in found else None


async def eventually(check: Callable[[], Awaitable[Any]], seconds: float = 20.0) -> Any:
    """What `check` answers as soon as that is true."""
    last = None
    try:
        async with asyncio.timeout(seconds):
            while not (last := await check()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"it never came true; last: {last!r}") from None
    return last


class Listener:
    """Everything that was delivered to one client since it subscribed."""

    def __init__(self) -> None:
        self.heard: list[aiomqtt.Message] = []

    def on(self, topic: str) -> list[bytes]:
        return [bytes(message.payload) for message in self.heard if message.topic.value == topic]  # type: ignore[arg-type]

    async def hears(self, topic: str, times: int = 1) -> bytes:
        """The newest of at least so many messages on `topic`."""

        async def enough() -> list[bytes]:
            found = self.on(topic)
            return found if len(found) >= times else []

        return (await eventually(enough))[-1]


@asynccontextmanager
async def listening(broker: Mosquitto, name: str, *topics: str) -> AsyncIterator[Listener]:
    """The account `name`, subscribed to `topics`."""
    listener = Listener()

    async def listen(client: aiomqtt.Client) -> None:
        async for message in client.messages:
            listener.heard.append(message)

    async with broker.client(name) as client:
        for topic in topics:
            await client.subscribe(topic, qos=1)
        task = asyncio.create_task(listen(client))
        try:
            yield listener
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def publish(broker: Mosquitto, name: str, topic: str, payload: Any, *, retain: bool = False) -> None:
    """One message of the account `name`: bytes and text as they are, anything else as JSON."""
    body = payload if isinstance(payload, bytes | str) else json.dumps(payload)
    async with broker.client(name) as client:
        await client.publish(topic, body, qos=1, retain=retain)


@asynccontextmanager
async def served(settings: Settings, broker: Mosquitto, **changes: Any) -> AsyncIterator[app.House]:
    """A service at this broker that ends with the block."""
    chosen = Settings.model_validate({**settings.model_dump(), "mqtt": broker.settings(**changes)})
    async with app.build(chosen, engine=ScriptedEngine(), tokenizer=ScriptedText()) as house:
        yield house


async def forget(live: Live, name: str) -> None:
    """As the user would, over HTTP."""
    await live.call("POST", "/v1/me/forget", user=name, json={"confirm": name})
    live.keys.pop(name)
