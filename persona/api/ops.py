"""For the machine that watches: is the process alive, may it get requests, and what does it count.

/health and /ready answer without a key and name no user. Unready (503) means that chat is impossible. What is merely
degraded (a full disk, an absent broker) is named with 200: who took the service out of its place for that would turn a
part of the trouble into the whole of it.
"""

import shutil

from aiohttp import web

from persona.api.services import Services, services
from persona.errors import PersonaError, StorageFull

ENGINE_SECONDS = 5.0
MIN_FREE = 32 << 20  # bytes of disk below which nothing sensible can be stored
FULL = "The disk is full: replies go unrecorded until there is space."


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    deps = services(request)
    needed = {"engine": await _engine_trouble(deps), "database": await _database_trouble(deps)}
    useful = {"disk": await _disk_trouble(deps), **dict(check() for check in deps.checks)}
    able = not any(needed.values())
    checks = {**needed, **useful}
    answer = {
        "ready": able,
        "degraded": [name for name, trouble in checks.items() if trouble],
        "checks": {name: trouble or "ok" for name, trouble in checks.items()},
    }
    return web.json_response(answer, status=200 if able else 503, headers={} if able else {"Retry-After": "5"})


async def metrics(request: web.Request) -> web.Response:
    deps = services(request)
    page = deps.metrics.page(await deps.pulse.take(ENGINE_SECONDS), len(deps.chat.running))
    return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def _engine_trouble(deps: Services) -> str | None:
    await deps.pulse.take(ENGINE_SECONDS)
    return deps.pulse.trouble()


async def _database_trouble(deps: Services) -> str | None:
    try:
        await deps.runs.next()
    except PersonaError as error:
        return error.message
    return None


async def _disk_trouble(deps: Services) -> str | None:
    """A full disk is forgotten as soon as it has space again, whether or not somebody chats meanwhile."""
    if deps.chat.disk_full:
        try:
            await deps.database.spare()
            deps.chat.disk_full = False
        except PersonaError as error:
            return FULL if isinstance(error, StorageFull) else error.message
    return FULL if shutil.disk_usage(deps.settings.home).free < MIN_FREE else None
