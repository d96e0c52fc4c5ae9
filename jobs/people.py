"""A file of several people's histories, one JSON object a line, as an experiment reads it.

The same lines that `persona history import` takes, each naming its author in "user".
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from persona.domain import Entry, EntryId, UserId
from persona.errors import RequestError, Unprocessable
from persona.wire import decode
from storage import import_lines
from storage.history import History, ImportItem
from storage.import_lines import WireItem
from storage.users import Users

_PLACE = re.compile(r"^(Item|Line) \d+: ")  # how a refusal of an upload begins


class _Named(WireItem, kw_only=True):
    user: str


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody and what they wrote, in the order of time; what has one time stands as in the file."""

    name: str
    items: tuple[ImportItem, ...]


def read(
    file: Path, *, only: Collection[str] = (), without: Collection[str] = (), limit: int | None = None
) -> list[Person]:
    """The people of `file` in the order in which they first appear; the first `limit` of those that are wanted.

    only: nobody but these, in this order, each once. Raises RequestError naming the line or the name that is wrong.
    """
    found: dict[str, list[ImportItem]] = {}
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    named = _named(file, number, line)
                    found.setdefault(named.user, []).append(_item(file, number, named))
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}.") from None
    for name in (*only, *without):
        if name not in found:
            raise RequestError(f"{file} holds nobody called {name}.")
    names = [name for name in dict.fromkeys(only or found) if name not in without][:limit]
    if not names:
        raise RequestError(f"{file} holds no history.")
    return [Person(name, tuple(sorted(found[name], key=lambda item: item.ts))) for name in names]


async def enrol(
    person: Person, number: int, users: Users, history: History, count: Callable[[str], int]
) -> tuple[UserId, list[Entry]]:
    """The person as a user of an experiment, called by number whatever their name, and their history as stored."""
    user = await users.add(f"p{number}")
    await history.import_(user.id, person.items, count=count, now=datetime.now(UTC))
    return user.id, await history.recent(user.id, EntryId(0), exclude=(), limit=len(person.items))


def _named(file: Path, number: int, line: bytes) -> _Named:
    try:
        named = decode(line, _Named)
    except RequestError as error:
        raise _wrong(file, number, error) from None
    if not named.user.strip():
        raise RequestError(f"Line {number} of {file}: user is empty; give whoever wrote it a name.", param="user")
    return named


def _item(file: Path, number: int, named: _Named) -> ImportItem:
    try:
        return import_lines.item(number, named)
    except Unprocessable as error:
        raise _wrong(file, number, error) from None


def _wrong(file: Path, number: int, error: RequestError) -> RequestError:
    """The refusal of an upload, told of a line of the file."""
    return RequestError(f"Line {number} of {file}: {_PLACE.sub('', error.message)}", param=error.param)
