"""POST /v1/chat/completions: a reply, or several choices of one, whole or as a stream.

However the handler ends, the replies end with it: a client that leaves frees the engine within a step.
"""

import asyncio
import secrets
from typing import Any

from aiohttp import web

from persona import chat_openai
from persona.api import bodies, streaming, views
from persona.api.services import Services, caller, services
from persona.chat_reply import Choices, Piece, Reply, about
from persona.wire import dumps


async def complete(request: web.Request) -> web.StreamResponse:
    deps = services(request)
    body = await bodies.read_json(request, chat_openai.Completion)
    ask = chat_openai.understand(body, deps.chat.limits)
    choices = await deps.chat.replies(caller(request), ask)
    choices.on_end(deps.metrics.reply)
    try:
        if body.stream:
            return await streaming.stream(request, choices, _Chunks(deps, choices, body.usage_wanted))
        return await _whole(request, choices)
    finally:
        choices.abort()


async def _whole(request: web.Request, choices: Choices) -> web.Response:
    while not choices.ended:
        await choices.next()
    deps = services(request)
    head, headers = _head(deps, choices.first), views.reply_headers(choices.first)

    def written() -> str:
        return dumps(chat_openai.completion(choices.replies, head, deps.chat.spell))

    return web.json_response(text=await asyncio.to_thread(written), headers=headers)


class _Chunks:
    """The chunks of one streamed answer: implements streaming.Chunks.

    Id and time are constant; the version is certain at the first piece.
    """

    def __init__(self, deps: Services, choices: Choices, usage: bool) -> None:
        self._usage = usage
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
            return self._marked(chat_openai.chunk(self._head, chat_openai.delta(piece), None, reply.index, told))
        finish = chat_openai.finish_reason(reply)
        return {
            **self._marked(chat_openai.chunk(self._head, {}, finish, reply.index)),
            "persona": about(reply),
        }

    def last(self) -> dict[str, Any] | None:
        if not self._usage:
            return None
        usage = chat_openai.usage(self._choices.replies)
        return {**chat_openai.chunk(self._head, {}), "choices": [], "usage": usage}

    def _marked(self, chunk: dict[str, Any]) -> dict[str, Any]:
        return {**chunk, "usage": None} if self._usage else chunk


def _head(deps: Services, reply: Reply) -> dict[str, Any]:
    created = int(deps.clock().timestamp())
    return chat_openai.head(reply, f"chatcmpl-{secrets.token_hex(12)}", created, deps.base())
