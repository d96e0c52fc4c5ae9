"""GET /v1/models: the names that a caller may put into `model`.

Nobody learns of a version that is not their own: what is unknown, foreign or no longer served has the same answer.
"""

from datetime import datetime
from typing import Any

from aiohttp import web

from persona.api.services import caller, services
from persona.chat import UNKNOWN_MODEL
from persona.domain import VersionState
from persona.errors import NotFound


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": await _all(request)})


async def model(request: web.Request) -> web.Response:
    name = request.match_info["model"]
    for one in await _all(request):
        if one["id"] == name:
            return web.json_response(one)
    raise NotFound(UNKNOWN_MODEL, code="model_not_found", param="model")


async def _all(request: web.Request) -> list[dict[str, Any]]:
    deps, user = services(request), caller(request).user
    versions = await deps.adapters.list(user.id)
    served = [v for v in versions if v.state is VersionState.PUBLISHED and v.base == deps.base()]
    numbered = [_model(f"persona@{version.number}", version.created) for version in served]
    return [*(_model(name, user.created) for name in ("persona", "me", "base")), *numbered]


def _model(name: str, created: datetime) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created.timestamp()), "owned_by": "persona"}
