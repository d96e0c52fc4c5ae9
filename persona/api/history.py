"""The caller's history: read it in pages, add what was written elsewhere, delete an entry.

An import may be repeated: what is stored already counts as a duplicate. Deleting an entry takes every version that
has absorbed it with it, and ends once it has begun, whether the client waits or not.
"""

import contextlib
from collections.abc import AsyncIterator, Callable

from aiohttp import web

from persona.api import bodies, views
from persona.api.services import Services, caller, services
from persona.domain import EntryId, User
from persona.engine.protocol import ref
from persona.errors import AdapterError, Busy, EngineDown, RequestError
from persona.wire import decode, dumps
from storage import import_lines
from storage.history import ImportItem
from storage.import_lines import WireItem
from storage.imports import Batch
from storage.whole import whole

MAX_PAGE = 1000


async def page(request: web.Request) -> web.Response:
    deps, user = services(request), caller(request).user
    after = bodies.query_int(request, "after", 0, 0, (1 << 63) - 1)
    limit = bodies.query_int(request, "limit", 100, 1, MAX_PAGE)
    found = await deps.history.page(user.id, after=EntryId(after), limit=limit)
    more = found and found[-1].id < await deps.history.last_id(user.id)
    following = found[-1].id if more else None
    answer = {"object": "list", "data": [views.entry(entry) for entry in found], "next": following}
    return web.json_response(answer, dumps=dumps)


async def add(request: web.Request) -> web.Response:
    """A JSON array, or one JSON object a line."""
    deps, user = services(request), caller(request).user
    if not caller(request).learn:
        raise RequestError("This key or user does not record history.", code="learning_disabled")
    stored = duplicates = 0
    async for batch in _batches(_items(request)):
        new, known = await deps.history.import_(user.id, batch, count=_counter(deps), now=deps.clock())
        stored, duplicates = stored + new, duplicates + known
    return web.json_response({"stored": stored, "duplicates": duplicates})


async def delete(request: web.Request) -> web.Response:
    deps, user = services(request), caller(request).user
    gone = await whole(_delete(deps, user, EntryId(bodies.path_int(request, "id"))))
    return web.json_response({"deleted": True, "versions": list(gone)})


async def _delete(deps: Services, user: User, entry_id: EntryId) -> tuple[int, ...]:
    gone = await deps.history.delete(user.id, entry_id)
    stopped = await deps.schedule.cancel_run(user.id)  # it may have read the entry, and could not be kept
    if gone:
        await _serve_again(deps, user)
    if (gone or stopped) and user.learn and not user.paused:  # what was deleted is unlearned by learning the rest anew
        await deps.runs.request(user.id, deps.clock())
        deps.schedule.wake()
    return gone


async def _serve_again(deps: Services, user: User) -> None:
    """The engine forgets what the user had in memory, and gets the version that is active now.

    An engine that is down remembers nothing; one that cannot stage loads the version with the next request.
    """
    with contextlib.suppress(EngineDown):
        await deps.engine.drop(user.id)
    version = await deps.adapters.active(user.id)
    if version is not None and version.base == deps.base():
        with contextlib.suppress(Busy, AdapterError):
            await deps.engine.stage(ref(version))
            await deps.engine.flip(ref(version))


def _counter(deps: Services) -> Callable[[str], int]:
    return lambda text: len(deps.tokenizer.encode(text))


async def _batches(items: AsyncIterator[ImportItem]) -> AsyncIterator[list[ImportItem]]:
    """Each in the order of time; from one to the next history stands in the order in which it comes."""
    batch = Batch()
    async for item in items:
        if batch.take(item):
            yield sorted(batch.items, key=lambda one: one.ts)
            batch = Batch()
    if batch.items:
        yield sorted(batch.items, key=lambda one: one.ts)


async def _items(request: web.Request) -> AsyncIterator[ImportItem]:
    """Each is refused by its line; in an array, by its place there."""
    if request.content_type != "application/json":
        number = 0
        async for line in bodies.lines(request):
            number += 1
            yield _of_line(number, line)
        return
    content = await bodies.read(request)
    if content.lstrip()[:1] == b"[":
        wires = decode(content, list[WireItem])
        items = [import_lines.item(number, wire, place="Item") for number, wire in enumerate(wires, 1)]
        for one in sorted(items, key=lambda item: item.ts):
            yield one
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield _of_line(number, line)


def _of_line(number: int, line: bytes) -> ImportItem:
    return import_lines.item(number, import_lines.parse(number, line))
