"""GET /v1/me/export: everything that is the caller's in one zip file.

history.jsonl can be imported again, events.jsonl and facts.jsonl hold what devices told, adapter/ is an ordinary PEFT
folder, manifest.json says what is what. The file is put together in a folder of its own that is gone before the first
byte is sent: a download may take hours, and who is forgotten meanwhile is in no folder.
"""

import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from aiohttp import web

from persona.api import views
from persona.api.sending import Outlet
from persona.api.services import Services, caller, services
from persona.api.versions import exportable, write_peft
from persona.domain import Entry, EntryId, Role, User, Version
from persona.errors import AdapterError
from storage.files import full_disk, reserve
from storage.whole import in_thread, whole

PREFIX = "export-"
_PAGE = 500
_MOST_FACTS = 100_000
_PIECE = 1 << 18
_WIDER = 8  # bytes of PEFT for one of ours, at most: 32 bits in place of 8, and no factor is shared


async def export(request: web.Request) -> web.StreamResponse:
    deps, user = services(request), caller(request).user
    with await _assembled(deps, user) as stream:
        return await _send(request, stream, f"persona-{user.name}.zip")


async def _assembled(deps: Services, user: User) -> BinaryIO:
    """The archive, open and without a name any more. Raises StorageFull."""
    with full_disk():
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=deps.settings.run_dir))
        try:
            return (await _assemble(deps, user, folder)).open("rb")
        finally:
            await in_thread(shutil.rmtree, folder, ignore_errors=True)


async def _assemble(deps: Services, user: User, folder: Path) -> Path:
    content = folder / "content"
    content.mkdir()
    entries = await _write_history(deps, user, content)
    facts = [views.fact(one) for one in await deps.events.facts(user.id, limit=_MOST_FACTS)]
    (content / "facts.jsonl").write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in facts))
    version = None
    with contextlib.suppress(AdapterError):  # damaged, or of another base: the history goes out without it
        version = await exportable(deps, user, None)
    if version is not None:
        await in_thread(reserve, content, _WIDER * version.bytes)  # who writes it knows no full disk by number
        await whole(write_peft(deps, version, content / "adapter"))
    manifest = _manifest(deps, user, version, entries)
    (content / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return await in_thread(_zip, content, folder / "export.zip")


async def _write_history(deps: Services, user: User, content: Path) -> int:
    """Words, which an import takes again, and apart from them what merely happened."""
    after, count = EntryId(0), 0
    for name in ("history.jsonl", "events.jsonl"):
        (content / name).touch()
    while page := await deps.history.page(user.id, after=after, limit=_PAGE):
        happened = [entry for entry in page if entry.role is Role.TOOL]
        said = [entry for entry in page if entry.role is not Role.TOOL]
        await in_thread(_append, content / "history.jsonl", said)
        await in_thread(_append, content / "events.jsonl", happened)
        after, count = page[-1].id, count + len(page)
    return count


def _append(file: Path, page: Sequence[Entry]) -> None:
    with file.open("ab") as stream:
        for entry in page:
            view = views.entry(entry)
            # Not "id": an import would take it for the id that a source gave, and find no duplicate here.
            view["entry"] = view.pop("id")
            stream.write(msgspec.json.encode(view) + b"\n")


def _manifest(deps: Services, user: User, version: Version | None, entries: int) -> dict[str, Any]:
    return {
        "format": 1,
        "user": user.name,
        "created": views.time(deps.clock()),
        "base": {"name": deps.settings.model.name, "hash": deps.base()},
        "entries": entries,
        "version": views.version(version, version.number) if version else None,
    }


def _zip(content: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=3) as archive:
        for file in sorted(content.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(content).as_posix())
    return target


async def _send(request: web.Request, stream: BinaryIO, name: str) -> web.StreamResponse:
    response = web.StreamResponse()
    response.content_type = "application/zip"
    response.content_length = os.fstat(stream.fileno()).st_size
    response.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    response.headers["cache-control"] = "no-store"
    outlet = Outlet(request, response, services(request).settings.http.write_seconds)
    await outlet.open()
    while piece := await in_thread(stream.read, _PIECE):  # to its end, before the file is closed
        await outlet.write(piece)
    await outlet.close()
    return response
