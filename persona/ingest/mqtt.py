"""Events and chats over MQTT, for as long as the service lives: connect, take in, acknowledge, connect again.

A message is acknowledged after its batch is committed, in the order of arrival; what is not comes again with the
persistent session. So a crash anywhere, here or at the broker, loses nothing that the broker has accepted.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random

import structlog

from persona.errors import Busy, StorageFull
from persona.events import Delivery, Intake
from persona.ingest import connection as links
from persona.ingest import discovery
from persona.ingest.connection import Connection, Lost, Packet
from persona.ingest.presence import LOOK_SECONDS, Presence
from persona.ingest.session import Session
from persona.ingest.talk import Talk
from persona.ingest.topics import ChatTopic, EventTopic, HouseTopic, StateTopic, Topic, Topics, TrainTopic
from persona.settings import Settings

log = structlog.get_logger()

FIRST_WAIT = 0.5  # seconds before the first new attempt; doubled each time
LONGEST_WAIT = 60.0
SETTLED = 10.0  # seconds after which a connection counts as a good one
HELD_SECONDS = 2.0  # between attempts to store what a full or busy disk refused
STOP_SECONDS = 10.0  # for the batch under way to be stored
ANSWER_SECONDS = 60.0  # that an answer waits for a connection
NOTICE_SECONDS = 0.1  # between two looks whether there is another one

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
        self._dropped: Counter[str] = Counter()  # messages of QoS 0 that found no room, by user
        self._patience = settings.http.shutdown_seconds
        self._connection: Connection | None = None
        self._there = asyncio.Event()  # a connection
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._lost: str | None = "The broker has not answered yet."
        self._held: str | None = None
        self.counts: Counter[str] = Counter()  # connections, sessions_lost

    async def start(self) -> None:
        """Begin to connect; a broker that is away is waited for. Raises ConfigurationError."""
        links.check(self._settings.mqtt)
        session = await asyncio.to_thread(Session.load, self._settings.mqtt_client, self._topics.prefix)
        if session.damaged:
            self.counts["sessions_lost"] += 1
            why = "the name of our session is lost; what the broker holds under it stays there (see docs/DEPLOY.md)"
            log.error(why, file=str(session.file))
        self._task = asyncio.create_task(self._keep(session), name="mqtt")

    async def stop(self) -> None:
        """Store what has arrived, let chats end within http.shutdown_seconds, say goodbye."""
        self._stopping.set()
        if self._connection is not None:
            self._connection.interrupt()
        if self._task is not None:
            await asyncio.wait([self._task], timeout=self._patience + STOP_SECONDS)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._talk.drain(0)  # without a connection nobody waited for them

    @property
    def connected(self) -> bool:
        return self._connection is not None

    @property
    def held(self) -> str | None:
        """Why events wait at the broker, if they do."""
        return self._held

    def trouble(self) -> str | None:
        """What an owner should know: no broker, or a disk that takes no events."""
        return self._held or self._lost

    # --- connections

    async def _keep(self, session: Session) -> None:
        wait = FIRST_WAIT
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                await self._live(session)
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

    async def _live(self, session: Session) -> None:
        """One connection, from its beginning to its end."""
        mqtt = self._settings.mqtt
        will = (self._topics.status, discovery.OFFLINE)
        await _written(session.keep)
        async with links.connected(mqtt, session.identifier, self._password, will) as connection:
            await self._greet(connection, session)
            beside = [asyncio.create_task(work(connection)) for work in (self._presence.run, self._look)]
            beside[0].add_done_callback(lambda _: connection.interrupt())  # it ends only if the broker stays silent
            try:
                self._connection, self._lost = connection, None
                self._there.set()
                await self._take_in(connection, session)
                await self._talk.drain(self._patience)
                await self._presence.farewell(connection)
            finally:
                self._connection = None
                self._there.clear()
                await _end(beside)

    async def _answer(self, topic: str, payload: bytes, *, correlation: bytes | None = None) -> None:
        """By the connection there is, which need not be that of the question. If it breaks under the answer, by the
        next one: better twice than never. Raises Lost."""
        first = await self._after(None)
        try:
            await first.publish(topic, payload, correlation=correlation)
        except Lost:
            again = await self._after(first)
            await again.publish(topic, payload, correlation=correlation)

    async def _after(self, last: Connection | None) -> Connection:
        """A connection that is not the `last` one. Raises Lost."""
        try:
            async with asyncio.timeout(0 if self._stopping.is_set() else ANSWER_SECONDS):
                while (found := self._connection) is None or found is last:
                    await (self._there.wait() if found is None else asyncio.sleep(NOTICE_SECONDS))
                return found
        except TimeoutError:
            raise Lost("There is no broker.") from None

    async def _greet(self, connection: Connection, session: Session) -> None:
        self.counts["connections"] += 1
        if not connection.resumed:
            if session.known:
                self.counts["sessions_lost"] += 1
                log.warning("the broker lost our session; what it held for us is gone (see configs/mosquitto.conf)")
            session.forget()
        if not session.known:  # before it sends us anything
            await _written(session.renew)
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

    async def _take_in(self, connection: Connection, session: Session) -> None:
        """Until the service stops, be it with events that the disk did not take: the broker still has them. Raises
        Lost."""
        while not self._stopping.is_set():
            packets = await connection.receive(self._settings.mqtt.window)
            if not packets and not self._stopping.is_set():
                raise Lost("The broker does not answer.")
            heeded = 0
            while not await self._stored(packets, session):
                heeded = await self._heed_all(packets, heeded)  # chat goes on without the disk
                if not await self._wait_for_space():
                    return
                connection.demand()
                packets += connection.take(self._settings.mqtt.window - len(packets))
            await self._heed_all(packets, heeded)
            await self._shed(connection)
            connection.acknowledge(packets)

    async def _stored(self, packets: list[Packet], session: Session) -> bool:
        """Have the events among `packets` committed; False if the disk does not take all, which then come again."""
        found = [(packet, self._topics.read(packet.topic)) for packet in packets]
        deliveries = [
            _delivery(packet, topic, session.nonce) for packet, topic in found if isinstance(topic, EventTopic)
        ]
        try:
            if deliveries:
                await self._intake.accept(deliveries)
                self._presence.arrived()
            self._held = None
        except StorageFull:
            self._held = "The disk is full: events wait at the broker until there is space."
        except Busy:
            self._held = "The database is busy: events wait at the broker."
        if self._held is not None:
            log.error("events wait", why=self._held, events=len(deliveries))
        return self._held is None

    async def _wait_for_space(self) -> bool:
        """False: there is no time left to wait."""
        self._presence.changed()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), HELD_SECONDS)
        if self._stopping.is_set():
            log.warning("the service stops with events that could not be stored; the broker still has them")
        return not self._stopping.is_set()

    async def _shed(self, connection: Connection) -> None:
        """Note what was dropped for want of room, by user; a full disk hears of it later."""
        for topic, count in connection.take_shed().items():
            self._dropped[self._topics.user(topic) or ""] += count
        if self._dropped:
            with contextlib.suppress(StorageFull, Busy):
                await self._intake.shed(self._dropped)
                self._dropped = Counter()

    async def _heed_all(self, packets: list[Packet], start: int) -> int:
        """Everything but events, from `start` on; how many packets are done with."""
        for packet in packets[start:]:
            await self._heed(packet)
        return len(packets)

    async def _heed(self, packet: Packet) -> None:
        """Whatever is not an event."""
        topic = self._topics.read(packet.topic)
        if packet.retained and packet.payload:
            await self._find(packet, topic)
        elif isinstance(topic, ChatTopic):
            await self._talk.room()
            self._talk.hear(topic.user, packet, self._answer)
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


async def _written(write: Callable[[], None]) -> None:
    """Have a session written. Raises Lost: what comes under a name that is not on the disk may never come again."""
    try:
        await asyncio.to_thread(write)
    except (StorageFull, OSError):
        raise Lost("The name of our session cannot be written: see to the state folder's space and rights.") from None


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception) and not isinstance(result, Lost):
            log.error("mqtt failed", kind=type(result).__name__)


def _delivery(packet: Packet, topic: EventTopic, nonce: bytes) -> Delivery:
    return Delivery(
        user=topic.user,
        kind=topic.kind,
        payload=packet.payload,
        retained=packet.retained,
        again=packet.again,
        mark=nonce + packet.mid.to_bytes(2, "big") if packet.qos else None,
        size=packet.size,
    )
