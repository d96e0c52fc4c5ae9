"""Events and chats over MQTT, for as long as the service lives: connect, take in, acknowledge, connect again.

A message is acknowledged after its batch is committed, in the order of arrival; what is not comes again with the
persistent session. So a crash anywhere, here or at the broker, loses nothing that the broker has accepted.
"""

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random

import structlog

from persona.errors import Busy, StorageFull
from persona.events import Delivery, Intake
from persona.ingest import connection as links
from persona.ingest import discovery
from persona.ingest.connection import Connection, Lost, Packet
from persona.ingest.presence import LOOK_SECONDS, Presence
from persona.ingest.talk import Talk
from persona.ingest.topics import ChatTopic, EventTopic, HouseTopic, StateTopic, Topic, Topics, TrainTopic
from persona.settings import Settings

log = structlog.get_logger()

FIRST_WAIT = 0.5  # seconds before the first new attempt; doubled each time
LONGEST_WAIT = 60.0
SETTLED = 10.0  # seconds after which a connection counts as a good one
HELD_SECONDS = 2.0  # between attempts to store what a full or busy disk refused
STOP_SECONDS = 10.0  # for the batch under way to be stored

Train = Callable[[str], Awaitable[None]]  # asks for a run of the user of that name, if they may have one


class Mqtt:
    """Owns the connection and everything that happens on it; `start` and `stop` it once."""

    def __init__(
        self,
        settings: Settings,
        topics: Topics,
        intake: Intake,
        talk: Talk,
        presence: Presence,
        train: Train,
        *,
        password: str | None,
        random: Random,
    ) -> None:
        self._settings, self._topics, self._intake = settings, topics, intake
        self._talk, self._presence, self._train = talk, presence, train
        self._password, self._random = password, random
        self._connection: Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._lost: str | None = "The broker has not answered yet."
        self._held: str | None = None
        self.counts: Counter[str] = Counter()  # connections, sessions_lost

    async def start(self) -> None:
        """Begin to connect; a broker that is away is waited for. Raises ConfigurationError."""
        links.check(self._settings.mqtt)
        identifier = await asyncio.to_thread(_identifier, self._settings.mqtt_client, self._topics.prefix)
        self._task = asyncio.create_task(self._keep(identifier), name="mqtt")

    async def stop(self, seconds: float) -> None:
        """Store what has arrived, let chats end for so many seconds, say goodbye."""
        self._stopping.set()
        if self._connection is not None:
            self._connection.interrupt()
        await self._talk.drain(seconds)
        if self._task is not None:
            await asyncio.wait([self._task], timeout=STOP_SECONDS)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def trouble(self) -> str | None:
        """What an owner should know: no broker, or a disk that takes no events."""
        return self._held or self._lost

    # --- connections

    async def _keep(self, identifier: str) -> None:
        wait = FIRST_WAIT
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                await self._live(identifier)
            except Lost as lost:
                self._lost = str(lost)
            except Exception as error:  # whatever it was, the next connection is a new chance
                self._lost = f"The connection failed with {type(error).__name__}."
                log.error("mqtt failed", kind=type(error).__name__)
            if self._stopping.is_set():
                return
            wait = FIRST_WAIT if time.monotonic() - started > SETTLED else wait
            pause = wait * self._random.uniform(0.5, 1.0)  # so that not all clients of a broker come back at once
            log.warning("no broker", why=self._lost, again_in_s=round(pause, 1))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            wait = min(2 * wait, LONGEST_WAIT)

    async def _live(self, identifier: str) -> None:
        """One connection, from its beginning to its end."""
        mqtt = self._settings.mqtt
        will = (self._topics.status, discovery.OFFLINE)
        async with links.connected(mqtt, identifier, self._password, will) as connection:
            await self._greet(connection)
            beside = [asyncio.create_task(work(connection)) for work in (self._presence.run, self._look)]
            beside[0].add_done_callback(lambda _: connection.interrupt())  # it ends only if the broker stays silent
            try:
                self._connection, self._lost = connection, None
                await self._take_in(connection)
                await self._presence.farewell(connection)
            finally:
                self._connection = None
                await _end(beside)

    async def _greet(self, connection: Connection) -> None:
        self.counts["connections"] += 1
        if not connection.resumed and self.counts["connections"] > 1:
            self.counts["sessions_lost"] += 1
            log.warning("the broker lost our session; what it held for us is gone (see configs/mosquitto.conf)")
        await connection.subscribe(self._topics.wanted(house=self._settings.mqtt.discovery), stored=False)
        await connection.publish(self._topics.status, discovery.ONLINE, retain=True)
        log.info("→ broker", host=self._settings.mqtt.host, port=self._settings.mqtt.port, resumed=connection.resumed)

    async def _look(self, connection: Connection) -> None:
        """See what the broker holds of us, users who are gone included."""
        topics = [*self._topics.own, self._topics.announcement("+")]
        await connection.subscribe(topics, stored=True)
        await asyncio.sleep(LOOK_SECONDS)
        for topic in topics:
            await connection.unsubscribe(topic)

    # --- messages

    async def _take_in(self, connection: Connection) -> None:
        """Until the service stops. Raises Lost."""
        while not self._stopping.is_set():
            packets = await connection.receive(self._settings.mqtt.window)
            if not packets and not self._stopping.is_set():
                raise Lost("The broker does not answer.")
            await self._store(packets)
            await self._shed(connection)
            for packet in packets:
                await self._heed(connection, packet)
            connection.acknowledge(packets)

    async def _store(self, packets: list[Packet]) -> None:
        """Have the events among `packets` committed, however long a full disk makes that take."""
        found = [(packet, self._topics.read(packet.topic)) for packet in packets]
        deliveries = [_delivery(packet, topic) for packet, topic in found if isinstance(topic, EventTopic)]
        while deliveries:
            try:
                await self._intake.accept(deliveries)
                self._held = None
                self._presence.arrived()
                return
            except StorageFull:
                self._held = "The disk is full: events wait at the broker until there is space."
            except Busy:
                self._held = "The database is busy: events wait at the broker."
            log.error("events wait", why=self._held, events=len(deliveries))
            if self._stopping.is_set():
                raise Lost("The service stops with events that could not be stored; the broker still has them.")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), HELD_SECONDS)

    async def _shed(self, connection: Connection) -> None:
        """Note what was dropped for want of room, by user."""
        dropped: Counter[str] = Counter()
        for topic, count in connection.take_shed().items():
            meant = self._topics.read(topic)
            if isinstance(meant, EventTopic):
                dropped[meant.user] += count
        with contextlib.suppress(StorageFull, Busy):
            await self._intake.shed(dropped)

    async def _heed(self, connection: Connection, packet: Packet) -> None:
        """Whatever is not an event."""
        topic = self._topics.read(packet.topic)
        if packet.retained and packet.payload:
            await self._find(packet, topic)
        elif isinstance(topic, ChatTopic):
            self._talk.hear(topic.user, packet, connection.publish)
        elif isinstance(topic, TrainTopic) and packet.payload:  # nothing: somebody takes a stored wish back
            await self._train(topic.user)
            self._presence.changed()
        elif isinstance(topic, HouseTopic) and packet.payload == discovery.ONLINE.encode():
            self._presence.again()

    async def _find(self, packet: Packet, topic: Topic | None) -> None:
        """Something that the broker stores: it may be of a user who is gone, or ours of a former life."""
        user = self._topics.user(packet.topic)
        if isinstance(topic, HouseTopic):
            if packet.payload == discovery.ONLINE.encode():
                self._presence.again()
        elif user is None or isinstance(topic, StateTopic):
            self._presence.seen(packet.topic)
        elif await self._intake.forgotten(user):
            self._presence.clear(packet.topic)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception) and not isinstance(result, Lost):
            log.error("mqtt failed", kind=type(result).__name__)


def _delivery(packet: Packet, topic: EventTopic) -> Delivery:
    return Delivery(
        user=topic.user,
        kind=topic.kind,
        payload=packet.payload,
        retained=packet.retained,
        again=packet.again,
        mark=packet.mid.to_bytes(2, "big") if packet.qos else None,
        size=packet.size,
    )


def _identifier(file: Path, prefix: str) -> str:
    """The name of our session at the broker: the same after every restart, and no one else's guess."""
    with contextlib.suppress(FileNotFoundError):
        if kept := file.read_text(encoding="ascii").strip():
            return kept
    made = f"{prefix.replace('/', '-')}-{secrets.token_hex(12)}"
    part = file.with_suffix(".part")
    part.write_text(made, encoding="ascii")
    part.chmod(0o600)
    part.replace(file)
    return made
