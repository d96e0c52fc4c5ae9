"""One connection to the broker, on which nothing is acknowledged before somebody says so.

aiomqtt acknowledges a message when it has arrived, not when it is stored; and its bounded queue drops what it has
acknowledged. So this file reaches behind it to paho: manual acknowledgement, a queue of our own, the flags of a
delivery and of a session. It is the only file that does, and `check` says at the start whether paho still has what it
takes.
"""

import asyncio
import contextlib
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiomqtt
from aiomqtt.types import PayloadType
from paho.mqtt.client import Client as Paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from persona.errors import ConfigurationError
from persona.settings import Mqtt

FOREVER = 0xFFFFFFFF  # seconds for which a broker of MQTT 5 keeps our session
_REST = 1024  # bytes of a payload above the limit that are looked at
_MOST_BYTES = 32 << 20  # of waiting payloads above which messages of QoS 0 are dropped
_TOPICS = 100  # topics of dropped messages that are told apart
_WAIT = 10.0  # seconds for the broker to answer one of our packets
_REFUSED = {  # CONNACK codes of MQTT 3.1.1 and 5 that only the owner can mend
    4: "user name or password",
    5: "user name, password or permission",
    133: "client identifier",
    134: "user name or password",
    135: "permission",
    138: "a ban at the broker",
}


class Lost(Exception):
    """There is no connection, or there is none any more; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Packet:
    """One message as the broker delivered it. `size`: bytes of the payload; above the limit `payload` is its head."""

    topic: str
    payload: bytes
    size: int
    qos: int
    retained: bool
    again: bool
    mid: int
    reply_to: str | None = None
    correlation: bytes | None = None


def check(settings: Mqtt) -> None:
    """Raises ConfigurationError for unreadable certificates, or libraries that lack what this file reaches for."""
    _tls(settings)
    client = aiomqtt.Client("127.0.0.1")
    paho = getattr(client, "_client", None)
    wanted = {"aiomqtt": (client, ("_client", "_disconnected")), "paho-mqtt": (paho, ("manual_ack_set", "ack"))}
    for library, (owner, names) in wanted.items():
        if missing := [name for name in names if not hasattr(owner, name)]:
            sentence = f"{library} has no {missing[0]} any more: install the versions of constraints.txt."
            raise ConfigurationError(sentence)


class Connection:
    """An open connection. `resumed`: the broker had kept our session."""

    def __init__(self, client: aiomqtt.Client, settings: Mqtt) -> None:
        self._client = client
        self._settings = settings
        self._waiting: deque[Packet] = deque()
        self._bytes = 0  # of the payloads that wait
        self._stirred = asyncio.Event()
        self._interrupted = False
        self._shed: Counter[str] = Counter()
        self.resumed = False

    async def receive(self, most: int) -> list[Packet]:
        """What has arrived, at most `most`: at least one, unless interrupted. Raises Lost."""
        while not self._waiting and not self._interrupted:
            self.demand()
            self._stirred.clear()
            await self._stirred.wait()
        return self.take(most)

    def take(self, most: int) -> list[Packet]:
        """What has arrived already, at most `most`."""
        taken = [self._waiting.popleft() for _ in range(min(max(0, most), len(self._waiting)))]
        self._bytes -= sum(len(packet.payload) for packet in taken)
        return taken

    def interrupt(self) -> None:
        """Have `receive` return."""
        self._interrupted = True
        self._stirred.set()

    def take_shed(self) -> Counter[str]:
        """How many messages of QoS 0 were dropped, by topic, since the last call."""
        shed, self._shed = self._shed, Counter()
        return shed

    def acknowledge(self, packets: list[Packet]) -> None:
        """The broker may forget these; in the order of their arrival, as the protocol demands."""
        for packet in packets:
            if packet.qos and not self._client._disconnected.done():
                self._client._client.ack(packet.mid, packet.qos)

    async def publish(
        self, topic: str, payload: PayloadType, *, retain: bool = False, correlation: bytes | None = None
    ) -> None:
        """At QoS 1, until the broker has it. `correlation`: what a reply of MQTT 5 carries back. Raises Lost."""
        properties = self._properties(correlation)
        try:
            await self._client.publish(topic, payload, qos=1, retain=retain, properties=properties, timeout=_WAIT)
        except aiomqtt.MqttError as error:
            raise Lost(_sentence(error)) from None

    async def subscribe(self, topics: list[str], *, stored: bool) -> None:
        """At QoS 1. Raises Lost. stored: have the broker send what it retains on them, every time and not just once."""
        options = SubscribeOptions(qos=1, retainHandling=0 if stored else 1)
        how: dict[str, Any] = {"options": options} if self._settings.version == "5" else {"qos": 1}
        try:
            for topic in topics:
                await self._client.subscribe(topic, timeout=_WAIT, **how)
        except aiomqtt.MqttError as error:
            raise Lost(_sentence(error)) from None

    async def unsubscribe(self, topic: str) -> None:
        try:
            await self._client.unsubscribe(topic, timeout=_WAIT)
        except aiomqtt.MqttError as error:
            raise Lost(_sentence(error)) from None

    def demand(self) -> None:
        """Raises Lost if it is gone."""
        gone = self._client._disconnected
        if gone.done():
            error = None if gone.cancelled() else gone.exception()
            raise Lost(_sentence(error) if error else "The connection was closed.")

    def _attach(self) -> None:
        """Take over from aiomqtt what it would answer by itself."""
        paho = self._client._client
        connected: Any = paho.on_connect

        def on_connect(client: Paho, data: Any, flags: Any, code: Any, properties: Any = None) -> None:
            self.resumed = bool(flags.session_present)
            connected(client, data, flags, code, properties)

        paho.manual_ack_set(True)
        paho.on_connect = on_connect
        paho.on_message = self._on_message

    def _watch(self) -> None:
        def gone(future: asyncio.Future[None]) -> None:
            _ = future.cancelled() or future.exception()  # seen: `receive` tells of it
            self._stirred.set()

        self._client._disconnected.add_done_callback(gone)

    def _on_message(self, client: Paho, data: Any, message: Any) -> None:
        if message.qos == 0 and (len(self._waiting) >= self._settings.qos0_waiting or self._bytes >= _MOST_BYTES):
            known = message.topic in self._shed or len(self._shed) < _TOPICS
            self._shed[message.topic if known else ""] += 1
        else:
            packet = _packet(message, self._settings.max_payload)
            self._waiting.append(packet)
            self._bytes += len(packet.payload)
        self._stirred.set()

    def _properties(self, correlation: bytes | None) -> Properties | None:
        if correlation is None or self._settings.version != "5":
            return None
        made = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        made.CorrelationData = correlation
        return made


@contextlib.asynccontextmanager
async def connected(
    settings: Mqtt, identifier: str, password: str | None, will: tuple[str, str]
) -> AsyncIterator[Connection]:
    """A connection with a session that outlives it. `will`: topic and retained payload. Raises Lost.

    Raises ConfigurationError for certificates that cannot be read.
    """
    client = aiomqtt.Client(
        settings.host,
        settings.port,
        username=settings.username or None,
        password=password,
        identifier=identifier,
        will=aiomqtt.Will(will[0], will[1], qos=1, retain=True),
        keepalive=settings.keepalive_seconds,
        tls_context=_tls(settings),
        timeout=_WAIT,
        **_session(settings),
    )
    connection = Connection(client, settings)
    connection._attach()
    try:
        await client.__aenter__()
    except aiomqtt.MqttError as error:
        raise Lost(_refusal(error) or _sentence(error)) from None
    connection._watch()
    try:
        yield connection
    finally:
        with contextlib.suppress(aiomqtt.MqttError):
            await client.__aexit__(None, None, None)


def _session(settings: Mqtt) -> dict[str, Any]:
    """How each version of the protocol says: keep what I have not acknowledged."""
    if settings.version != "5":
        return {"protocol": aiomqtt.ProtocolVersion.V311, "clean_session": False}
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.SessionExpiryInterval = FOREVER
    properties.ReceiveMaximum = settings.window
    return {"protocol": aiomqtt.ProtocolVersion.V5, "clean_start": False, "properties": properties}


def _tls(settings: Mqtt) -> ssl.SSLContext | None:
    if not settings.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
        if settings.cert_file:
            context.load_cert_chain(settings.cert_file, settings.key_file or None)
    except (OSError, ssl.SSLError):
        files = "mqtt.ca_file, mqtt.cert_file and mqtt.key_file"
        raise ConfigurationError(f"A certificate for the broker cannot be read: check {files}.") from None
    return context


def _packet(message: Any, limit: int) -> Packet:
    size = len(message.payload)
    properties = message.properties
    return Packet(
        topic=message.topic,
        payload=message.payload if size <= limit else message.payload[:_REST],
        size=size,
        qos=message.qos,
        retained=bool(message.retain),
        again=bool(message.dup),
        mid=message.mid,
        reply_to=getattr(properties, "ResponseTopic", None),
        correlation=getattr(properties, "CorrelationData", None),
    )


def _refusal(error: aiomqtt.MqttError) -> str | None:
    """What to do about a broker that answers and does not let us in."""
    what = _REFUSED.get(_code(error) or 0)
    return f"The broker refuses us for {what}; check mqtt.username and mqtt.password_file." if what else None


def _sentence(error: BaseException) -> str:
    """What the owner can do with it. Libraries' own words may quote a topic, so they stay out."""
    number = _code(error)
    if number is not None:
        return f"The broker closed the connection (code {number})."
    if "timed out" in str(error):
        return "The broker does not answer."
    return "The broker cannot be reached; check mqtt.host and mqtt.port, and whether it runs."


def _code(error: BaseException) -> int | None:
    code = getattr(error, "rc", None)
    value = getattr(code, "value", code)
    return int(value) if isinstance(value, int) else None


def password(settings: Mqtt, credentials: str | None) -> str | None:
    """From mqtt.password_file, else systemd's credential. Raises ConfigurationError if the file cannot be read."""
    path = Path(settings.password_file) if settings.password_file else None
    if path is None and credentials and (Path(credentials) / "mqtt-password").exists():
        path = Path(credentials) / "mqtt-password"
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(f"The password file {path} cannot be read; check mqtt.password_file.") from None
