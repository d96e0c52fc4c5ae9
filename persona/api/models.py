"""GET /v1/models: the names that a caller may put into `model`.

Nobody learns of a version that is not their own: what is unknown, foreign or no longer served has the same answer.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from aiohttp import web

from persona.api.services import Services, caller, services
from persona.chat import UNKNOWN_MODEL
from persona.domain import Version, VersionState
from persona.errors import NotFound


@dataclass(frozen=True, slots=True)
class Served:
    """A model as the caller may name it. `version` is whose weights answer; None: the bare base."""

    name: str
    created: datetime
    version: Version | None = None


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [_model(one) for one in await served(request)]})


async def model(request: web.Request) -> web.Response:
    return web.json_response(_model(await find(request, request.match_info["model"])))


async def find(request: web.Request, name: str) -> Served:
    """The model of that name. Raises NotFound if the caller has none."""
    for one in await served(request):
        if one.name == name:
            return one
    raise NotFound(UNKNOWN_MODEL, code="model_not_found", param="model")


async def served(request: web.Request) -> list[Served]:
    """Every model that the caller may use."""
    deps, user = services(request), caller(request).user
    numbered = [v for v in await deps.adapters.list(user.id) if _serves(deps, v)]
    active = next((version for version in numbered if version.number == user.active), None)
    named = [Served(name, user.created, None if name == "base" else active) for name in ("persona", "me", "base")]
    return [*named, *(Served(f"persona@{version.number}", version.created, version) for version in numbered)]


def _serves(deps: Services, version: Version) -> bool:
    return version.state is VersionState.PUBLISHED and version.base == deps.base()


def _model(one: Served) -> dict[str, Any]:
    return {"id": one.name, "object": "model", "created": int(one.created.timestamp()), "owned_by": "persona"}
