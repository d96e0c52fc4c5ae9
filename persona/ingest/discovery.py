"""What Home Assistant is told: one device for each user and one for the service. Pure.

One retained message announces a device with all its parts (MQTT device discovery of Home Assistant); states follow on
topics of their own. An empty message takes the device away.
"""

import hashlib
import re
from typing import Any

from persona import __version__
from persona.domain import User
from persona.ingest.topics import Topics

ONLINE, OFFLINE = "online", "offline"


def identity(topics: Topics, user_id: int | None) -> str:
    """Names a device: a user by an id that is never given twice, or the service (None)."""
    return f"{_stem(topics.prefix)}_{'service' if user_id is None else user_id}"


def ours(topics: Topics, named: str) -> bool:
    """Whether a device of that identity is the service's or one of its users', of today or gone."""
    stem, _, last = named.rpartition("_")
    number = last.isascii() and last.isdigit() and not last.startswith("0")
    return stem == _stem(topics.prefix) and (number or last == "service")


def _stem(prefix: str) -> str:
    """Of letters, digits and underscores, all that may stand there, and another one for every other prefix."""
    plain = re.sub(r"\W+", "_", prefix, flags=re.ASCII)
    return plain if plain == prefix else f"{plain}_{hashlib.sha256(prefix.encode()).hexdigest()[:8]}"


def user_device(topics: Topics, user: User, model: str) -> dict[str, Any]:
    """The announcement of a user's device."""
    name = identity(topics, user.id)
    parts = {
        "version": _sensor("Adapter version", "version", icon="mdi:brain"),
        "last_training": _sensor("Last training", "last_training", device_class="timestamp"),
        "held_out_loss": _sensor(
            "Held-out loss",
            "held_out_loss",
            unit="nats/token",
            icon="mdi:chart-line",
            suggested_display_precision=3,
        ),
        "new_tokens": _sensor("New tokens since training", "new_tokens", unit="tokens", icon="mdi:text-box-plus"),
        "problem": {
            "platform": "binary_sensor",
            "name": "Problem",
            "device_class": "problem",
            "entity_category": "diagnostic",
            "value_template": "{{ value_json.problem }}",
            "json_attributes_topic": topics.state(user.name),
            "json_attributes_template": "{{ {'reasons': value_json.reasons} | tojson }}",
        },
        "train": {
            "platform": "button",
            "name": "Train now",
            "icon": "mdi:school",
            "command_topic": topics.train(user.name),
            "payload_press": "PRESS",
        },
    }
    device = {
        "name": f"persona {user.name}",
        "model": model,
        "via_device": identity(topics, None),
    }
    return _announcement(topics, name, device, parts, topics.state(user.name), [_availability(topics)])


def service_device(topics: Topics, model: str) -> dict[str, Any]:
    """The announcement of the service's own device."""
    parts = {
        "connectivity": {
            "platform": "binary_sensor",
            "name": "Connection",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
            "state_topic": topics.status,
            "payload_on": ONLINE,
            "payload_off": OFFLINE,
        },
        "users": _sensor("Users", "users", icon="mdi:account-group", **_available(topics)),
        "training": {
            "platform": "binary_sensor",
            "name": "Training",
            "device_class": "running",
            "value_template": "{{ value_json.training }}",
            **_available(topics),
        },
        "events": _sensor("Events", "events", state_class="total_increasing", icon="mdi:tray", **_available(topics)),
        "dead_letters": _sensor("Dead letters", "dead_letters", icon="mdi:email-alert", **_available(topics)),
        "problem": {
            "platform": "binary_sensor",
            "name": "Problem",
            "device_class": "problem",
            "entity_category": "diagnostic",
            "value_template": "{{ value_json.problem }}",
            "json_attributes_topic": topics.service,
            "json_attributes_template": "{{ {'reasons': value_json.reasons} | tojson }}",
            **_available(topics),
        },
    }
    return _announcement(topics, identity(topics, None), {"name": "persona", "model": model}, parts, topics.service, [])


def _announcement(
    topics: Topics,
    name: str,
    device: dict[str, Any],
    parts: dict[str, dict[str, Any]],
    state: str,
    availability: list[dict[str, str]],
) -> dict[str, Any]:
    about = {"identifiers": [name], "manufacturer": "persona", "sw_version": __version__, **device}
    made = {
        "device": about,
        "origin": {"name": "persona", "sw_version": __version__},
        "components": {key: {**part, "unique_id": f"{name}_{key}"} for key, part in parts.items()},
        "state_topic": state,
        "qos": 1,
    }
    return {**made, "availability": availability} if availability else made


def _availability(topics: Topics) -> dict[str, str]:
    return {"topic": topics.status, "payload_available": ONLINE, "payload_not_available": OFFLINE}


def _available(topics: Topics) -> dict[str, Any]:
    """For parts of a device that has one part which is always there: its connection."""
    return {"availability": [_availability(topics)]}


def _sensor(name: str, field: str, *, unit: str | None = None, **more: Any) -> dict[str, Any]:
    made = {"platform": "sensor", "name": name, "value_template": f"{{{{ value_json.{field} }}}}", **more}
    if unit is not None:
        made |= {"unit_of_measurement": unit, "state_class": "measurement"}
    return made
