"""What Ollama's clients ask about models: which there are, which are in memory, what one can do, the version.

They are the models of /v1/models under Ollama's names. Nothing is ever pulled: the one base was fetched before the
service started.
"""

from datetime import UTC, datetime
from typing import Any

import msgspec
from aiohttp import web

from persona import __version__, chat_ollama
from persona.api import bodies, ops, views
from persona.api.models import Served, find, served
from persona.api.services import Services, services
from persona.engine.protocol import Health
from persona.errors import RequestError

_CAPABILITIES = ("completion", "tools")
_NEVER = datetime(9999, 12, 31, tzinfo=UTC)  # when the base leaves memory
_NO_PULL = "Nothing is pulled here: choose one of the models that GET /api/tags lists, such as persona:latest."


class Which(msgspec.Struct):
    model: str = ""
    name: str = ""  # what older clients say


async def greet(request: web.Request) -> web.Response:
    """What Ollama's own program asks before anything else."""
    return web.Response(text="persona is running, and answers as Ollama does")


async def version(request: web.Request) -> web.Response:
    return web.json_response({"version": __version__})


async def tags(request: web.Request) -> web.Response:
    deps = services(request)
    return web.json_response({"models": [_tagged(deps, one) for one in await served(request)]})


async def running(request: web.Request) -> web.Response:
    """One entry: whatever name is asked for, one copy of the base answers."""
    deps = services(request)
    health = await deps.pulse.take(ops.ENGINE_SECONDS)
    loaded = [_loaded(deps, one, health) for one in await served(request) if one.name == "persona" and health]
    return web.json_response({"models": loaded})


async def show(request: web.Request) -> web.Response:
    wire = await bodies.read_json(request, Which)
    deps = services(request)
    one = await find(request, chat_ollama.plain(wire.model or wire.name))
    about = {
        "general.architecture": "persona",
        "general.basename": deps.settings.model.name,
        "persona.context_length": deps.settings.engine.context,
    }
    return web.json_response(
        {
            "modified_at": views.time(one.created),
            "details": _details(deps),
            "model_info": about,
            "capabilities": _CAPABILITIES,
        }
    )


async def pull(request: web.Request) -> web.Response:
    raise RequestError(_NO_PULL, code="unsupported_value", param="model")


def _tagged(deps: Services, one: Served) -> dict[str, Any]:
    return {
        **_named(deps, one),
        "modified_at": views.time(one.created),
        "size": _base_bytes(deps) + (one.version.bytes if one.version else 0),
    }


def _loaded(deps: Services, one: Served, health: Health) -> dict[str, Any]:
    return {
        **_named(deps, one),
        "size": health.base_bytes,
        "size_vram": 0 if health.device == "cpu" else health.base_bytes,
        "expires_at": views.time(_NEVER),
        "context_length": health.context,
    }


def _named(deps: Services, one: Served) -> dict[str, Any]:
    name = one.name + chat_ollama.TAG
    digest = one.version.sha256 if one.version else deps.base()
    return {"name": name, "model": name, "digest": digest, "details": _details(deps)}


def _details(deps: Services) -> dict[str, Any]:
    weights = deps.prepared.weights if deps.prepared else ""
    return {
        "parent_model": deps.settings.model.name,
        "format": "safetensors",
        "family": "",
        "families": [],
        "parameter_size": "",
        "quantization_level": weights,
    }


def _base_bytes(deps: Services) -> int:
    """On disk; 0 where the engine keeps its base to itself, or the folder was deleted under it."""
    try:
        return (deps.prepared.folder / "weights.safetensors").stat().st_size if deps.prepared else 0
    except OSError:
        return 0
