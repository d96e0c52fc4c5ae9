"""One answer of several choices, as server-sent events.

Until the first piece has come, or the first silence was too long, a failure is still a status code; after that it is
an event.
"""

from typing import Any, Protocol

from aiohttp import web

from persona import chat_openai
from persona.api import errors, views
from persona.api.services import services
from persona.api.sse import EventStream
from persona.chat_reply import Choices, Piece, Reply
from persona.errors import PersonaError


class Chunks(Protocol):
    """What one surface makes of pieces."""

    def begin(self) -> list[dict[str, Any]]:
        """What stands before the first piece, which has come."""
        ...

    def of(self, reply: Reply, piece: Piece) -> dict[str, Any]: ...

    def last(self) -> dict[str, Any] | None:
        """What stands behind the last piece, say the usage."""
        ...


async def stream(request: web.Request, choices: Choices, chunks: Chunks) -> web.StreamResponse:
    http = services(request).settings.http
    first = await choices.next(http.ping_seconds)
    events = EventStream(request, views.reply_headers(choices.first), http.write_seconds)
    events.response.headers["x-request-id"] = request[errors.REQUEST_ID]
    await events.open()
    try:
        await _events(events, choices, first, chunks, http.ping_seconds)
    except PersonaError as error:
        await events.send(chat_openai.error_body(error))
        await events.close()
    except ConnectionError:
        raise
    except Exception as error:
        await events.send(chat_openai.error_body(errors.unexpected(request, error)))
        await events.close()
    return events.response


async def _events(
    events: EventStream, choices: Choices, heard: tuple[Reply, Piece] | None, chunks: Chunks, silence: float
) -> None:
    while heard is None:
        await events.ping()
        heard = await choices.next(silence)
    for chunk in chunks.begin():
        await events.send(chunk)
    while not choices.ended:
        await (events.ping() if heard is None else events.send(chunks.of(*heard)))
        heard = await choices.next(silence)
    assert heard is not None
    await events.send(chunks.of(*heard))
    if last := chunks.last():
        await events.send(last)
    await events.done()
