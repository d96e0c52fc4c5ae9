"""Request bodies, bounded in bytes, time and depth before anything is made of them.

A body above the limit is refused before it is read if it says its length, and at the first byte too many if not.
What they hold is JSON, decoded by persona.wire.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import TypeVar

from aiohttp import web

from persona.api.services import services
from persona.errors import RequestError, TooLarge, TooSlow
from persona.wire import decode

T = TypeVar("T")


async def read(request: web.Request) -> bytes:
    """The whole body. Raises TooLarge above http.max_body, TooSlow after http.body_seconds."""
    http = services(request).settings.http
    _refuse_encoding(request)
    if (request.content_length or 0) > http.max_body:
        raise TooLarge(_too_large(http.max_body))
    whole = bytearray()
    async for part in _parts(request, http.body_seconds):
        whole += part
        if len(whole) > http.max_body:
            raise TooLarge(_too_large(http.max_body))
    return bytes(whole)


async def read_json(request: web.Request, kind: type[T]) -> T:
    """The body as `kind`. Raises RequestError that names the field, never its content."""
    return decode(await read(request), kind)


async def read_optional(request: web.Request, kind: type[T]) -> T:
    """Like `read_json`, where no body means all defaults."""
    content = await read(request)
    return decode(content if content.strip() else b"{}", kind)


async def lines(request: web.Request) -> AsyncIterator[bytes]:
    """The body line by line: each line may have http.max_body bytes and take http.body_seconds to arrive.

    So a long upload needs no memory. Lines that hold nothing are left out.
    """
    http = services(request).settings.http
    _refuse_encoding(request)
    rest = bytearray()
    async for part in _parts(request, http.body_seconds, renewed=True):
        rest += part
        if b"\n" in part:
            *whole, rest = rest.split(b"\n")
            for line in whole:
                _refuse_long(line, http.max_body)
                if line.strip():
                    yield bytes(line)
        _refuse_long(rest, http.max_body)
    if rest.strip():
        yield bytes(rest)


async def _parts(request: web.Request, seconds: float, *, renewed: bool = False) -> AsyncIterator[bytes]:
    """What arrives, within `seconds` for the whole or, if `renewed`, for each line."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                part = await request.content.readany()
        except TimeoutError:
            raise TooSlow(f"The body did not arrive within {seconds:g} seconds.") from None
        except web.RequestPayloadError:
            raise RequestError("The body broke off or is not encoded as its header says.") from None
        if not part:
            return
        yield part
        if renewed and b"\n" in part:
            deadline = loop.time() + seconds


def _refuse_long(line: bytearray, limit: int) -> None:
    if len(line) > limit:
        raise TooLarge(f"A line is longer than {limit} bytes.")


def _refuse_encoding(request: web.Request) -> None:
    """A packed body could unpack to any size."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise RequestError("Send the body without Content-Encoding.", code="unsupported_value")


def _too_large(limit: int) -> str:
    return f"The body is larger than {limit} bytes."


def query_int(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    """An integer of the query string. Raises RequestError outside `low`…`high`."""
    return int(_query(request, name, default, low, high, int))


def query_float(request: web.Request, name: str, default: float, low: float, high: float) -> float:
    """A number of the query string. Raises RequestError outside `low`…`high`."""
    return _query(request, name, default, low, high, float)


def path_int(request: web.Request, name: str) -> int:
    """An id in the path; what is no id names nothing, and 0 is nobody's."""
    text = request.match_info[name]
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def _query(
    request: web.Request, name: str, default: float, low: float, high: float, kind: type[int] | type[float]
) -> float:
    try:
        value = kind(request.query.get(name, default))
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise RequestError(f"{name} is a number from {low:g} to {high:g}.", code="unsupported_value", param=name)
    return value
