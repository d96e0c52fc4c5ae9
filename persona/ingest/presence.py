"""What the broker keeps about us: announcements and states, retained, and taken away with their user.

Everything is published again after each connection and each birth of Home Assistant, and whenever it has changed. What
the broker holds and nobody stands behind any more is cleared: at once, and at each connection also what a former life
left, because the broker shows it then.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec
import structlog

from persona.domain import RunState, UserId
from persona.errors import PersonaError
from persona.events import Intake
from persona.ingest import discovery
from persona.ingest.connection import Connection
from persona.ingest.topics import Topics
from persona.settings import Mqtt
from storage.database import Database
from storage.events import Events, Source
from storage.overview import Overview, overview

log = structlog.get_logger()

DEAD_HOURS = 24  # in which a dead letter counts as a problem
RECEIPT_SECONDS = 1.0  # after which a device may know what has arrived
LOOK_SECONDS = 5.0  # in which the broker shows what it still holds of us


@dataclass(frozen=True, slots=True)
class House:
    """What is told of the service as a whole. `troubles` are sentences."""

    model: str
    base: Callable[[], str]
    troubles: Callable[[], Sequence[str]]


class Presence:
    """Keeps the broker's picture of us true. `run` lives as long as a connection."""

    def __init__(
        self,
        settings: Mqtt,
        topics: Topics,
        database: Database,
        events: Events,
        intake: Intake,
        house: House,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings, self._topics, self._database, self._events = settings, topics, database, events
        self._intake, self._house, self._clock = intake, house, clock
        self._told: dict[str, bytes] = {}  # what we had the broker hold, by topic
        self._stale: set[str] = set()  # topics to clear
        self._gone: set[str] = set()  # names that nobody has any more, of whom the broker may hold more
        self._shown: set[str] = set()  # states and announcements that the broker holds, ours or not
        self._changed = asyncio.Event()
        self._soon: asyncio.TimerHandle | None = None
        database.on_removed(self._removed)

    def again(self) -> None:
        """Somebody may have missed it all: publish everything again."""
        self._told = dict.fromkeys(self._told, b"")
        self._changed.set()

    def changed(self) -> None:
        """Something may be different now."""
        self._changed.set()

    def arrived(self) -> None:
        """Events were stored: their sources are told before long, and once for many."""
        if self._soon is None:
            self._soon = asyncio.get_running_loop().call_later(RECEIPT_SECONDS, self._tell_soon)

    def _tell_soon(self) -> None:
        self._soon = None
        self._changed.set()

    def clear(self, topic: str) -> None:
        """The broker holds something on `topic` that nobody stands behind any more."""
        self._stale.add(topic)
        self._changed.set()

    def seen(self, topic: str) -> None:
        """The broker holds a state or an announcement."""
        self._shown.add(topic)
        self._changed.set()

    async def run(self, connection: Connection) -> None:
        """Publish what has changed, at once when somebody says so, else at regular intervals. Raises Lost."""
        self.again()
        while True:
            self._changed.clear()
            try:
                await self._publish(connection)
            except PersonaError as error:  # a full or busy database: the next round shows it
                log.warning("states were not published", kind=type(error).__name__)
            try:
                async with asyncio.timeout(self._settings.state_seconds):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def farewell(self, connection: Connection) -> None:
        """The graceful end, of which no will tells. Raises Lost."""
        await connection.publish(self._topics.status, discovery.OFFLINE, retain=True)

    async def _publish(self, connection: Connection) -> None:
        current = await overview(self._database, self._clock() - timedelta(hours=DEAD_HOURS))
        picture = self._picture(current) | self._receipts(await self._events.numbered())
        self._judge(picture)
        await self._clear(connection)
        for topic, value in picture.items():
            await self._tell(connection, topic, value)

    def _picture(self, current: Sequence[Overview]) -> dict[str, dict[str, Any]]:
        """What the broker should hold of us, by topic: the service first, as its users refer to it."""
        topics, model = self._topics, self._house.model
        picture: dict[str, dict[str, Any]] = {}
        if self._settings.discovery:
            picture[topics.announcement(discovery.identity(topics, None))] = discovery.service_device(topics, model)
            for user in (one.user for one in current):
                announced = topics.announcement(discovery.identity(topics, user.id))
                picture[announced] = discovery.user_device(topics, user, model)
        picture[topics.service] = self._service(current)
        return picture | {topics.state(one.user.name): self._state(one) for one in current}

    def _receipts(self, numbered: Sequence[tuple[str, Source]]) -> dict[str, dict[str, Any]]:
        """By topic: up to which number a source's events are on our disk, and which are not."""
        return {
            self._topics.received(name, one.source): {"seq": one.last_seq, "missing": one.gaps}
            for name, one in numbered
            if one.source
        }

    def _judge(self, picture: dict[str, dict[str, Any]]) -> None:
        """What the broker holds of us and should not."""
        shown = {topic for topic in self._shown if self._topics.user(topic) or self._announces_ours(topic)}
        self._shown.clear()
        left = (shown | self._told.keys()) - picture.keys()
        self._stale |= left
        self._gone |= {name for topic in left if (name := self._topics.user(topic))}

    def _announces_ours(self, topic: str) -> bool:
        named = self._topics.announced(topic)
        return named is not None and discovery.ours(self._topics, named)

    async def _clear(self, connection: Connection) -> None:
        """What else the broker stores of users who are gone is shown by it once more, and cleared when it comes."""
        while self._stale:
            topic = min(self._stale)
            await connection.publish(topic, b"", retain=True)
            self._stale.discard(topic)
            self._told.pop(topic, None)
        while self._gone:
            name = min(self._gone)
            theirs = self._topics.everything(name)
            await connection.subscribe([theirs], stored=True)
            await connection.unsubscribe(theirs)
            self._gone.discard(name)

    async def _tell(self, connection: Connection, topic: str, value: dict[str, Any]) -> None:
        payload = msgspec.json.encode(value)
        if self._told.get(topic) != payload:
            await connection.publish(topic, payload, retain=True)
            self._told[topic] = payload

    def _state(self, one: Overview) -> dict[str, Any]:
        reasons = self._reasons(one)
        return {
            "version": one.user.active or 0,
            "last_training": one.last_training.isoformat() if one.last_training else None,
            "last_result": one.last_state,
            "held_out_loss": one.held_out_loss,
            "new_tokens": one.new_tokens,
            "training": _switch(one.training),
            "learns": _switch(one.user.learn and not one.user.paused),
            "problem": _switch(bool(reasons)),
            "reasons": reasons,
        }

    def _reasons(self, one: Overview) -> list[str]:
        reasons = []
        if one.last_state is RunState.FAILED:
            reasons.append(f"The last training failed: {one.last_reason}")
        if one.base is not None and one.base != self._house.base():
            reasons.append("The version is of another base model and sleeps until it is trained again.")
        if one.missing:
            reasons.append(f"Events that never arrived: {one.missing}.")
        if one.dead:
            reasons.append(f"Events refused within {DEAD_HOURS} hours: {one.dead}.")
        return reasons

    def _service(self, current: Sequence[Overview]) -> dict[str, Any]:
        troubles = list(self._house.troubles())
        return {
            "users": len(current),
            "training": _switch(any(one.training for one in current)),
            "events": self._intake.counts["stored"],
            "dead_letters": sum(one.dead for one in current),
            "problem": _switch(bool(troubles)),
            "reasons": troubles,
        }

    async def _removed(self, user_id: UserId, numbers: Sequence[int] | None) -> None:
        """A user was forgotten: so must the broker."""
        self.changed()


def _switch(on: bool) -> str:
    return "ON" if on else "OFF"
