"""The caller's own account: its state, feedback, runs, and the dry run that says what a reply is made of."""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from persona import chat_openai
from persona.api import bodies, views
from persona.api.services import Services, caller, services
from persona.domain import EntryId, Run, User, Version
from persona.errors import NotFound, RequestError
from persona.wire import dumps

RATINGS = (-1, 0, 1)
MAX_WAIT = 600.0
MAX_RUNS = 200
_UNKNOWN_RUN = "There is no such run among yours."


class Feedback(msgspec.Struct):
    turn: int
    rating: int | None = None
    correction: str | None = None


class Question(msgspec.Struct):
    """Why would you answer this so (messages), or what did that run learn from (run)?"""

    messages: list[chat_openai.WireMessage] | None = None
    model: str = "persona"
    max_tokens: int | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    run: int | None = None


async def show(request: web.Request) -> web.Response:
    deps, who = services(request), caller(request)
    version = await deps.adapters.active(who.user.id)
    watermark = version.watermark if version else EntryId(0)
    last = await deps.runs.last(who.user.id)
    answer = {
        **views.user(who.user),
        "records": who.learn,
        "version": version.number if version else None,
        "asleep": _asleep(deps, version),
        "watermark": watermark,
        "last_entry": await deps.history.last_id(who.user.id),
        "new_tokens": await deps.history.own_tokens(who.user.id, watermark),
        "last_run": views.run(last, deps.finetune.progress.get(who.user.id)) if last else None,
        "keys": [views.key(key) for key in await deps.users.keys(who.user.id)],
    }
    return web.json_response(answer)


async def feedback(request: web.Request) -> web.Response:
    wire = await bodies.read_json(request, Feedback)
    if wire.rating is not None and wire.rating not in RATINGS:
        raise RequestError("rating is -1, 0 or 1.", code="unsupported_value", param="rating")
    if wire.rating is None and wire.correction is None:
        raise RequestError("Send a rating, a correction or both.", param="rating")
    if not caller(request).learn:
        raise RequestError("This key or user records nothing, ratings included.", code="learning_disabled")
    turn = EntryId(_identity(wire.turn))
    entry = await services(request).history.feedback(caller(request).user.id, turn, wire.rating, wire.correction)
    return web.json_response(views.entry(entry), dumps=dumps)


async def why(request: web.Request) -> web.Response:
    wire = await bodies.read_json(request, Question)
    deps, who = services(request), caller(request)
    if wire.run is not None:
        run = await _run(deps, who.user, wire.run)
        examples = [views.example(row) for row in await deps.runs.examples(run.id)]
        return web.json_response({"run": views.run(run), "examples": examples})
    if wire.messages is None:
        raise RequestError("Send the messages of a chat, or the id of a run.", param="messages")
    completion = chat_openai.Completion(
        wire.model, wire.messages, max_tokens=wire.max_tokens, store=wire.store, metadata=wire.metadata
    )
    sheet = await deps.chat.why(who, chat_openai.understand(completion, deps.chat.limits))
    return web.json_response(views.sheet(sheet), dumps=dumps)


async def runs(request: web.Request) -> web.Response:
    deps, user = services(request), caller(request).user
    limit = bodies.query_int(request, "limit", 50, 1, MAX_RUNS)
    progress = deps.finetune.progress.get(user.id)
    found = await deps.runs.list(user.id, limit=limit)
    return web.json_response({"object": "list", "data": [views.run(run, progress) for run in found]})


async def run(request: web.Request) -> web.Response:
    deps, user = services(request), caller(request).user
    found = await _run(deps, user, _path_identity(request))
    return web.json_response(views.run(found, deps.finetune.progress.get(user.id)))


async def train(request: web.Request) -> web.Response:
    """Ask for a run; with ?wait=SECONDS the answer is held back until it has ended, or so long."""
    deps, user = services(request), caller(request).user
    wait = bodies.query_float(request, "wait", 0.0, 0.0, MAX_WAIT)
    _refuse_training(deps, user)
    asked = await deps.runs.request(user.id, deps.clock())
    deps.schedule.wake()
    ended = await _within(deps, user, asked, wait)
    progress = deps.finetune.progress.get(user.id)
    return web.json_response(views.run(ended, progress), status=200 if ended.state.ended else 202)


async def pause(request: web.Request) -> web.Response:
    """Stop learning, a run under way included. What is said goes on to be history."""
    answer = await _set_paused(request, True)
    await services(request).schedule.cancel(caller(request).user.id)
    return answer


async def resume(request: web.Request) -> web.Response:
    answer = await _set_paused(request, False)
    services(request).schedule.wake()
    return answer


async def _set_paused(request: web.Request, paused: bool) -> web.Response:
    await services(request).users.set_paused(caller(request).user.id, paused)
    return web.json_response({"paused": paused})


async def _within(deps: Services, user: User, run: Run, seconds: float) -> Run:
    try:
        async with asyncio.timeout(seconds):
            return await deps.schedule.wait(user.id, run.id)
    except TimeoutError:
        return await deps.runs.get(user.id, run.id) or run


async def _run(deps: Services, user: User, run_id: int) -> Run:
    found = await deps.runs.get(user.id, _identity(run_id))
    if found is None:
        raise NotFound(_UNKNOWN_RUN)
    return found


def _refuse_training(deps: Services, user: User) -> None:
    if not deps.settings.learning.enabled:
        raise RequestError("Learning is switched off here (learning.enabled).", code="learning_disabled")
    if not user.learn:
        raise RequestError("This user does not learn.", code="learning_disabled")
    if user.paused:
        raise RequestError("Learning is paused; resume it first.", code="learning_paused")


def _asleep(deps: Services, version: Version | None) -> bool:
    return version is not None and version.base != deps.base()


def _path_identity(request: web.Request) -> int:
    return bodies.path_int(request, "id")


def _identity(value: int) -> int:
    """Ids are SQLite integers; anything else names nothing."""
    return value if 0 <= value < 1 << 63 else 0
