"""docs/HOME_ASSISTANT.md is true: what it shows is sent through a real broker, by the accounts that it names."""

import json
import re
import tomllib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from broker import ROOT, Mosquitto
from jinja2.sandbox import ImmutableSandboxedEnvironment
from live import Live, Start
from onlooker import eventually, held, listening, publish

from persona.engine.scripted import ScriptedEngine
from persona.settings import Settings

PAGE = (ROOT / "docs/HOME_ASSISTANT.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
EVENTS = {topic: text for language, topic, text in BLOCKS if language == "json"}
AUTOMATIONS = {one["alias"]: one for language, _, text in BLOCKS if language == "yaml" for one in yaml.safe_load(text)}


def block(language: str) -> str:
    (text,) = [text for name, _, text in BLOCKS if name == language]
    return text


def rendered(template: str, **values: Any) -> str:
    """As Home Assistant renders it, with the few of its functions that the page uses."""
    environment = ImmutableSandboxedEnvironment()
    environment.filters["to_json"] = lambda value: json.dumps(value, ensure_ascii=False)
    known = {"now": lambda: datetime.now(UTC), "states": {"sensor.outside_temperature": "7.5"}.get}
    return environment.from_string(template).render(**known, **values)


def action(alias: str, name: str) -> dict[str, Any]:
    """The data of that action of that automation."""
    (found,) = [one for one in AUTOMATIONS[alias]["actions"] if one["action"] == name]
    return found.get("data") or found["target"]  # type: ignore[no-any-return]


async def run(broker: Mosquitto, alias: str, **values: Any) -> None:
    """What `mqtt.publish` of that automation sends, from Home Assistant's account."""
    data = action(alias, "mqtt.publish")
    assert data["qos"] == 1
    assert not data.get("retain")
    await publish(broker, "homeassistant", data["topic"], rendered(data["payload"], **values))


def changed(state: str) -> SimpleNamespace:
    """The trigger of a changed state."""
    return SimpleNamespace(to_state=SimpleNamespace(state=state, context=SimpleNamespace(id="01JXYZ")))


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    """The shipped broker, with the lines that the page adds for ann."""
    broker = Mosquitto(tmp_path / "broker")
    access = broker.folder / "persona.acl"
    head = "user homeassistant\n"
    assert access.read_text().count(head) == 1
    access.write_text(access.read_text().replace(head, head + block("acl")))
    await broker.start()
    yield broker
    await broker.kill()


@pytest.fixture
async def live(start: Start, broker: Mosquitto) -> Live:
    live = await start(ScriptedEngine("A warm coat."), mqtt=broker.settings())
    await live.user("ann")
    await live.user("bob")
    return live


async def stored(live: Live, *wanted: tuple[str, str]) -> None:
    """Until ann's history is that."""

    async def there() -> bool:
        return await live.history() == list(wanted)

    await eventually(there)


async def known(live: Live) -> dict[tuple[str, str], str | None]:
    facts = await live.services.events.facts((await live.user()).id)
    return {(fact.kind, fact.key): fact.value for fact in facts}


def test_the_settings_are_settings() -> None:
    mqtt = Settings.model_validate(tomllib.loads(block("toml"))).mqtt
    assert (mqtt.enabled, mqtt.username) == (True, "persona")


def test_the_page_shows_an_event_of_each_kind() -> None:
    kinds = {topic.rsplit("/", 1)[1] for topic in EVENTS}
    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert named == {"message", "fact", "state", "feedback"}
    assert named < kinds


async def test_the_entities_are_those_that_the_page_names(live: Live, broker: Mosquitto) -> None:
    tables = re.findall(r"^\| entity .*?(?=\n\n)", PAGE, re.MULTILINE | re.DOTALL)
    written = [re.findall(r"^\| ([A-Z][\w -]+) \|", table, re.MULTILINE) for table in tables]
    announced = []
    for named in ((await live.user()).id, "service"):
        topic = f"homeassistant/device/persona_{named}/config"
        announced.append(await eventually(lambda topic=topic: held(broker, topic)))  # type: ignore[misc]
    assert written == [[part["name"] for part in device["components"].values()] for device in announced]


async def test_an_event_of_each_kind_has_the_effect_that_the_page_promises(live: Live, broker: Mosquitto) -> None:
    async def send(kind: str, text: str | None = None) -> None:
        topic = f"persona/u/ann/events/{kind}"
        await publish(broker, "ann", topic, text or EVENTS[topic])

    await send("message")
    await send("message")  # the same id
    await send("doorbell")
    said = [("user", "Call the plumber about the kitchen tap."), ("tool", "Somebody rang at the front door.")]
    await stored(live, *said)
    await send("fact")
    await send("state")

    async def facts() -> bool:
        return await known(live) == {("fact", "allergic to"): "peanuts", ("state", "front door"): "locked"}

    await eventually(facts)
    prompt = await live.call("POST", "/v1/me/why", json={"messages": [{"role": "user", "content": "front door?"}]})
    text = " ".join(message["content"] for message in prompt["messages"])
    for part in ("peanuts", "locked", "plumber", "rang"):
        assert part in text
    await send("fact", json.dumps({**json.loads(EVENTS["persona/u/ann/events/fact"]), "id": "fact-2", "value": None}))

    async def taken_back() -> bool:
        return ("fact", "allergic to") not in await known(live)

    await eventually(taken_back)
    turn = (await live.say("hi"))["persona"]["turn"]
    await send("feedback", EVENTS["persona/u/ann/events/feedback"].replace('"turn": 12', f'"turn": {turn}'))

    async def rated() -> bool:
        newest = (await live.call("GET", "/v1/me/history?limit=100"))["data"][-1]
        return (newest["id"], newest["rating"]) == (turn, 1)

    await eventually(rated)
    counts = live.services.intake.counts
    assert (counts["duplicate"], counts["dead"]) == (1, 0)


async def test_automations_tell_a_state_and_a_note(live: Live, broker: Mosquitto) -> None:
    await run(broker, "Tell persona the temperature", trigger=changed("21.5"))

    async def warm() -> bool:
        return await known(live) == {("state", "living room temperature"): "21.5 °C"}

    await eventually(warm)
    note = changed('Say "hello" to the neighbours\nand bring back their ladder.')
    condition = AUTOMATIONS["A note of ann's is a message"]["conditions"][0]
    assert (rendered(condition, trigger=note), rendered(condition, trigger=changed(" "))) == ("True", "False")
    await run(broker, "A note of ann's is a message", trigger=note)
    await run(broker, "A note of ann's is a message", trigger=note)
    await stored(live, ("user", 'Say "hello" to the neighbours\nand bring back their ladder.'))


async def test_an_automation_asks_and_another_shows_the_answer(live: Live, broker: Mosquitto) -> None:
    (trigger,) = AUTOMATIONS["Show what to wear"]["triggers"]
    message = action("Show what to wear", "persistent_notification.create")["message"]
    async with listening(broker, "homeassistant", trigger["topic"]) as house:
        await run(broker, "Ask what to wear")
        answer = json.loads(await house.hears(trigger["topic"]))
        assert rendered(trigger["value_template"], value_json=answer) == trigger["payload"]
        assert rendered(message, trigger={"payload_json": answer}) == "A warm coat."
        asked = live.engine.requests[-1].tokens
        assert "It is 7.5 °C outside." in bytes(token for token in asked if token < 256).decode()
        assert await live.history() == [], "an automation's words are not hers"
        await publish(broker, "homeassistant", "persona/u/ann/chat/set", {"messages": 7, "correlation": "clothes"})
        error = json.loads(await house.hears(trigger["topic"], times=2))
        assert rendered(trigger["value_template"], value_json=error) == trigger["payload"]
        assert rendered(message, trigger={"payload_json": error}) == error["error"]["message"]


async def test_the_button_of_the_page_is_the_announced_one(live: Live, broker: Mosquitto) -> None:
    device = await eventually(lambda: held(broker, "homeassistant/device/persona_1/config"))
    (key,) = [key for key, part in device["components"].items() if part["platform"] == "button"]
    button = device["components"][key]
    slug = re.sub(r"[^a-z0-9]+", "_", f"{device['device']['name']} {button['name']}".lower())
    assert action("Train at night", "button.press") == {"entity_id": f"button.{slug}"}
    await publish(broker, "homeassistant", button["command_topic"], button["payload_press"])

    async def ended() -> list[str]:
        return [run["state"] for run in (await live.call("GET", "/v1/me/runs"))["data"] if run["state"] != "queued"]

    assert (await eventually(ended))[0] in ("running", "deferred")


async def test_threat_22_home_assistant_speaks_for_ann_alone(live: Live, broker: Mosquitto) -> None:
    async with listening(broker, "homeassistant", "persona/u/#") as house:
        for name in ("bob", "ann"):
            await publish(broker, "homeassistant", f"persona/u/{name}/events/message", {"text": f"for {name}"})
            await publish(broker, "homeassistant", f"persona/u/{name}/chat/set", {"text": "hi", "store": False})
        await house.hears("persona/u/ann/chat")
        await stored(live, ("user", "for ann"))
        await publish(broker, "bob", "persona/u/bob/chat/set", {"text": "hi"})

        async def answered() -> bool:
            return len(await live.history("bob")) == 2

        await eventually(answered)
        heard = {message.topic.value for message in house.heard}
        assert "persona/u/bob/chat" not in heard
        assert "persona/u/bob/events/message" not in heard
    assert ("user", "for bob") not in await live.history("bob")
