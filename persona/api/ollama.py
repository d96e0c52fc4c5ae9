"""POST /api/chat and /api/generate: one reply as Ollama gives it, streamed by default.

Until the first piece has come, or the first silence was too long, a failure is still a status code; later it is a line
of its own. However the handler ends, the reply ends with it: a client that leaves frees the engine within a step.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from persona import chat_ollama
from persona.api import bodies, errors, models, views
from persona.api.ndjson import LineStream
from persona.api.services import Services, caller, services
from persona.chat_ollama import Question, Times
from persona.chat_reply import Piece, Reply
from persona.chat_tools import Call
from persona.errors import PersonaError
from persona.wire import dumps


async def chat(request: web.Request) -> web.StreamResponse:
    began, question = asyncio.get_running_loop().time(), await bodies.read_json(request, Question)
    if not question.messages:
        return await _loaded(request, question.model, _as_it_is)
    return await _answered(request, question, began, _as_it_is)


async def generate(request: web.Request) -> web.StreamResponse:
    """One message of a conversation that has no other."""
    began, prompt = asyncio.get_running_loop().time(), await bodies.read_json(request, chat_ollama.Prompt)
    if not prompt.prompt:
        return await _loaded(request, prompt.model, chat_ollama.generated)
    return await _answered(request, prompt.question(), began, chat_ollama.generated)


Write = Callable[[dict[str, Any]], dict[str, Any]]  # a chat's line as the surface has it


def _as_it_is(line: dict[str, Any]) -> dict[str, Any]:
    return line


async def _loaded(request: web.Request, model: str, write: Write) -> web.Response:
    await models.find(request, chat_ollama.plain(model))
    return web.json_response(write(chat_ollama.loaded(model, services(request).clock())))


async def _answered(request: web.Request, question: Question, began: float, write: Write) -> web.StreamResponse:
    deps = services(request)
    ask = chat_ollama.understand(question, deps.chat.limits)
    reply = await deps.chat.reply(caller(request), ask)
    reply.on_end(deps.metrics.reply)
    answer = _Answer(deps, question, reply, began, write)
    try:
        if question.stream is False:
            return await _whole(answer)
        return await _stream(request, answer)
    finally:
        reply.abort()


class _Answer:
    """One reply in Ollama's words. Thoughts go out apart from the answer, or not at all."""

    def __init__(self, deps: Services, question: Question, reply: Reply, began: float, write: Write) -> None:
        self.reply = reply
        self._deps = deps
        self._question = question
        self._began = began
        self._write = write

    def part(self, piece: Piece | None) -> dict[str, Any]:
        """A line for a piece, or for a silence."""
        if piece is None:
            return self._line("", "")
        return self._line(piece.answer, piece.thought, piece.calls)

    def last(self) -> dict[str, Any]:
        return {**self._line("", ""), **self._ending()}

    def whole(self) -> dict[str, Any]:
        """Everything in one object, once the reply is over."""
        line = self._line(self.reply.answer, self.reply.thought, tuple(self.reply.calls))
        return {**line, **self._ending()}

    def _line(self, content: str, thinking: str, calls: tuple[Call, ...] = ()) -> dict[str, Any]:
        shown = "" if self._question.think is False else thinking
        return self._write(chat_ollama.part(self._question.model, self._deps.clock(), content, shown, calls))

    def _ending(self) -> dict[str, Any]:
        return chat_ollama.ending(self.reply, Times(self._began, asyncio.get_running_loop().time()))


async def _whole(answer: _Answer) -> web.Response:
    while True:
        piece = await answer.reply.next()
        if piece is not None and piece.finish is not None:
            break
    return web.json_response(answer.whole(), headers=views.reply_headers(answer.reply), dumps=dumps)


async def _stream(request: web.Request, answer: _Answer) -> web.StreamResponse:
    http = services(request).settings.http
    first = await answer.reply.next(http.ping_seconds)
    lines = LineStream(request, views.reply_headers(answer.reply), http.write_seconds)
    lines.response.headers["x-request-id"] = request[errors.REQUEST_ID]
    await lines.open()
    try:
        await _send(lines, answer, first, http.ping_seconds)
    except PersonaError as error:
        await lines.send(chat_ollama.error_body(error))
    except ConnectionError:
        raise
    except Exception as error:
        await lines.send(chat_ollama.error_body(errors.unexpected(request, error)))
    await lines.close()
    return lines.response


async def _send(lines: LineStream, answer: _Answer, piece: Piece | None, silence: float) -> None:
    while piece is None or piece.finish is None:
        await lines.send(answer.part(piece))
        piece = await answer.reply.next(silence)
    await lines.send(answer.last())
