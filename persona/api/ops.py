"""For the machine that watches: is the process alive, may it get requests, and what does it count.

/health and /ready answer without a key and name no user; a full disk makes the service unready, not unhealthy, so that
nobody restarts it for that.
"""

import asyncio
import shutil

from aiohttp import web

from persona.api.services import Services, services
from persona.engine.protocol import Health
from persona.errors import PersonaError

ENGINE_SECONDS = 5.0
MIN_FREE = 32 << 20  # bytes of disk below which nothing sensible can be stored


async def health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    deps = services(request)
    checks = {
        "engine": await _engine_trouble(deps),
        "database": await _database_trouble(deps),
        "disk": _disk_trouble(deps),
    }
    troubles = {name: trouble for name, trouble in checks.items() if trouble}
    answer = {"ready": not troubles, "checks": {name: trouble or "ok" for name, trouble in checks.items()}}
    return web.json_response(answer, status=503 if troubles else 200, headers={"Retry-After": "5"} if troubles else {})


async def metrics(request: web.Request) -> web.Response:
    deps = services(request)
    page = deps.metrics.page(await engine(deps), len(deps.chat.running))
    return web.Response(body=page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def engine(deps: Services) -> Health | None:
    """What the engine says of itself, or None if it does not within ENGINE_SECONDS."""
    try:
        async with asyncio.timeout(ENGINE_SECONDS):
            return await deps.engine.health()
    except (PersonaError, TimeoutError):
        return None


async def _engine_trouble(deps: Services) -> str | None:
    return None if await engine(deps) else "The engine does not answer; it is being started."


async def _database_trouble(deps: Services) -> str | None:
    try:
        await deps.runs.next()
    except PersonaError as error:
        return error.message
    return None


def _disk_trouble(deps: Services) -> str | None:
    if deps.chat.disk_full or shutil.disk_usage(deps.settings.home).free < MIN_FREE:
        return "The disk is full: replies go unrecorded until there is space."
    return None
