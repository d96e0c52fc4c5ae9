"""One item of uploaded history as it is written in JSON, and what it becomes: on the API and in files alike."""

import math
from datetime import UTC, datetime

import msgspec

from persona.domain import EntryId, Line, Role
from persona.errors import RequestError, Unprocessable
from persona.wire import decode
from storage.imports import ImportItem

MAX_CONTEXT = 50
_ROLES = {"user": Role.USER, "assistant": Role.ASSISTANT}


class WireLine(msgspec.Struct):
    author: str
    text: str


class WireItem(msgspec.Struct):
    """One message of an import. `ts`: ISO 8601 (UTC if it names no zone) or seconds since 1970 · `entry`: what an
    export calls it; anything else there is somebody else's, and ignored."""

    ts: str | float
    text: str
    id: str | int | None = None
    context: list[WireLine] | None = None
    role: str = "user"
    entry: object = None


def parse(number: int, line: bytes) -> WireItem:
    """A line of JSON. Raises Unprocessable that names it by its `number` and never quotes it."""
    try:
        return decode(line, WireItem)
    except RequestError as error:
        raise Unprocessable(f"Line {number}: {error.message}", param=error.param) from None


def item(number: int, wire: WireItem, *, place: str = "Line") -> ImportItem:
    """Raises Unprocessable for a role, time, text or context that cannot be; it names the line, or other place."""
    try:
        return _item(wire)
    except Unprocessable as error:
        raise Unprocessable(f"{place} {number}: {error.message}", param=error.param) from None


def _item(wire: WireItem) -> ImportItem:
    role = _ROLES.get(wire.role)
    if role is None:
        raise Unprocessable("role is user or assistant.", param="role")
    lines = (wire.context or [])[-MAX_CONTEXT:]
    context = tuple(Line(line.author, line.text) for line in lines)
    identity = None if wire.id is None else str(wire.id)
    known = wire.entry if type(wire.entry) is int and 0 < wire.entry < 1 << 63 else None
    return ImportItem(wire.text, moment(wire.ts), identity, context, role, None if known is None else EntryId(known))


def moment(value: str | float) -> datetime:
    try:
        if isinstance(value, str):
            parsed = datetime.fromisoformat(value)
        elif math.isfinite(value):
            parsed = datetime.fromtimestamp(value, UTC)
        else:
            raise ValueError
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise Unprocessable("ts is ISO 8601 or seconds since 1970.", param="ts") from None
