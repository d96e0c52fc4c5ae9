"""What the live check says of every user's versions: for the owner of the machine, on the admin socket alone."""

from typing import Any

from aiohttp import web

from persona.api import views
from persona.api.services import Services, services
from persona.domain import User
from persona.errors import NotFound


async def report(request: web.Request) -> web.Response:
    """One item for each version that was checked; ?user=NAME: of that user."""
    deps = services(request)
    users = await _users(deps, request.query.get("user"))
    data = [item for user in users for item in await _items(deps, user)]
    learning = deps.settings.learning
    enabled = learning.enabled and learning.live_check
    return web.json_response({"object": "list", "enabled": enabled, "data": data})


async def _users(deps: Services, name: str | None) -> list[User]:
    if name is None:
        return await deps.users.all()
    user = await deps.users.get(name)
    if user is None:
        raise NotFound("There is no user of that name.", code="user_not_found")
    return [user]


async def _items(deps: Services, user: User) -> list[dict[str, Any]]:
    found = await deps.live.figures(user.id)
    versions = [version for version in await deps.adapters.list(user.id) if version.number in found]
    return [
        {
            "user": user.name,
            "version": version.number,
            "active": version.number == user.active,
            **views.figures(found[version.number]),
            "rolled_back": version.rolled_back,
        }
        for version in versions
    ]
