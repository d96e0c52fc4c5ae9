"""What only the owner of the machine may do: users, keys, adapters from folders, status, backup.

These routes exist on the admin socket alone; on TCP their paths are as unknown as any other.
"""

import contextlib
from pathlib import Path

import msgspec
from aiohttp import web

from persona.api import bodies, versions, views
from persona.api.places import Seen, demand_shared
from persona.api.services import services
from persona.domain import User
from persona.errors import NotFound, PersonaError, RequestError

MAX_LABEL = 100


class Learning(msgspec.Struct, kw_only=True):
    """What several people speak to (`device`) learns only if that is said."""

    learn: bool | None = None
    device: bool = False

    @property
    def learns(self) -> bool:
        return not self.device if self.learn is None else self.learn


class NewUser(Learning):
    name: str


class NewKey(Learning):
    label: str = ""


class Backup(msgspec.Struct):
    folder: str
    seen: Seen = None  # of the parent folder


async def add_user(request: web.Request) -> web.Response:
    wire = await bodies.read_json(request, NewUser)
    users = services(request).users
    user = await users.add(wire.name, learn=wire.learns)
    key_id, secret = await users.add_key(user.id, label="first")
    return web.json_response({"user": user.name, "key": secret, "id": key_id, "learn": user.learn}, status=201)


async def list_users(request: web.Request) -> web.Response:
    found = await services(request).users.all()
    return web.json_response({"object": "list", "data": [views.user(user) for user in found]})


async def add_key(request: web.Request) -> web.Response:
    wire = await bodies.read_optional(request, NewKey)
    if len(wire.label) > MAX_LABEL:
        raise RequestError(f"A label has at most {MAX_LABEL} characters.", param="label")
    user = await _user(request)
    key_id, secret = await services(request).users.add_key(user.id, learn=wire.learns, label=wire.label)
    learns = user.learn and wire.learns
    return web.json_response({"user": user.name, "id": key_id, "key": secret, "learn": learns}, status=201)


async def list_keys(request: web.Request) -> web.Response:
    found = await services(request).users.keys((await _user(request)).id)
    return web.json_response({"object": "list", "data": [views.key(key) for key in found]})


async def revoke_key(request: web.Request) -> web.Response:
    key_id = bodies.path_int(request, "id")
    if not await services(request).users.revoke((await _user(request)).id, key_id):
        raise NotFound("This user has no such key.", code="key_not_found")
    return web.json_response({"id": key_id, "revoked": True})


async def export_adapter(request: web.Request) -> web.Response:
    wire = await bodies.read_json(request, versions.Folder)
    return web.json_response(await versions.export_peft(services(request), await _user(request), wire))


async def import_adapter(request: web.Request) -> web.Response:
    wire = await bodies.read_json(request, versions.Folder)
    return web.json_response(await versions.import_peft(services(request), await _user(request), wire), status=201)


async def status(request: web.Request) -> web.Response:
    deps = services(request)
    health = None
    with contextlib.suppress(PersonaError):
        health = msgspec.to_builtins(await deps.engine.health())
    answer = {
        "home": str(deps.settings.home),
        "model": deps.settings.model.name,
        "base": deps.base(),
        "users": len(await deps.users.all()),
        "replies_running": len(deps.chat.running),
        "training": len(deps.finetune.progress),
        "disk_full": deps.chat.disk_full,
        "engine": health,
    }
    return web.json_response(answer)


async def backup(request: web.Request) -> web.Response:
    deps, wire = services(request), await bodies.read_json(request, Backup)
    made = await deps.backups.make(_place(wire, deps.settings.home))
    left_out = [
        f"{user.name}@{gone.number}" for gone in made.left_out if (user := await deps.users.by_id(gone.user_id))
    ]
    answer = {"folder": str(made.folder), "bytes": made.bytes, "versions": made.versions, "left_out": left_out}
    return web.json_response(answer, status=201)


def _place(wire: Backup, home: Path) -> Path:
    """Where the backup goes."""
    target = Path(wire.folder)
    if not target.is_absolute() or "\0" in wire.folder or not target.parent.is_dir():
        raise RequestError("folder is an absolute path in a folder that exists.", param="folder")
    if target.resolve().is_relative_to(home.resolve()):
        raise RequestError("A backup lies outside the state folder; name another place.", param="folder")
    demand_shared(target.parent, wire.seen, "folder")
    return target


async def _user(request: web.Request) -> User:
    user = await services(request).users.get(request.match_info["name"])
    if user is None:
        raise NotFound("There is no user of that name.", code="user_not_found")
    return user
