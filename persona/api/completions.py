"""POST /v1/chat/completions: one reply, whole or as a stream.

Until the first piece has come, or the first silence was too long, a failure is still a status code. However the
handler ends, the reply ends with it: a client that leaves frees the engine within a step.
"""

import secrets
from typing import Any

from aiohttp import web

from persona import chat_openai
from persona.api import bodies, errors, views
from persona.api.services import Services, caller, services
from persona.api.sse import EventStream
from persona.chat_reply import Piece, Reply, about
from persona.errors import PersonaError
from persona.wire import dumps


async def complete(request: web.Request) -> web.StreamResponse:
    deps = services(request)
    body = await bodies.read_json(request, chat_openai.Completion)
    ask = chat_openai.understand(body, deps.settings.prompt.max_reply_tokens)
    reply = await deps.chat.reply(caller(request), ask)
    reply.on_end(deps.metrics.reply)
    try:
        if body.stream:
            return await _stream(request, reply, usage=body.usage_wanted)
        return await _whole(request, reply)
    finally:
        reply.abort()


async def _whole(request: web.Request, reply: Reply) -> web.Response:
    while True:
        piece = await reply.next()
        if piece is not None and piece.finish is not None:
            break
    answer = chat_openai.completion(reply, _head(services(request), reply))
    return web.json_response(answer, headers=views.reply_headers(reply), dumps=dumps)


async def _stream(request: web.Request, reply: Reply, *, usage: bool) -> web.StreamResponse:
    deps = services(request)
    http = deps.settings.http
    first = await reply.next(http.ping_seconds)
    events = EventStream(request, views.reply_headers(reply), http.write_seconds)
    events.response.headers["x-request-id"] = request[errors.REQUEST_ID]
    await events.open()
    try:
        await _events(events, reply, first, _Chunks(deps, reply, usage), http.ping_seconds)
    except PersonaError as error:
        await events.send(chat_openai.error_body(error))
        await events.close()
    except ConnectionError:
        raise
    except Exception as error:
        await events.send(chat_openai.error_body(errors.unexpected(request, error)))
        await events.close()
    return events.response


async def _events(events: EventStream, reply: Reply, piece: Piece | None, chunks: "_Chunks", silence: float) -> None:
    while piece is None:
        await events.ping()
        piece = await reply.next(silence)
    chunks.begin()
    await events.send(chunks.of({"role": "assistant", "content": "", "refusal": None}))
    while piece is None or piece.finish is None:
        await (events.ping() if piece is None else events.send(chunks.of({"content": piece.text})))
        piece = await reply.next(silence)
    for last in chunks.last():
        await events.send(last)
    await events.done()


class _Chunks:
    """The chunks of one streamed reply: constant id and time; the version is certain at the first piece."""

    def __init__(self, deps: Services, reply: Reply, usage: bool) -> None:
        self._deps = deps
        self._reply = reply
        self._usage = usage
        self._head: dict[str, Any] = {}

    def begin(self) -> None:
        self._head = _head(self._deps, self._reply)

    def of(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        chunk = chat_openai.chunk(self._head, delta, finish)
        return {**chunk, "usage": None} if self._usage else chunk

    def last(self) -> list[dict[str, Any]]:
        end = {**self.of({}, chat_openai.finish_reason(self._reply)), "persona": about(self._reply)}
        if not self._usage:
            return [end]
        return [end, {**chat_openai.chunk(self._head, {}), "choices": [], "usage": chat_openai.usage(self._reply)}]


def _head(deps: Services, reply: Reply) -> dict[str, Any]:
    created = int(deps.clock().timestamp())
    return chat_openai.head(reply, f"chatcmpl-{secrets.token_hex(12)}", created, deps.base())
