"""Who may do what at a broker with configs/mosquitto.acl. Access is silent in MQTT, so it is tested by delivery."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiomqtt
import pytest
from broker import Mosquitto, mosquitto
from live import Start
from onlooker import eventually, held, listening, publish

QUIET = 0.5  # seconds in which something forbidden would have been delivered


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    async with mosquitto(tmp_path / "broker") as broker:
        yield broker


async def crosses(broker: Mosquitto, sender: str, receiver: str, topic: str) -> bool:
    """Whether what one account publishes there reaches the other."""
    async with listening(broker, receiver, topic) as ear:
        await publish(broker, sender, topic, "hello")
        await asyncio.sleep(QUIET)
        return ear.on(topic) == [b"hello"]


@pytest.mark.parametrize(
    ("sender", "receiver", "topic", "may"),
    [
        ("ann", "persona", "persona/u/ann/events/message", True),
        ("ann", "persona", "persona/u/ann/chat/set", True),
        ("ann", "persona", "persona/u/ann/train/set", True),
        ("persona", "ann", "persona/u/ann/chat/kitchen", True),
        ("persona", "ann", "persona/u/ann/state", True),
        ("ann", "persona", "persona/u/bob/events/message", False),
        ("ann", "persona", "persona/u/bob/chat/set", False),
        ("ann", "persona", "persona/u/bob/train/set", False),
        ("ann", "ann", "persona/u/ann/chat", False),  # only persona answers
        ("ann", "ann", "persona/u/ann/state", False),
        ("ann", "ann", "persona/u/ann/events/message", False),  # what was told is not read back
        ("ann", "homeassistant", "homeassistant/device/persona_1/config", False),
        ("ann", "homeassistant", "persona/svc/status", False),
        ("persona", "ann", "persona/u/bob/chat", False),
        ("persona", "ann", "persona/u/bob/state", False),
        ("bob", "ann", "persona/u/bob/events/message", False),
    ],
)
async def test_threat_22_an_account_reaches_its_own_user_only(
    broker: Mosquitto, sender: str, receiver: str, topic: str, may: bool
) -> None:
    assert await crosses(broker, sender, receiver, topic) is may


async def test_threat_22_wildcards_show_an_account_its_own_topics_only(broker: Mosquitto) -> None:
    async with listening(broker, "ann", "#", "persona/u/+/chat/#", "persona/u/+/state") as ear:
        for name in ("bob", "ann"):
            for rest in ("chat", "state", "events/message"):
                await publish(broker, "persona", f"persona/u/{name}/{rest}", "hello")
        await ear.hears("persona/u/ann/state")
        await asyncio.sleep(QUIET)
        assert {message.topic.value for message in ear.heard} == {"persona/u/ann/chat", "persona/u/ann/state"}


async def test_threat_22_home_assistant_sees_states_and_presses_the_button_but_hears_no_chat(broker: Mosquitto) -> None:
    async with (
        listening(broker, "homeassistant", "persona/#") as house,
        listening(broker, "persona", "persona/#") as service,
    ):
        for topic in ("persona/u/ann/chat", "persona/u/ann/chat/set", "persona/u/ann/events/message"):
            await publish(broker, "persona", topic, "hello")
        for topic in ("persona/u/ann/state", "persona/svc/status", "persona/svc/state"):
            await publish(broker, "persona", topic, "hello")
            await house.hears(topic)
        await asyncio.sleep(QUIET)
        assert len(house.heard) == 3
        before = len(service.heard)
        for topic in ("persona/u/ann/chat/set", "persona/u/ann/events/message", "persona/u/ann/state"):
            await publish(broker, "homeassistant", topic, "forged")
        await publish(broker, "homeassistant", "persona/u/ann/train/set", "PRESS")
        await service.hears("persona/u/ann/train/set")
        await asyncio.sleep(QUIET)
        assert len(service.heard) == before + 1


@pytest.mark.parametrize(
    "wrong",
    [{"username": None, "password": None}, {"password": "guess"}, {"username": "nobody"}, {"password": None}],
    ids=["anonymous", "wrong password", "unknown account", "no password"],
)
async def test_threat_22_who_does_not_know_the_password_is_refused(
    broker: Mosquitto, wrong: dict[str, str | None]
) -> None:
    with pytest.raises(aiomqtt.MqttError):
        async with broker.client("ann", **wrong):
            pass


async def test_threat_22_a_service_without_its_topics_does_not_believe_the_broker(
    start: Start, broker: Mosquitto
) -> None:
    """Whatever the ACL lets through: the payload may not name another user, and a stored copy is no news."""
    live = await start(mqtt=broker.settings())
    await live.user("ann")
    await live.user("bob")
    await publish(broker, "ann", "persona/u/ann/events/message", {"user": "bob", "text": "forged"})
    await publish(broker, "ann", "persona/u/ann/events/message", {"user": "ann", "text": "true"})
    await eventually(lambda: live.history("ann"))
    assert await live.history("ann") == [("user", "true")]
    assert await live.history("bob") == []
    assert (await eventually(lambda: held(broker, "persona/u/ann/state")))["version"] == 0
