"""Announcements as Home Assistant reads them: its rules for them, and its templates on our states."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from persona.domain import User, UserId
from persona.ingest import discovery
from persona.ingest.topics import Topics
from persona.settings import Mqtt

TOPICS = Topics(Mqtt())
ANN = User(UserId(7), "ann", True, False, None, datetime(2026, 1, 1, tzinfo=UTC))
USER = discovery.user_device(TOPICS, ANN, "a model")
SERVICE = discovery.service_device(TOPICS, "a model")
ROOT_KEYS = {"device", "origin", "components", "state_topic", "qos", "availability"}  # one unknown key refuses it all
DEVICE_KEYS = {"identifiers", "name", "manufacturer", "model", "sw_version", "via_device"}
COMMON = {"platform", "name", "unique_id", "icon", "entity_category", "availability", "device_class"}
COMMON |= {"json_attributes_topic", "json_attributes_template"}
KEYS = {
    "sensor": COMMON | {"value_template", "unit_of_measurement", "state_class", "suggested_display_precision"},
    "binary_sensor": COMMON | {"value_template", "state_topic", "payload_on", "payload_off"},
    "button": COMMON | {"command_topic", "payload_press"},
}
DEVICE_CLASSES = {"sensor": {"timestamp"}, "binary_sensor": {"problem", "connectivity", "running"}, "button": set()}
STATE: dict[str, Any] = {
    "version": 3,
    "last_training": "2026-03-01T10:00:00+00:00",
    "last_result": "kept",
    "held_out_loss": 2.5,
    "new_tokens": 12,
    "training": "OFF",
    "learns": "ON",
    "problem": "ON",
    "reasons": ["The last training failed: a \"quoted\" <reason> & 'more'."],
}


def rendered(template: str, state: dict[str, Any]) -> str:
    """What Home Assistant makes of a state: a value template on JSON."""
    made = ImmutableSandboxedEnvironment().from_string(template)
    return made.render(value_json=json.loads(msgspec.json.encode(state)))


@pytest.mark.parametrize("announced", [USER, SERVICE], ids=["user", "service"])
def test_an_announcement_has_only_what_home_assistant_knows(announced: dict[str, Any]) -> None:
    assert announced.keys() <= ROOT_KEYS
    assert {"device", "origin", "components"} <= announced.keys()
    assert announced["device"].keys() <= DEVICE_KEYS
    assert announced["device"]["identifiers"]
    assert announced["origin"].keys() == {"name", "sw_version"}
    for key, part in announced["components"].items():
        platform = part["platform"]
        assert re.fullmatch(r"[a-z_]+", key)
        assert part.keys() <= KEYS[platform], key
        assert part.get("device_class") in {None, *DEVICE_CLASSES[platform]}
        assert part.get("entity_category") in {None, "diagnostic"}
        assert part.get("icon", "mdi:x").startswith("mdi:")
        assert not part["name"].lower().startswith(announced["device"]["name"].lower()), "it stands before it anyway"
        assert part.get("device_class") != "timestamp" or not part.keys() & {"unit_of_measurement", "state_class"}


@pytest.mark.parametrize("announced", [USER, SERVICE], ids=["user", "service"])
def test_every_part_has_a_state_or_a_command_and_an_id_of_its_own(announced: dict[str, Any]) -> None:
    ids = [part["unique_id"] for part in announced["components"].values()]
    assert len(set(ids)) == len(ids)
    for part in announced["components"].values():
        if part["platform"] == "button":
            assert part["command_topic"] == "persona/u/ann/train/set"
        else:
            assert part.get("state_topic", announced["state_topic"])


def test_no_two_devices_share_an_id_or_a_name() -> None:
    names = {device["device"]["name"] for device in (USER, SERVICE)}
    ids = {part["unique_id"] for device in (USER, SERVICE) for part in device["components"].values()}
    assert len(names) == 2
    assert len(ids) == len(USER["components"]) + len(SERVICE["components"])
    assert USER["device"]["via_device"] in SERVICE["device"]["identifiers"]


def test_parts_are_unavailable_while_the_service_is_but_its_connection_says_so() -> None:
    wanted = [{"topic": "persona/svc/status", "payload_available": "online", "payload_not_available": "offline"}]
    assert USER["availability"] == wanted
    assert "availability" not in SERVICE
    for key, part in SERVICE["components"].items():
        assert part.get("availability") == (None if key == "connectivity" else wanted)
    assert SERVICE["components"]["connectivity"]["state_topic"] == "persona/svc/status"


def test_templates_find_in_a_state_what_they_look_for() -> None:
    shown = {key: rendered(part["value_template"], STATE) for key, part in templated(USER)}
    assert shown == {
        "version": "3",
        "last_training": "2026-03-01T10:00:00+00:00",
        "held_out_loss": "2.5",
        "new_tokens": "12",
        "problem": "ON",
    }


def test_what_is_not_known_yet_is_none_which_home_assistant_shows_as_unknown() -> None:
    state = {**STATE, "last_training": None, "held_out_loss": None}
    shown = {key: rendered(part["value_template"], state) for key, part in templated(USER)}
    assert (shown["last_training"], shown["held_out_loss"]) == ("None", "None")


def test_reasons_are_an_attribute_whatever_stands_in_them() -> None:
    template = USER["components"]["problem"]["json_attributes_template"]
    assert json.loads(rendered(template, STATE)) == {"reasons": STATE["reasons"]}


def test_the_service_has_a_template_for_each_of_its_parts() -> None:
    state = {"users": 2, "training": "ON", "events": 5, "dead_letters": 1, "problem": "OFF", "reasons": []}
    shown = {key: rendered(part["value_template"], state) for key, part in templated(SERVICE)}
    assert shown == {"users": "2", "training": "ON", "events": "5", "dead_letters": "1", "problem": "OFF"}


def templated(announced: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(key, part) for key, part in announced["components"].items() if "value_template" in part]
