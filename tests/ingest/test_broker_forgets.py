"""Who is forgotten is forgotten by the broker too: what it stores of them is cleared, and nothing of anybody else."""

from collections.abc import AsyncIterator, Collection
from pathlib import Path

import pytest
from broker import Mosquitto, mosquitto
from live import Start
from onlooker import eventually, forget, publish, served, stored

from persona.settings import Settings

STRANGERS = {
    "homeassistant/device/boiler_1/config": "homeassistant",
    "homeassistant/sensor/persona_1/config": "homeassistant",
    "homeassistant/device/persona_1x/config": "homeassistant",
    "persona/u/bob/events/message": "bob",
    "persona/u/bob/chat/set": "bob",
    "persona/u/anne/events/message": "persona",
    "persona/u/nobody/events/message": "persona",
    "persona/notes/ann": "persona",
}
LEFT = ("events/message", "events/fact", "chat/set", "train/set", "chat", "chat/kitchen", "notes", "a/b/c")


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    async with mosquitto(tmp_path / "broker") as broker:
        yield broker


async def leave(broker: Mosquitto) -> None:
    """Retained messages of ann's devices and of everybody else."""
    for topic, name in STRANGERS.items():
        await publish(broker, name, topic, {"text": "not ann's"}, retain=True)
    for rest in LEFT:
        await publish(broker, "persona", f"persona/u/ann/{rest}", {"text": "a secret of ann's"}, retain=True)


def of_ann(found: dict[str, bytes], number: int) -> list[str]:
    """What the broker still stores of ann."""
    device = f"homeassistant/device/persona_{number}/config"
    return [topic for topic in found if topic.startswith("persona/u/ann/") or topic == device]


async def shows(broker: Mosquitto, *topics: str) -> None:
    async def there() -> bool:
        return set(topics) <= (await stored(broker)).keys()

    await eventually(there)


async def is_rid_of(broker: Mosquitto, number: int, keeping: Collection[str] = STRANGERS) -> dict[str, bytes]:
    """All that the broker stores once there is nothing of ann; others keep what is theirs."""

    async def gone() -> dict[str, bytes] | None:
        found = await stored(broker)
        return found if found and not of_ann(found, number) else None

    found: dict[str, bytes] = await eventually(gone)
    assert found.keys() >= set(keeping)
    return found


async def test_threat_32_the_broker_forgets_with_the_user(start: Start, broker: Mosquitto) -> None:
    live = await start(mqtt=broker.settings())
    ann, bob = await live.user("ann"), await live.user("bob")
    await shows(broker, "persona/u/ann/state", f"homeassistant/device/persona_{ann.id}/config")
    await leave(broker)
    await forget(live, "ann")
    found = await is_rid_of(broker, ann.id)
    assert {"persona/u/bob/state", f"homeassistant/device/persona_{bob.id}/config"} <= found.keys()
    assert not any(b"secret" in payload for payload in found.values())


async def test_threat_32_the_broker_forgets_when_it_is_back(start: Start, broker: Mosquitto) -> None:
    live = await start(mqtt=broker.settings())
    ann = await live.user("ann")
    await live.user("bob")
    await shows(broker, "persona/u/ann/state", "persona/u/bob/state")
    await leave(broker)
    await broker.kill()
    await forget(live, "ann")
    await broker.start()
    assert "persona/u/bob/state" in await is_rid_of(broker, ann.id)


async def test_threat_32_the_broker_forgets_what_a_former_life_left(settings: Settings, broker: Mosquitto) -> None:
    async with served(settings, broker) as house:
        ann = await house.services.users.add("ann")
        await house.services.users.add("bob")
        await shows(broker, "persona/u/ann/state", "persona/u/bob/state")
        await leave(broker)
        await broker.kill()
        await house.services.users.forget(ann.id)
    await broker.start()
    assert of_ann(await stored(broker), ann.id)
    async with served(settings, broker):
        assert "persona/u/bob/state" in await is_rid_of(broker, ann.id)


async def test_a_name_that_is_taken_again_keeps_what_it_stores(settings: Settings, broker: Mosquitto) -> None:
    async with served(settings, broker) as house:
        first = await house.services.users.add("ann")
        await shows(broker, "persona/u/ann/state")
        await house.services.users.forget(first.id)
        await is_rid_of(broker, first.id, ())
        await leave(broker)  # too late for the one who went, and now ann is somebody else
        await house.services.users.add("ann")
    (settings.home / "mqtt-client").unlink()  # so that the broker shows it all
    async with served(settings, broker):
        await shows(broker, "persona/u/ann/state", "persona/svc/state")

        async def judged() -> bool:
            return f"homeassistant/device/persona_{first.id}/config" not in await stored(broker)

        await eventually(judged)
        assert {f"persona/u/ann/{rest}" for rest in LEFT} <= (await stored(broker)).keys()
