"""The broker inside the service: on the loopback, behind a password, for trying out."""

import asyncio
import gc
import json
import socket
import warnings
from collections.abc import Iterator

import aiomqtt
import pytest
from live import Live, Start, connected

from persona.cli_serve import welcome
from persona.errors import ConfigurationError
from persona.ingest.broker import Account

# amqtt leaves a connection open that ends while it is greeted: Python 3.13 tells of it at once.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <StreamWriter:ResourceWarning")
EMBEDDED = {"enabled": True, "embedded": True, "port": 0}


@pytest.fixture(autouse=True)
def left_open() -> Iterator[None]:
    """What amqtt leaves open, a connection that was cut before it spoke, is collected here, not under another test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
async def demo(start: Start) -> Live:
    live = await start(mqtt=EMBEDDED)
    await live.key("you")
    return await connected(live)


def account(live: Live) -> Account:
    assert live.house.broker is not None
    return live.house.broker


async def test_an_event_and_a_chat_go_through_it(demo: Live) -> None:
    broker = account(demo)
    async with aiomqtt.Client("127.0.0.1", broker.port, username="persona", password=broker.password) as client:
        await client.subscribe("persona/u/you/chat", qos=1)
        await client.publish("persona/u/you/events/message", '{"id": 1, "text": "hello"}', qos=1)
        await client.publish("persona/u/you/chat/set", '{"text": "hi"}', qos=1)
        async with asyncio.timeout(10):
            answer = await anext(aiter(client.messages))
            while str(answer.topic) != "persona/u/you/chat":  # amqtt may add stored messages of other topics
                answer = await anext(aiter(client.messages))
    assert isinstance(answer.payload, bytes)
    assert json.loads(answer.payload)["choices"][0]["message"]["content"] == "Hello."
    assert ("user", "hello") in await demo.history("you")


@pytest.mark.parametrize(("user", "password"), [(None, None), ("persona", "wrong"), ("you", None)])
async def test_threat_22_it_lets_nobody_in_without_the_password(demo: Live, user: str, password: str) -> None:
    with pytest.raises(aiomqtt.MqttError):
        async with aiomqtt.Client("127.0.0.1", account(demo).port, username=user, password=password, timeout=5):
            pass


async def test_it_listens_on_the_loopback_alone(demo: Live) -> None:
    with socket.socket() as elsewhere:
        # Were it bound to every address, this one would be taken too.
        elsewhere.bind(("127.0.0.2", account(demo).port))


async def test_the_first_lines_say_how_to_reach_it_and_what_it_is_for(demo: Live) -> None:
    told = await welcome(demo.house)
    assert str(account(demo).port) in told
    assert account(demo).password in told
    assert "forgets" in told


async def test_a_taken_port_is_told(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigurationError, match="is taken"):
        await start(mqtt={**EMBEDDED, "port": taken.getsockname()[1]})
