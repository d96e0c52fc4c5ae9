"""One event: from the bytes of a message to what it says, or the reason why it is refused.

Pure: no user, no database, no broker. Whatever the bytes hold, `read` returns an Event or raises Refused, and no
sentence of a refusal quotes them.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, TypeVar

import msgspec

from persona.domain import Line
from persona.errors import RequestError
from persona.wire import decode

T = TypeVar("T")

MAX_ID = 128  # characters of an id
MAX_KEY = 128  # characters of a fact's or a state's key
MAX_VALUE = 2000  # characters of a fact's or a state's value
MAX_CONTEXT = 50  # lines of others before a message; the newest ones are kept
MAX_SEQ = (1 << 53) - 1  # of sequence numbers, and of ids of ours: what every JSON library can count to

_KIND = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_SOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/-]{0,63}")
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)  # a clock that shows less was never set
_MILLISECONDS = 1e11  # numbers above it count milliseconds: as seconds they lie 3,000 years ahead
_BOM = b"\xef\xbb\xbf"
_COMMON = ("id", "ts", "seq", "source", "user")


class Reason(StrEnum):
    """Why a message became a dead letter."""

    UNKNOWN_USER = "unknown_user"  # the topic names no user
    FORGOTTEN = "forgotten"  # the user was removed; late news of them are counted and not kept
    FORGED_USER = "forged_user"  # the payload names another user than the topic
    BAD_TOPIC = "bad_topic"  # no kind, or one that cannot be
    TOO_LARGE = "too_large"
    BAD_ENCODING = "bad_encoding"  # not UTF-8
    BAD_JSON = "bad_json"
    BAD_PAYLOAD = "bad_payload"  # JSON without what its kind needs
    RETAINED = "retained"  # a stored copy that the broker replays: it was news once
    RATE = "rate"  # more than the user's share of events
    OVERFLOW = "overflow"  # QoS 0, and no room to wait
    NOT_RECORDED = "not_recorded"  # the user does not learn
    UNKNOWN_TURN = "unknown_turn"  # feedback on no reply of theirs
    INTERNAL = "internal"  # our own fault


class Refused(Exception):
    """A message that cannot be an event: why, and in one sentence what to do."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Words:
    """`message`: text that the user wrote elsewhere. It trains and stands in context."""

    text: str
    context: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True)
class Known:
    """`fact` or `state`: the newest value of a key stands in context. None takes it back."""

    key: str
    value: str | None


@dataclass(frozen=True, slots=True)
class Rating:
    """`feedback`: weights one of persona's replies."""

    turn: int
    rating: int | None
    correction: str | None


@dataclass(frozen=True, slots=True)
class Happening:
    """Any other kind: it stands in context and never trains."""

    text: str


Body = Words | Known | Rating | Happening


@dataclass(frozen=True, slots=True)
class Event:
    """What one message says. `name` is equal for two messages that are the same event; None: nothing names it."""

    kind: str
    source: str
    ts: datetime  # told, within reason; else when it was received
    seq: int | None
    name: bytes | None
    body: Body


class _Line(msgspec.Struct):
    author: str
    text: str


class _Message(msgspec.Struct):
    text: str
    context: list[_Line] | None = None


class _Feedback(msgspec.Struct):
    turn: int
    rating: int | None = None
    correction: str | None = None


class _Common(msgspec.Struct):
    """What any event may say of itself."""

    id: str | int | None = None
    ts: str | int | float | None = None
    seq: int | None = None
    source: str | None = None
    user: Any = None


FACTS: Final = ("fact", "state")


def read(user: str, kind: str, payload: bytes, received: datetime, limit: int) -> Event:
    """The event in `payload` of the topic …/u/`user`/events/`kind`. `limit`: bytes. Raises Refused."""
    if not _KIND.fullmatch(kind):
        sentence = "A kind has 1 to 64 of the characters a-z, 0-9, dash, dot and underscore."
        raise Refused(Reason.BAD_TOPIC, sentence)
    if len(payload) > limit:
        raise Refused(Reason.TOO_LARGE, f"The payload has more than {limit} bytes; mqtt.max_payload is the limit.")
    value = _json(payload)
    fields = value if isinstance(value, dict) else {}
    try:
        common = msgspec.convert({name: fields[name] for name in _COMMON if name in fields}, _Common)
        return _event(user, kind, value, common, payload, received)
    except msgspec.ValidationError:
        raise Refused(Reason.BAD_PAYLOAD, _KINDS_OF_FIELDS) from None
    except RequestError as error:
        raise Refused(Reason.BAD_PAYLOAD, error.message) from None


_KINDS_OF_FIELDS = "id is text or a whole number, ts ISO 8601 or seconds since 1970, seq a whole number, source text."


def _json(payload: bytes) -> Any:
    payload = payload.removeprefix(_BOM)
    if not payload.strip():
        raise Refused(Reason.BAD_JSON, "The payload is empty; send JSON.")
    try:
        payload.decode()
    except UnicodeDecodeError:
        raise Refused(Reason.BAD_ENCODING, "The payload is not UTF-8.") from None
    try:
        return decode(payload, Any)
    except RequestError as error:
        raise Refused(Reason.BAD_JSON, error.message) from None


def _event(user: str, kind: str, value: Any, common: _Common, payload: bytes, received: datetime) -> Event:
    if isinstance(common.user, str) and common.user != user:
        raise Refused(Reason.FORGED_USER, "The payload names another user than the topic.")
    source = common.source or ""
    if source and not _SOURCE.fullmatch(source):
        raise RequestError("source has 1 to 64 letters, digits, dots, colons, dashes, slashes or underscores.")
    if common.seq is not None and not 0 <= common.seq <= MAX_SEQ:
        raise RequestError(f"seq lies between 0 and {MAX_SEQ}.")
    return Event(
        kind=kind,
        source=source,
        ts=_time(common.ts, received),
        seq=common.seq,
        name=_name(kind, source, common, payload),
        body=_body(kind, value),
    )


def _name(kind: str, source: str, common: _Common, payload: bytes) -> bytes | None:
    """Under its id; without one, under its time and content."""
    if common.id is not None:
        named = ("id", _bounded("id", str(common.id), MAX_ID, 1))
    elif common.ts is not None:
        named = ("ts", hashlib.sha256(payload).hexdigest())
    else:
        return None
    return "\0".join(("event", kind, source, *named)).encode("utf-8", "surrogatepass")


def _time(told: str | float | None, received: datetime) -> datetime:
    """When it happened: never later than it was received, and not before clocks are set."""
    if told is None:
        return received
    try:
        moment = _parsed(told)
    except (ValueError, OverflowError, OSError):
        raise RequestError("ts is ISO 8601 or seconds since 1970.") from None
    return received if moment < _EPOCH else min(moment, received)


def _parsed(told: str | float) -> datetime:
    if isinstance(told, str):
        moment = datetime.fromisoformat(told)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    if not math.isfinite(told):
        raise ValueError
    return datetime.fromtimestamp(told / 1000 if told > _MILLISECONDS else told, UTC)


def _body(kind: str, value: Any) -> Body:
    if kind == "message":
        return _words({"text": value} if isinstance(value, str) else value)
    if kind == "feedback":
        return _rating(value)
    if kind in FACTS:
        return _known(value)
    return Happening(_told(value))


def _words(value: Any) -> Words:
    wire = _fields(value, _Message)
    if not wire.text.strip():
        raise RequestError("A message needs text.")
    lines = (wire.context or [])[-MAX_CONTEXT:]
    return Words(wire.text, tuple(Line(line.author, line.text) for line in lines))


def _rating(value: Any) -> Rating:
    wire = _fields(value, _Feedback)
    if not 1 <= wire.turn <= MAX_SEQ:
        raise RequestError("turn is the number of a reply.")
    if wire.rating not in (None, -1, 0, 1):
        raise RequestError("rating is -1, 0 or 1.")
    if wire.rating is None and wire.correction is None:
        raise RequestError("Send a rating, a correction or both.")
    return Rating(wire.turn, wire.rating, wire.correction)


def _known(value: Any) -> Known:
    if not isinstance(value, dict) or not isinstance(value.get("key"), str) or "value" not in value:
        raise RequestError('Send an object with a key (text) and a value: {"key": …, "value": …}.')
    key = _bounded("key", value["key"].strip(), MAX_KEY, 1)
    worth = value["value"]
    if worth is None:
        return Known(key, None)
    text = worth.strip() if isinstance(worth, str) else _compact(worth)
    if len(text) > MAX_VALUE:
        raise RequestError(f"A value has at most {MAX_VALUE} characters.")
    return Known(key, text or None)


def _told(value: Any) -> str:
    """An event of any kind as one text: its own, or its JSON without what is said about every event."""
    if isinstance(value, dict):
        value = {name: field for name, field in value.items() if name not in _COMMON}
        if value.keys() == {"text"}:
            value = value["text"]
    return value if isinstance(value, str) and value.strip() else _compact(value)


def _compact(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _fields(value: Any, kind: type[T]) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _misfit(error, kind) from None


def _misfit(error: msgspec.ValidationError, kind: Any) -> RequestError:
    """msgspec names types and fields; both are ours, and no content."""
    return RequestError(f"{str(error).replace('`', '')}; {', '.join(kind.__struct_fields__)} are known here.")


def _bounded(name: str, text: str, most: int, least: int) -> str:
    if not least <= len(text) <= most or not text.isprintable():
        raise RequestError(f"{name} has {least} to {most} printable characters.")
    return text
