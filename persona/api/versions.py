"""A user's versions: list them, go back to one, take an adapter in from a PEFT folder or write one out.

The order is the same everywhere: the engine stages (loads and verifies), the pointer is committed, the engine flips.
A failure before the commit leaves the old version serving.
"""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from jobs import evaluate, rollback
from persona.api import bodies, views
from persona.api.places import Seen, demand_shared
from persona.api.services import Services, caller, services
from persona.domain import EntryId, User, Version
from persona.engine import peft_folder
from persona.engine.prepare import Prepared
from persona.engine.protocol import ref
from persona.errors import AdapterError, NotFound, RequestError

_UNKNOWN = "There is no such version among those that can serve."


class Rollback(msgspec.Struct):
    version: int | None = None


class Folder(msgspec.Struct):
    directory: str
    seen: Seen = None  # of the parent folder
    version: int | None = None


async def versions(request: web.Request) -> web.Response:
    deps, user = services(request), caller(request).user
    active = await deps.adapters.active(user.id)
    number = active.number if active else None
    live = await deps.live.figures(user.id)
    found = [views.version(one, number, live.get(one.number)) for one in await deps.adapters.list(user.id)]
    return web.json_response({"object": "list", "data": found})


async def roll_back(request: web.Request) -> web.Response:
    """Serve an earlier version: the one before, or the one named; 0 is the bare base."""
    wire = await bodies.read_optional(request, Rollback)
    deps, user = services(request), caller(request).user
    number = await _one_back(deps, user) if wire.version is None else wire.version
    target = await _served(deps, user, number) if number else None
    await rollback.go_back(deps.engine, deps.adapters, user.id, target)
    return web.json_response({"version": target.number if target else None})


async def export_peft(deps: Services, user: User, wire: Folder) -> dict[str, Any]:
    """Write a version (default: the active one) as an ordinary PEFT folder."""
    version = await exportable(deps, user, wire.version)
    if version is None:
        raise NotFound("This user has no version yet.")
    out = _place(wire)
    try:
        await write_peft(deps, version, out)
    except OSError as error:
        raise RequestError(f"The directory cannot be written: {error.strerror}.", param="directory") from None
    return {"version": version.number, "directory": str(out)}


async def import_peft(deps: Services, user: User, wire: Folder) -> dict[str, Any]:
    """Take a PEFT folder as the user's next version; checks of shape, size and drift stand in for the gate."""
    source = _place(wire)
    version = await _published(deps, user, source)
    try:
        await rollback.stage(deps.engine, deps.adapters, version)
        await _check_drift(deps, version)
    except BaseException:
        with contextlib.suppress(NotFound):  # quarantined already
            await deps.adapters.reject(user.id, version.number)
        raise
    await deps.adapters.point(user.id, version.number)
    await rollback.flip(deps.engine, version)
    return {"version": version.number}


async def write_peft(deps: Services, version: Version, out: Path) -> None:
    await asyncio.to_thread(peft_folder.write, Path(version.path), out, _prepared(deps))


async def exportable(deps: Services, user: User, number: int | None) -> Version | None:
    """The named version, or the active one, with its file verified."""
    version = await (deps.adapters.active(user.id) if number is None else _served(deps, user, number))
    if version is not None and version.base != deps.base():
        raise AdapterError("The version was trained on another base than the one that serves; train again first.")
    if version is not None:
        await deps.adapters.verify(version)
    return version


async def _published(deps: Services, user: User, source: Path) -> Version:
    prepared = _prepared(deps)
    folder = await deps.adapters.workspace(user.id)
    try:
        await asyncio.to_thread(peft_folder.read, source, folder, prepared)
        return await deps.adapters.publish(
            user.id,
            folder,
            watermark=EntryId(0),  # it has absorbed nothing of this history
            parent=None,
            base=deps.base(),
            run_id=None,
            metrics={"imported": True},
            plan={},
        )
    except BaseException:
        await deps.adapters.discard(folder)
        raise


async def _check_drift(deps: Services, version: Version) -> None:
    """Raises AdapterError if the adapter unlearns what an assistant says."""
    cost = await evaluate.cost(deps.engine, deps.tokenizer, ref(version), deps.finetune.rehearsal, deps.settings)
    if objection := cost.objection(deps.settings):
        raise AdapterError(objection)


async def _served(deps: Services, user: User, number: int) -> Version:
    version = await deps.adapters.get(user.id, number) if 0 < number < 1 << 31 else None
    if version is None or not rollback.can_serve(version, deps.base()):
        raise NotFound(_UNKNOWN, code="version_not_found", param="version")
    return version


async def _one_back(deps: Services, user: User) -> int:
    """The newest version before the active one that can serve; 0 if there is none."""
    active = await deps.adapters.active(user.id)
    if active is None:
        raise NotFound("There is nothing to go back to: the bare base serves.", code="version_not_found")
    earlier = [
        version.number
        for version in await deps.adapters.list(user.id)
        if version.number < active.number and rollback.can_serve(version, deps.base()) and not version.rolled_back
    ]
    return max(earlier, default=0)


def _prepared(deps: Services) -> Prepared:
    if deps.prepared is None:
        raise AdapterError("This engine does not show its base, so no adapter can be written for it or checked.")
    return deps.prepared


def _place(wire: Folder) -> Path:
    path = Path(wire.directory)
    if not path.is_absolute() or "\0" in wire.directory:
        raise RequestError("directory is an absolute path.", param="directory")
    demand_shared(path.parent, wire.seen, "directory")
    return path
