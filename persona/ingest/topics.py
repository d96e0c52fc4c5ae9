"""Which topic means what. Pure.

PREFIX/u/USER/events/KIND   in   one event of a user
PREFIX/u/USER/chat/set      in   a chat request → PREFIX/u/USER/chat, or below it
PREFIX/u/USER/train/set     in   train now
PREFIX/u/USER/state         out  retained: how the user's model is
PREFIX/u/USER/received/SRC  out  retained: which numbered events of that source are on our disk
PREFIX/svc/status           out  retained: online or offline (birth and will)
PREFIX/svc/state            out  retained: how the service is
"""

from dataclasses import dataclass

from persona.errors import ConfigurationError
from persona.settings import Mqtt


@dataclass(frozen=True, slots=True)
class EventTopic:
    """An event of that user; `kind` may be anything that a topic can hold."""

    user: str
    kind: str


@dataclass(frozen=True, slots=True)
class ChatTopic:
    """A chat request of that user."""

    user: str


@dataclass(frozen=True, slots=True)
class TrainTopic:
    """The wish that this user's model be trained now."""

    user: str


@dataclass(frozen=True, slots=True)
class StateTopic:
    """What we published for that user, perhaps before they were forgotten: a state or a receipt."""

    user: str


@dataclass(frozen=True, slots=True)
class HouseTopic:
    """Home Assistant's birth or death."""


Topic = EventTopic | ChatTopic | TrainTopic | StateTopic | HouseTopic


class Topics:
    """The topics under one prefix. Raises ConfigurationError for a prefix that cannot stand in a topic."""

    def __init__(self, settings: Mqtt) -> None:
        self.prefix = _checked("mqtt.prefix", settings.prefix)
        self.discovery = _checked("mqtt.discovery_prefix", settings.discovery_prefix)
        self.status = f"{self.prefix}/svc/status"
        self.service = f"{self.prefix}/svc/state"
        self.house = f"{self.discovery}/status"
        self.own = [f"{self.prefix}/u/+/state", f"{self.prefix}/u/+/received/#"]  # of users, retained

    def wanted(self, *, house: bool) -> list[str]:
        """What to subscribe to for good."""
        users = [f"{self.prefix}/u/+/{rest}" for rest in ("events/#", "chat/set", "train/set")]
        return [*users, self.house] if house else users

    def read(self, topic: str) -> Topic | None:
        """What a topic means; None: nothing to us."""
        if topic == self.house:
            return HouseTopic()
        user = self.user(topic)
        if user is None:
            return None
        rest = topic.removeprefix(f"{self.prefix}/u/{user}").removeprefix("/")
        if rest == "events" or rest.startswith("events/"):
            return EventTopic(user, rest.removeprefix("events").removeprefix("/"))
        if rest.startswith("received/"):
            return StateTopic(user)
        exact: dict[str, Topic] = {
            "chat/set": ChatTopic(user),
            "train/set": TrainTopic(user),
            "state": StateTopic(user),
        }
        return exact.get(rest)

    def user(self, topic: str) -> str | None:
        """The name of the user below whose part of the tree `topic` lies, whoever that is."""
        below = f"{self.prefix}/u/"
        return topic.removeprefix(below).partition("/")[0] if topic.startswith(below) else None

    def chat(self, user: str) -> str:
        return f"{self.prefix}/u/{user}/chat"

    def train(self, user: str) -> str:
        return f"{self.prefix}/u/{user}/train/set"

    def state(self, user: str) -> str:
        return f"{self.prefix}/u/{user}/state"

    def received(self, user: str, source: str) -> str:
        return f"{self.prefix}/u/{user}/received/{source}"

    def everything(self, user: str) -> str:
        """All topics of a user."""
        return f"{self.prefix}/u/{user}/#"

    def announcement(self, identity: str) -> str:
        """Where Home Assistant looks for the device of that identity."""
        return f"{self.discovery}/device/{identity}/config"

    def announced(self, topic: str) -> str | None:
        """The identity of the device that is announced on `topic`; None: it is no topic for that."""
        start, end = self.announcement("\0").split("\0")
        identity = topic.removeprefix(start).removesuffix(end)
        return identity if topic == self.announcement(identity) else None

    def may_answer(self, user: str, topic: str) -> bool:
        """Whether a reply to `user` may go there: to their own chat topic or below it, never to somebody else's."""
        own = self.chat(user)
        allowed = topic == own or topic.startswith(f"{own}/")
        return allowed and topic != f"{own}/set" and not set(topic) & set("+#\0") and len(topic) <= 256


def _checked(name: str, prefix: str) -> str:
    if not prefix or set(prefix) & set("+#\0") or prefix.startswith(("/", "$")) or prefix.endswith("/"):
        raise ConfigurationError(f"{name} is a part of a topic: no +, no #, no slash at its ends.")
    return prefix
