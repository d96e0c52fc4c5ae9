"""POST /v1/chat/completions: a reply, or several choices of one, whole or as a stream.

Until the first piece has come, or the first silence was too long, a failure is still a status code. However the
handler ends, the replies end with it: a client that leaves frees the engine within a step.
"""

import secrets
from typing import Any

from aiohttp import web

from persona import chat_openai
from persona.api import bodies, errors, views
from persona.api.services import Services, caller, services
from persona.api.sse import EventStream
from persona.chat_reply import Choices, Piece, Reply, about
from persona.errors import PersonaError
from persona.wire import dumps


async def complete(request: web.Request) -> web.StreamResponse:
    deps = services(request)
    body = await bodies.read_json(request, chat_openai.Completion)
    ask = chat_openai.understand(body, deps.chat.limits)
    choices = await deps.chat.replies(caller(request), ask)
    choices.on_end(deps.metrics.reply)
    try:
        if body.stream:
            return await _stream(request, choices, usage=body.usage_wanted)
        return await _whole(request, choices)
    finally:
        choices.abort()


async def _whole(request: web.Request, choices: Choices) -> web.Response:
    while not choices.ended:
        await choices.next()
    deps = services(request)
    answer = chat_openai.completion(choices.replies, _head(deps, choices.first), deps.chat.spell)
    return web.json_response(answer, headers=views.reply_headers(choices.first), dumps=dumps)


async def _stream(request: web.Request, choices: Choices, *, usage: bool) -> web.StreamResponse:
    deps = services(request)
    http = deps.settings.http
    first = await choices.next(http.ping_seconds)
    events = EventStream(request, views.reply_headers(choices.first), http.write_seconds)
    events.response.headers["x-request-id"] = request[errors.REQUEST_ID]
    await events.open()
    try:
        await _events(events, choices, first, _Chunks(deps, choices, usage), http.ping_seconds)
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
    events: EventStream,
    choices: Choices,
    heard: tuple[Reply, Piece] | None,
    chunks: "_Chunks",
    silence: float,
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
    if chunks.usage:
        await events.send(chunks.last())
    await events.done()


class _Chunks:
    """The chunks of one streamed answer: constant id and time; the version is certain at the first piece."""

    def __init__(self, deps: Services, choices: Choices, usage: bool) -> None:
        self.usage = usage
        self._deps = deps
        self._choices = choices
        self._head: dict[str, Any] = {}

    def begin(self) -> list[dict[str, Any]]:
        self._head = _head(self._deps, self._choices.first)
        start = {"role": "assistant", "content": "", "refusal": None}
        return [self._marked(chat_openai.chunk(self._head, start, index=r.index)) for r in self._choices.replies]

    def of(self, reply: Reply, piece: Piece) -> dict[str, Any]:
        if piece.finish is None:
            told = chat_openai.logprobs(reply, piece.logprobs, self._deps.chat.spell)
            return self._marked(chat_openai.chunk(self._head, {"content": piece.text}, None, reply.index, told))
        finish = chat_openai.finish_reason(reply)
        return {
            **self._marked(chat_openai.chunk(self._head, {}, finish, reply.index)),
            "persona": about(reply),
        }

    def last(self) -> dict[str, Any]:
        usage = chat_openai.usage(self._choices.replies)
        return {**chat_openai.chunk(self._head, {}), "choices": [], "usage": usage}

    def _marked(self, chunk: dict[str, Any]) -> dict[str, Any]:
        return {**chunk, "usage": None} if self.usage else chunk


def _head(deps: Services, reply: Reply) -> dict[str, Any]:
    created = int(deps.clock().timestamp())
    return chat_openai.head(reply, f"chatcmpl-{secrets.token_hex(12)}", created, deps.base())
