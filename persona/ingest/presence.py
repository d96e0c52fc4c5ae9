"""What the broker keeps about us: announcements and states, retained, and taken away with their user.

Everything is published again after each connection and each birth of Home Assistant, and whenever it has changed. What
a former life left of users who are gone is found at the connection, because the broker still holds it, and cleared.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec
import structlog

from persona.domain import RunState, User, UserId
from persona.errors import PersonaError
from persona.events import Intake
from persona.ingest import discovery
from persona.ingest.connection import Connection
from persona.ingest.topics import Topics
from persona.settings import Mqtt
from storage.database import Database
from storage.overview import Overview, overview

log = structlog.get_logger()

DEAD_HOURS = 24  # in which a dead letter counts as a problem
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
        intake: Intake,
        house: House,
        clock: Callable[[], datetime],
    ) -> None:
        self._settings, self._topics, self._database = settings, topics, database
        self._intake, self._house, self._clock = intake, house, clock
        self._told: dict[str, bytes] = {}  # what the broker holds, by topic
        self._users: dict[UserId, User] = {}  # as last published
        self._stale: set[str] = set()  # topics to clear
        self._gone: set[str] = set()  # names of users who were forgotten just now
        self._shown: set[tuple[str, str | None]] = set()  # topics that the broker holds, with the user they name
        self._changed = asyncio.Event()
        database.on_removed(self._removed)

    def again(self) -> None:
        """Somebody may have missed it all: publish everything again."""
        self._told.clear()
        self._changed.set()

    def changed(self) -> None:
        """Something may be different now."""
        self._changed.set()

    def clear(self, topic: str) -> None:
        """The broker holds something on `topic` that nobody stands behind any more."""
        self._stale.add(topic)
        self._changed.set()

    def seen(self, topic: str, user: str | None) -> None:
        """The broker holds one of our topics: the state of a user by name, or an announcement (None)."""
        self._shown.add((topic, user))
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
        self._users = {one.user.id: one.user for one in current}
        self._judge_shown()
        await self._clear(connection)
        if self._settings.discovery:
            await self._announce(connection)
        await self._tell(connection, self._topics.service, self._service(current))
        for one in current:
            await self._tell(connection, self._topics.state(one.user.name), self._state(one))

    async def _announce(self, connection: Connection) -> None:
        model = self._house.model
        await self._tell(connection, self._announcement(None), discovery.service_device(self._topics, model))
        for user in list(self._users.values()):
            device = discovery.user_device(self._topics, user, model)
            await self._tell(connection, self._announcement(user.id), device)

    def _judge_shown(self) -> None:
        """What the broker holds of users who are gone is to be cleared."""
        names = {user.name for user in self._users.values()}
        for topic, user in self._shown:
            owner = discovery.owner(self._topics, topic.split("/")[-2]) if user is None else None
            if (user is not None and user not in names) or (owner is not None and UserId(owner) not in self._users):
                self._stale.add(topic)
        self._shown.clear()

    async def _clear(self, connection: Connection) -> None:
        """What users who are gone had the broker store is shown by it once more, and cleared when it comes."""
        while self._gone:
            theirs = self._topics.everything(self._gone.pop())
            await connection.subscribe([theirs], stored=True)
            await connection.unsubscribe(theirs)
        while self._stale:
            topic = self._stale.pop()
            await connection.publish(topic, b"", retain=True)
            self._told.pop(topic, None)

    async def _tell(self, connection: Connection, topic: str, value: dict[str, Any]) -> None:
        payload = msgspec.json.encode(value)
        if self._told.get(topic) != payload:
            await connection.publish(topic, payload, retain=True)
            self._told[topic] = payload

    def _announcement(self, user_id: UserId | None) -> str:
        return self._topics.announcement(discovery.identity(self._topics, user_id))

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
            reasons.append(f"{one.missing} events never arrived.")
        if one.dead:
            reasons.append(f"{one.dead} events were refused within {DEAD_HOURS} hours.")
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
        if numbers is None:
            user = self._users.pop(user_id, None)
            self.clear(self._announcement(user_id))
            if user is not None:
                self.clear(self._topics.state(user.name))
                self._gone.add(user.name)
        self.changed()


def _switch(on: bool) -> str:
    return "ON" if on else "OFF"
