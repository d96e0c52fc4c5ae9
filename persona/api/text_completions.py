"""POST /v1/completions: raw text that goes on, whole or as a stream. Nothing of it is recorded."""

import asyncio
import secrets
from typing import Any

from aiohttp import web

from persona import chat_openai, chat_openai_text
from persona.api import bodies, streaming, views
from persona.api.services import Services, caller, services
from persona.chat_openai_text import RawPrompt, Teller
from persona.chat_reply import Choices, Piece, Reply, about
from persona.wire import dumps


async def complete(request: web.Request) -> web.StreamResponse:
    deps = services(request)
    body = await bodies.read_json(request, chat_openai_text.TextCompletion)
    ask, tokenizer = chat_openai_text.understand(body, deps.chat.limits), deps.tokenizer
    reading = (tokenizer.raw, tokenizer.piece, tokenizer.vocab)
    prompts = await asyncio.to_thread(chat_openai_text.prompts, body, *reading)
    choices = await deps.chat.continuations(caller(request), ask, [prompt.tokens for prompt in prompts])
    choices.on_end(deps.metrics.reply)
    try:
        if body.stream:
            return await streaming.stream(request, choices, _Chunks(deps, choices, prompts, usage=body.usage_wanted))
        return await _whole(request, choices, prompts)
    finally:
        choices.abort()


async def _whole(request: web.Request, choices: Choices, prompts: list[RawPrompt]) -> web.Response:
    deps = services(request)
    while not choices.ended:
        await choices.next()
    head, headers = _head(deps, choices.first), views.reply_headers(choices.first)

    def written() -> str:
        return dumps(chat_openai_text.completion(choices.replies, prompts, head, deps.chat.spell))

    return web.json_response(text=await asyncio.to_thread(written), headers=headers)


class _Chunks:
    """The chunks of one streamed answer: implements streaming.Chunks."""

    def __init__(self, deps: Services, choices: Choices, prompts: list[RawPrompt], *, usage: bool) -> None:
        self._deps = deps
        self._choices = choices
        self._prompts = prompts
        self._usage = usage
        self._head: dict[str, Any] = {}
        self._tellers = [
            Teller(reply, chat_openai_text.prompt_of(reply, prompts), deps.chat.spell) for reply in choices.replies
        ]

    def begin(self) -> list[dict[str, Any]]:
        self._head = _head(self._deps, self._choices.first)
        return []

    def of(self, reply: Reply, piece: Piece) -> dict[str, Any]:
        chunk = chat_openai_text.chunk(self._head, [self._tellers[reply.index].choice(piece)])
        if self._usage:
            chunk["usage"] = None
        return chunk if piece.finish is None else {**chunk, "persona": about(reply)}

    def last(self) -> dict[str, Any] | None:
        if not self._usage:
            return None
        usage = chat_openai_text.usage(self._choices.replies, self._prompts)
        return {**chat_openai_text.chunk(self._head, []), "usage": usage}


def _head(deps: Services, reply: Reply) -> dict[str, Any]:
    return chat_openai.head(reply, f"cmpl-{secrets.token_hex(12)}", int(deps.clock().timestamp()), deps.base())
