"""Topics and identities, without a broker: what they mean, and what hostile ones do not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona.errors import ConfigurationError
from persona.ingest import discovery
from persona.ingest.topics import ChatTopic, EventTopic, HouseTopic, StateTopic, Topics, TrainTopic
from persona.settings import Mqtt

TOPICS = Topics(Mqtt())
PREFIXES = ["persona", "a/b", "a_b", "a-b", "home/ann's persona", "é", "ö", "persona_1", "x" * 40]
NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True)


def under(prefix: str) -> Topics:
    return Topics(Mqtt(prefix=prefix))


@pytest.mark.parametrize(
    ("topic", "meaning"),
    [
        ("persona/u/ann/events/message", EventTopic("ann", "message")),
        ("persona/u/ann/events", EventTopic("ann", "")),
        ("persona/u/ann/events/", EventTopic("ann", "")),
        ("persona/u/ann/events/a/b", EventTopic("ann", "a/b")),
        ("persona/u/ann/chat/set", ChatTopic("ann")),
        ("persona/u/ann/train/set", TrainTopic("ann")),
        ("persona/u/ann/state", StateTopic("ann")),
        ("persona/u/ann.x-y_z/state", StateTopic("ann.x-y_z")),
        ("homeassistant/status", HouseTopic()),
        ("persona/u//events/message", EventTopic("", "message")),
        ("persona/u/ann/chat", None),
        ("persona/u/ann", None),
        ("persona/u/", None),
        ("persona/u", None),
        ("persona/u/ann/eventsx", None),
        ("persona/u/ann/state/x", None),
        ("persona/u/u/u/events/message", None),
        ("other/u/ann/events/message", None),
        ("/persona/u/ann/state", None),
        ("", None),
    ],
)
def test_a_topic_means_one_thing_or_nothing(topic: str, meaning: object) -> None:
    assert TOPICS.read(topic) == meaning


@given(NAMES)
def test_what_is_written_for_a_user_is_read_as_theirs(name: str) -> None:
    assert TOPICS.read(TOPICS.state(name)) == StateTopic(name)
    assert TOPICS.read(TOPICS.train(name)) == TrainTopic(name)
    assert TOPICS.read(f"{TOPICS.chat(name)}/set") == ChatTopic(name)
    for topic in (TOPICS.state(name), TOPICS.train(name), TOPICS.chat(name)):
        assert TOPICS.user(topic) == name


@given(st.text())
def test_no_topic_surprises_the_reader(topic: str) -> None:
    TOPICS.read(topic)
    TOPICS.read(f"persona/u/{topic}")
    assert (TOPICS.user(topic) is None) == (not topic.startswith("persona/u/"))


@pytest.mark.parametrize("prefix", ["", "/a", "a/", "a/+", "#", "$SYS", "a\0b"])
def test_a_prefix_that_cannot_stand_in_a_topic_stops_the_start(prefix: str) -> None:
    for name in ("prefix", "discovery_prefix"):
        with pytest.raises(ConfigurationError, match=f"mqtt.{name}"):
            Topics(Mqtt.model_validate({name: prefix}))


@pytest.mark.parametrize(
    ("topic", "allowed"),
    [
        ("persona/u/ann/chat", True),
        ("persona/u/ann/chat/kitchen", True),
        ("persona/u/ann/chat/a/b", True),
        ("persona/u/ann/chat/set", False),  # would be a question again
        ("persona/u/ann/chat/+", False),
        ("persona/u/ann/chat/#", False),
        ("persona/u/ann/chat/" + "x" * 300, False),
        ("persona/u/ann/chatter", False),
        ("persona/u/ann/events/message", False),
        ("persona/u/ann", False),
        ("persona/u/bob/chat", False),
        ("persona/u/ann/chat/../../bob/chat", True),  # topics are no paths: this is one of ann's
        ("homeassistant/status", False),
        ("", False),
    ],
)
def test_threat_22_a_reply_goes_below_its_users_own_chat(topic: str, allowed: bool) -> None:
    assert TOPICS.may_answer("ann", topic) is allowed


@pytest.mark.parametrize("prefix", PREFIXES)
def test_an_identity_may_stand_in_home_assistants_topic(prefix: str) -> None:
    topics = under(prefix)
    for number in (None, 1, 10**12):
        named = discovery.identity(topics, number)
        assert named.isascii()
        assert set(named) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
        assert discovery.ours(topics, named)
        assert topics.announced(topics.announcement(named)) == named


def test_no_two_services_share_an_identity() -> None:
    named = [discovery.identity(under(prefix), number) for prefix in PREFIXES for number in (None, 1, 2, 11, 12)]
    assert len(set(named)) == len(named)
    for one in PREFIXES:
        for other in set(PREFIXES) - {one}:
            assert not discovery.ours(under(one), discovery.identity(under(other), 1))
            assert not discovery.ours(under(one), discovery.identity(under(other), None))


@pytest.mark.parametrize(
    "named",
    ["", "persona", "persona_", "persona_x", "persona_1x", "persona_01", "persona_-1", "persona_²", "persona_١",
     "service", "personal_1", "xpersona_1", "persona_1_2", "Persona_1", "persona_service_"],
)  # fmt: skip
def test_devices_of_others_are_not_ours(named: str) -> None:
    assert not discovery.ours(TOPICS, named)


@pytest.mark.parametrize(
    "topic",
    ["", "homeassistant/status", "homeassistant/sensor/persona_1/config", "homeassistant/device/persona_1/x/config",
     "homeassistant/device/config", "other/device/persona_1/config", "homeassistant/device/persona_1/state"],
)  # fmt: skip
def test_other_topics_announce_no_device_of_ours(topic: str) -> None:
    named = TOPICS.announced(topic)
    assert named is None or not discovery.ours(TOPICS, named)
