"""What arrived for the caller as events: receipts, facts, what is missing, and what was refused and why.

The same events that come over MQTT may be posted here. A dead letter can be looked at, tried again once its cause is
mended, or thrown away; the owner of the machine sees those of everybody, and those that name nobody.
"""

import msgspec
from aiohttp import web

from persona.api import bodies, views
from persona.api.services import Services, caller, services
from persona.domain import UserId
from persona.errors import NotFound, TooLarge
from persona.wire import dumps
from storage.events import Letter, Outcome

MAX_PAGE = 1000
_LAST = (1 << 63) - 1
_UNKNOWN = "There is no such dead letter among yours."


class Replay(msgspec.Struct):
    """Which dead letters to try again: those of the ids, or the oldest ones."""

    ids: list[int] | None = None


async def page(request: web.Request) -> web.Response:
    deps, user = services(request), caller(request).user
    before = bodies.query_int(request, "before", _LAST, 0, _LAST)
    limit = bodies.query_int(request, "limit", 100, 1, MAX_PAGE)
    found = await deps.events.newest(user.id, before=before, limit=limit)
    answer = {
        "object": "list",
        "data": [views.event(one) for one in found],
        "next": found[-1].id if len(found) == limit else None,
        "sources": [views.source(one) for one in await deps.events.sources(user.id)],
    }
    return web.json_response(answer, dumps=dumps)


async def send(request: web.Request) -> web.Response:
    """One event of the kind in the path; its body is what an MQTT payload would be."""
    deps, user = services(request), caller(request).user
    limit = deps.settings.mqtt.max_payload
    content = await bodies.read(request)
    if len(content) > limit:
        raise TooLarge(f"An event has at most {limit} bytes.")
    outcome = await deps.intake.send(user, request.match_info["kind"], content, learn=caller(request).learn)
    return web.json_response({"outcome": outcome}, status=201 if outcome is Outcome.STORED else 200)


async def facts(request: web.Request) -> web.Response:
    found = await services(request).events.facts(caller(request).user.id, limit=MAX_PAGE)
    return web.json_response({"object": "list", "data": [views.fact(one) for one in found]}, dumps=dumps)


async def drop_fact(request: web.Request) -> web.Response:
    kind, key = request.match_info["kind"], request.match_info["key"]
    if not await services(request).events.drop_fact(caller(request).user.id, kind, key):
        raise NotFound("There is no such fact or state.")
    return web.json_response({"deleted": True})


async def dead(request: web.Request) -> web.Response:
    return await _letters(request, caller(request).user.id)


async def replay(request: web.Request) -> web.Response:
    return await _replay(request, caller(request).user.id)


async def drop(request: web.Request) -> web.Response:
    return await _drop(request, caller(request).user.id)


async def all_dead(request: web.Request) -> web.Response:
    """For the owner of the machine: of everybody."""
    return await _letters(request, None)


async def replay_any(request: web.Request) -> web.Response:
    return await _replay(request, None)


async def drop_any(request: web.Request) -> web.Response:
    return await _drop(request, None)


async def _letters(request: web.Request, user_id: UserId | None) -> web.Response:
    after = bodies.query_int(request, "after", 0, 0, _LAST)
    limit = bodies.query_int(request, "limit", 100, 1, MAX_PAGE)
    found = await services(request).events.letters(user_id, after=after, limit=limit)
    following = found[-1].id if len(found) == limit else None
    answer = {"object": "list", "data": [views.letter(one) for one in found], "next": following}
    return web.json_response(answer, dumps=dumps)


async def _replay(request: web.Request, user_id: UserId | None) -> web.Response:
    wire = await bodies.read_optional(request, Replay)
    deps = services(request)
    if wire.ids is None:
        letters = await deps.events.letters(user_id, limit=MAX_PAGE)
    else:
        if len(wire.ids) > MAX_PAGE:
            raise TooLarge(f"At most {MAX_PAGE} dead letters are replayed at once.", param="ids")
        letters = [await _letter(deps, letter_id, user_id) for letter_id in wire.ids]
    return web.json_response(dict(await deps.intake.replay(letters)))


async def _drop(request: web.Request, user_id: UserId | None) -> web.Response:
    deps = services(request)
    letter = await _letter(deps, bodies.path_int(request, "id"), user_id)
    await deps.events.drop_letters([letter.id])
    return web.json_response({"deleted": True})


async def _letter(deps: Services, letter_id: int, user_id: UserId | None) -> Letter:
    found = await deps.events.letter(letter_id, user_id) if 0 < letter_id <= _LAST else None
    if found is None:
        raise NotFound(_UNKNOWN)
    return found
