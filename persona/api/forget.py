"""POST /v1/me/forget: the caller and everything learned from them is gone; the answer is the receipt.

Replies under way end first, so that nothing can write after the rows are removed; the engine drops the weights before
and after, because a request that came in between may have brought them back. What has begun ends, whether the client
waits for it or not: afterwards there is no key to ask again with.
"""

import contextlib
from typing import Any

import msgspec
from aiohttp import web

from persona.api import bodies
from persona.api.services import Services, caller, services
from persona.domain import User
from persona.errors import EngineDown, RequestError
from storage.whole import whole


class Forget(msgspec.Struct):
    confirm: str


async def forget(request: web.Request) -> web.Response:
    wire = await bodies.read_json(request, Forget)
    deps, user = services(request), caller(request).user
    if wire.confirm != user.name:
        raise RequestError("Confirm with the user's name; this cannot be undone.", param="confirm")
    return web.json_response(await whole(_gone(deps, user)))


async def _gone(deps: Services, user: User) -> dict[str, Any]:
    await _still(deps, user)
    receipt = await deps.users.forget(user.id)
    await deps.adapters.remove_user(user.id)
    await _still(deps, user)
    return receipt


async def _still(deps: Services, user: User) -> None:
    await deps.schedule.cancel(user.id)
    await deps.chat.silence(user)
    with contextlib.suppress(EngineDown):  # an engine that is gone remembers nobody
        await deps.engine.drop(user.id)
