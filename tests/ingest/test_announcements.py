"""What Home Assistant is told through a real broker: devices, states, birth and will."""

import asyncio
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from broker import ROOT, Mosquitto, mosquitto
from live import Live, Start
from onlooker import eventually, forget, held, listening, publish, served, stored

from persona.engine.protocol import ScoreRequest
from persona.engine.scripted import ScriptedEngine
from persona.settings import Settings

SERVICE = "homeassistant/device/persona_service/config"
BIRTH = "homeassistant/status"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    async with mosquitto(tmp_path / "broker") as broker:
        yield broker


def device(number: int, prefix: str = "persona") -> str:
    return f"homeassistant/device/{prefix}_{number}/config"


def state(name: str, prefix: str = "persona") -> str:
    return f"{prefix}/u/{name}/state"


async def told(broker: Mosquitto, name: str, *, more_than: int = -1, **wanted: Any) -> dict[str, Any]:
    """The state of `name` as soon as it says all of `wanted`, and more new tokens than that."""

    async def right() -> Any:
        found = await held(broker, state(name))
        true = found and found["new_tokens"] > more_than and all(found[key] == wanted[key] for key in wanted)
        return found if true else None

    return await eventually(right)  # type: ignore[no-any-return]


def better(request: ScoreRequest) -> list[float]:
    """Every adapter makes every token a little likelier."""
    return [-0.9 if request.adapter else -1.0] * len(request.targets)


async def learnable(live: Live, name: str = "ann") -> None:
    """A history that is long enough to learn from."""
    content = (ROOT / "tests/data/eric.jsonl").read_bytes()
    await live.call("POST", "/v1/me/history", user=name, data=content)


async def press(broker: Mosquitto, name: str, payload: str = "PRESS", **options: Any) -> None:
    await publish(broker, "homeassistant", f"persona/u/{name}/train/set", payload, **options)


async def test_a_user_and_the_service_are_announced_and_stored(start: Start, broker: Mosquitto) -> None:
    live = await start(mqtt=broker.settings())
    user = await live.user("ann")
    announced = await eventually(lambda: held(broker, device(user.id)))
    assert announced["device"]["name"] == "persona ann"
    assert announced["device"]["via_device"] == (await held(broker, SERVICE))["device"]["identifiers"][0]
    assert announced["state_topic"] == state("ann")
    await told(broker, "ann", version=0, last_training=None, held_out_loss=None, new_tokens=0, problem="OFF")
    service = await eventually(lambda: held(broker, "persona/svc/state"))
    assert service["problem"] == "OFF"
    assert (await stored(broker))["persona/svc/status"] == b"online"


async def test_everything_is_published_again_when_home_assistant_is_born(start: Start, broker: Mosquitto) -> None:
    live = await start(mqtt=broker.settings())
    user = await live.user("ann")
    await told(broker, "ann")
    async with listening(broker, "homeassistant", "homeassistant/#", "persona/#") as house:
        for topic in (device(user.id), SERVICE, state("ann")):
            await house.hears(topic)
        await publish(broker, "homeassistant", BIRTH, "offline")
        await asyncio.sleep(0.6)
        assert len(house.on(SERVICE)) == 1, "what has not changed is not repeated"
        await publish(broker, "homeassistant", BIRTH, "online")
        for topic in (device(user.id), SERVICE, state("ann"), "persona/svc/state"):
            await house.hears(topic, times=2)


async def test_a_broker_that_lost_everything_is_told_everything(start: Start, broker: Mosquitto) -> None:
    live = await start(mqtt=broker.settings())
    user = await live.user("ann")
    await told(broker, "ann")
    before = await stored(broker)
    await broker.kill()
    shutil.rmtree(broker.folder / "store")
    (broker.folder / "store").mkdir()
    await broker.start()
    wanted = {device(user.id), SERVICE, state("ann"), "persona/svc/state", "persona/svc/status"}

    async def whole() -> bool:
        return wanted <= (await stored(broker)).keys()

    await eventually(whole)
    assert (await stored(broker))[device(user.id)] == before[device(user.id)]


async def test_the_button_starts_a_run_and_the_state_follows_it(start: Start, broker: Mosquitto) -> None:
    live = await start(ScriptedEngine(score=better), mqtt=broker.settings())
    await learnable(live)
    fresh = await told(broker, "ann", version=0, more_than=1000)
    await press(broker, "ann")
    learned = await told(broker, "ann", version=1, training="OFF", last_result="kept", problem="OFF")
    assert learned["held_out_loss"] == pytest.approx(0.9)
    assert learned["new_tokens"] < fresh["new_tokens"]
    assert datetime.fromisoformat(learned["last_training"]).tzinfo is not None
    await live.say("one more thing")
    more = await told(broker, "ann", new_tokens=learned["new_tokens"] + len("one more thing"))
    assert more["version"] == 1
    await live.call("POST", "/v1/me/rollback", json={"version": 0})
    await told(broker, "ann", version=0, held_out_loss=None, more_than=fresh["new_tokens"])


async def test_training_shows_while_it_lasts(start: Start, broker: Mosquitto) -> None:
    slow = ScriptedEngine(score=better, delay=0.5, steps=4)
    live = await start(slow, mqtt=broker.settings(), learning={"rehearsal": 0.0})
    await learnable(live)
    await press(broker, "ann")
    await told(broker, "ann", training="ON")
    assert (await held(broker, "persona/svc/state"))["training"] == "ON"
    await told(broker, "ann", training="OFF", version=1)


async def test_a_failed_run_is_a_problem_until_one_ends_well(start: Start, broker: Mosquitto) -> None:
    live = await start(ScriptedEngine(score=better, trainable=None), mqtt=broker.settings())
    await learnable(live)
    await press(broker, "ann")
    bad = await told(broker, "ann", problem="ON", last_result="failed")
    assert len(bad["reasons"]) == 1
    assert "failed" in bad["reasons"][0]
    live.engine.trainable = b"weights"
    await press(broker, "ann")
    assert (await told(broker, "ann", problem="OFF", version=1))["reasons"] == []


async def test_refused_and_missing_events_are_a_problem_of_their_user_alone(start: Start, broker: Mosquitto) -> None:
    live = await start(mqtt=broker.settings())
    await live.user("ann")
    await live.user("bob")
    await publish(broker, "ann", "persona/u/ann/events/message", b"{broken")
    bad = await told(broker, "ann", problem="ON")
    assert bad["reasons"] == ["Events refused within 24 hours: 1."]
    for seq in (1, 4):
        await publish(broker, "bob", "persona/u/bob/events/message", {"text": "hi", "source": "phone", "seq": seq})
    assert (await told(broker, "bob", problem="ON"))["reasons"] == ["Events that never arrived: 2."]
    assert "{broken" not in json.dumps([await held(broker, topic) for topic in await stored(broker, "persona/+/state")])


async def test_the_button_of_nobody_or_of_who_does_not_learn_does_nothing(start: Start, broker: Mosquitto) -> None:
    live = await start(mqtt=broker.settings())
    await learnable(live, "ann")
    await learnable(live, "bob")
    await live.call("POST", "/v1/me/pause")
    await live.key("porch", learn=False)
    await press(broker, "bob", "")
    for name in ("ann", "porch", "nobody", "Ann", "ä", "x" * 2000):
        await press(broker, name)
    await publish(broker, "bob", "persona/u/bob/events/message", {"text": "still here"})

    async def heard() -> bool:
        return ("user", "still here") in await live.history("bob")

    await eventually(heard)
    for name in ("ann", "bob", "porch"):
        assert (await live.call("GET", "/v1/me/runs", user=name))["data"] == []
    assert (await told(broker, "ann", learns="OFF"))["training"] == "OFF"
    assert (await told(broker, "bob"))["learns"] == "ON"


async def test_a_stored_press_is_no_wish(settings: Settings, broker: Mosquitto) -> None:
    async with served(settings, broker) as house:
        ann = await house.services.users.add("ann")
        await told(broker, "ann")
    await press(broker, "ann", retain=True)
    (settings.home / "mqtt-client").unlink()  # a session that the broker does not know: it shows all that it stores
    async with served(settings, broker) as house:
        await asyncio.sleep(1)
        assert await house.services.runs.list(ann.id) == []


async def test_many_presses_are_one_run_at_a_time(start: Start, broker: Mosquitto) -> None:
    live = await start(ScriptedEngine(score=better, delay=0.3), mqtt=broker.settings())
    await learnable(live)
    async with broker.client("homeassistant") as client:
        for _ in range(20):
            await client.publish("persona/u/ann/train/set", "PRESS", qos=1)
    await told(broker, "ann", version=1)
    assert len((await live.call("GET", "/v1/me/runs"))["data"]) == 1


@pytest.mark.parametrize("name", ["ann-marie", "ann.of_ghent", "0", "a" * 64])
async def test_every_name_that_a_user_may_have_is_announced(start: Start, broker: Mosquitto, name: str) -> None:
    live = await start(mqtt=broker.settings())
    user = await live.user(name)
    announced = await eventually(lambda: held(broker, device(user.id)))
    assert announced["components"]["train"]["command_topic"] == f"persona/u/{name}/train/set"
    await told(broker, name, version=0)


async def test_without_discovery_nothing_is_announced_and_the_past_is_taken_back(
    settings: Settings, broker: Mosquitto
) -> None:
    await publish(broker, "homeassistant", "homeassistant/device/boiler_1/config", {"device": {}}, retain=True)
    async with served(settings, broker) as house:
        await house.services.users.add("ann")
        await eventually(lambda: held(broker, device(1)))
    async with served(settings, broker, discovery=False):

        async def alone() -> bool:
            return list(await stored(broker, "homeassistant/#")) == ["homeassistant/device/boiler_1/config"]

        await eventually(alone)
        await told(broker, "ann", version=0)
        await publish(broker, "homeassistant", BIRTH, "online")
        await asyncio.sleep(0.5)
        assert await alone()


async def test_two_services_at_one_broker_leave_each_other_alone(tmp_path: Path, settings: Settings) -> None:
    broker = Mosquitto(tmp_path / "broker")
    with (broker.folder / "persona.acl").open("a") as acl:
        acl.write("\nuser persona\ntopic readwrite other/#\n")
    await broker.start()
    second = settings.model_copy(update={"home": tmp_path / "second"})
    try:
        async with served(second, broker, prefix="other/persona") as other:
            await other.services.users.add("ann")
            theirs = await eventually(lambda: held(broker, "other/persona/u/ann/state"))
            async with served(settings, broker) as house:
                gone = await house.services.users.add("ann")
                await told(broker, "ann")
                await house.services.users.forget(gone.id)

                async def cleared() -> bool:
                    return state("ann") not in await stored(broker)

                await eventually(cleared)
            assert await held(broker, "other/persona/u/ann/state") == theirs
            devices = [topic for topic in await stored(broker) if topic.endswith("/config")]
            assert len([topic for topic in devices if "/other_persona_" in topic]) == 2
            assert len(devices) == 3
    finally:
        await broker.kill()


async def test_users_who_come_and_go_quickly_leave_nothing(start: Start, broker: Mosquitto) -> None:
    live = await start(mqtt=broker.settings(state_seconds=0.01))
    for number in range(12):
        user = await live.services.users.add(f"guest-{number}")
        await asyncio.sleep(0.01 * (number % 4))
        await live.services.users.forget(user.id)

    async def only_the_service() -> bool:
        return set(await stored(broker)) == {SERVICE, "persona/svc/state", "persona/svc/status"}

    await eventually(only_the_service)


async def test_who_comes_back_under_the_same_name_gets_a_new_device(start: Start, broker: Mosquitto) -> None:
    live = await start(mqtt=broker.settings())
    first = await live.user("ann")
    old = await eventually(lambda: held(broker, device(first.id)))
    await forget(live, "ann")
    second = await live.user("ann")
    new = await eventually(lambda: held(broker, device(second.id)))
    assert new["device"]["identifiers"] != old["device"]["identifiers"]
    ids = [{part["unique_id"] for part in announced["components"].values()} for announced in (old, new)]
    assert not ids[0] & ids[1]

    async def replaced() -> bool:
        return device(first.id) not in await stored(broker)

    await eventually(replaced)
    await told(broker, "ann", version=0)


PROGRAM = textwrap.dedent(
    """
    import asyncio, json, sys
    from persona import app
    from persona.engine.scripted import ScriptedEngine, ScriptedText
    from persona.settings import Settings

    settings = Settings.model_validate(json.loads(sys.argv[1]))
    asyncio.run(app.serve(settings, engine=ScriptedEngine(), tokenizer=ScriptedText()))
    """
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_home_assistant_sees_the_service_come_and_go(
    settings: Settings, broker: Mosquitto, number: signal.Signals
) -> None:
    chosen = Settings.model_validate({**settings.model_dump(), "mqtt": broker.settings()})
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, chosen.model_dump_json()),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        async with listening(broker, "homeassistant", "persona/svc/status") as house:
            assert await house.hears("persona/svc/status") == b"online"
            child.send_signal(number)
            assert await house.hears("persona/svc/status", times=2) == b"offline"
            assert (await stored(broker))["persona/svc/status"] == b"offline"
            await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
