"""Commands about what a user owns: history and adapters.

An import travels in batches of whole lines, each well below the service's body limit, the oldest first, as history
stands in the order in which it comes. It may be repeated: what is already stored counts as a duplicate.
"""

import json as jsonlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.progress import Progress

from persona.cli_link import Link, seen
from persona.cli_screen import ForUser, Json, emit, plain, progress, say, settings, table
from persona.errors import PersonaError, RequestError, Unprocessable
from persona.settings import Settings
from storage import import_lines

history = typer.Typer(help="History: what a user said.", no_args_is_help=True)
adapters = typer.Typer(help="Adapters: the versions of a user's weights.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="A PEFT folder.")]
_BATCH_LINES = 500


@history.command("import")
def import_history(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help='JSON lines: {"ts", "text"}, and perhaps "id", "context", "user".')],
    user: ForUser,
    author: Annotated[str | None, typer.Option(help='Take only lines whose "user" is this one.')] = None,
    json: Json = False,
) -> None:
    """Add what a user wrote elsewhere."""
    configuration = settings(context)
    lines = list(_lines(file))
    kept = _in_order(_of_author(lines, author, user, file))
    totals = {"stored": 0, "duplicates": 0, "skipped": len(lines) - len(kept)}
    link = Link(configuration, user)
    with progress(*Progress.get_default_columns()) as bar:
        task = bar.add_task("importing", total=len(kept))
        for batch in _batches(kept, configuration.http.max_body // 2):
            counts = _send(link, batch, file)
            totals["stored"] += counts["stored"]
            totals["duplicates"] += counts["duplicates"]
            bar.advance(task, len(batch))
    if json:
        emit(totals)
    else:
        say("{stored} stored, {duplicates} known already, {skipped} of other authors skipped.".format(**totals))


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the file as it stands, its number from 1, whom it names as its author, and its time if it has one."""

    number: int
    content: bytes
    author: str | None
    ts: datetime | None


def _send(link: Link, batch: list[Line], file: Path) -> dict[str, int]:
    """Import one batch. Raises RequestError that names the line of the file."""
    headers = {"content-type": "application/x-ndjson"}
    try:
        counts: dict[str, int] = link.ask(
            "POST", "/v1/me/history", data=b"".join(line.content for line in batch), headers=headers
        )
    except PersonaError as error:
        if error.code not in (Unprocessable.code, RequestError.code):
            raise
        raise RequestError(f"{file}: {_numbered(error.message, batch)}") from None
    return counts


def _numbered(message: str, batch: list[Line]) -> str:
    """The service counts the lines that it got."""
    return re.sub(r"\bLine (\d+)\b", lambda found: f"Line {batch[int(found[1]) - 1].number}", message, count=1)


def _lines(file: Path) -> Iterator[Line]:
    """Every line of the file that is not blank. Raises RequestError naming the first that is not a JSON object."""
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield Line(number, line.rstrip(b"\r\n") + b"\n", *_about(line, number, file))
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}.") from None


def _about(line: bytes, number: int, file: Path) -> tuple[str | None, datetime | None]:
    """Author and time. What is wrong with a time is the service's business."""
    try:
        told = jsonlib.loads(line)
        author, ts = told.get("user"), told.get("ts")
    except (ValueError, AttributeError, RecursionError):
        raise RequestError(f"Line {number} of {file} is not a JSON object; nothing was imported.") from None
    try:
        when = import_lines.moment(ts) if isinstance(ts, str | int | float) else None
    except Unprocessable:
        when = None
    return None if author is None else str(author), when


def _in_order(lines: list[Line]) -> list[Line]:
    """The oldest first; lines without a time stay behind those before them."""
    latest, keyed = datetime.min.replace(tzinfo=UTC), list[tuple[datetime, Line]]()
    for line in lines:
        latest = line.ts or latest
        keyed.append((latest, line))
    return [line for _, line in sorted(keyed, key=lambda one: one[0])]


def _of_author(lines: list[Line], author: str | None, user: str, file: Path) -> list[Line]:
    """Lines by one author: other people's words must not teach this user's adapter."""
    authors = {line.author for line in lines if line.author is not None}
    wanted = author or (user if len(authors) > 1 else None)
    if wanted is None:
        return lines
    if wanted not in authors:
        hint = "choose one with --author" if author is None else f"none is {author}"
        raise RequestError(f"{file} holds {len(authors)} authors: {hint}. Nothing was imported.")
    return [line for line in lines if line.author == wanted]


def _batches(lines: list[Line], limit: int) -> Iterator[list[Line]]:
    """Runs of lines of at most `limit` bytes together (a longer line stands alone)."""
    batch: list[Line] = []
    size = 0
    for line in lines:
        if batch and (size + len(line.content) > limit or len(batch) == _BATCH_LINES):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line.content)
    if batch:
        yield batch


@history.command("list")
def list_history(
    context: typer.Context,
    user: ForUser,
    after: Annotated[int, typer.Option(help="Start behind this entry.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Entries at most.")] = 100,
    json: Json = False,
) -> None:
    """Show entries, oldest first."""
    link, rows, place = Link(settings(context), user), list[dict[str, Any]](), after
    while place is not None and len(rows) < limit:  # a page ends early where the texts are long
        page = link.ask("GET", "/v1/me/history", params={"after": place, "limit": limit - len(rows)})
        rows, place = rows + page["data"], page["next"]
    if json:
        emit(rows)
    else:
        table(rows, ("id", "ts", "role", "origin", "text"), f"{user} has no history there.")


@history.command("delete")
def delete_entry(
    context: typer.Context,
    entry: Annotated[int, typer.Argument(help="Number of the entry.")],
    user: ForUser,
    json: Json = False,
) -> None:
    """Delete an entry, and every version that learned from it."""
    gone = Link(settings(context), user).ask("DELETE", f"/v1/me/history/{entry}")
    if json:
        emit(gone)
        return
    versions = ", ".join(f"{user}@{number}" for number in gone["versions"])
    say(f"Entry {entry} is deleted" + (f", and with it {versions}, which had learned from it." if versions else "."))


@adapters.command("list")
def list_adapters(context: typer.Context, user: ForUser, json: Json = False) -> None:
    """Show a user's versions."""
    rows = Link(settings(context), user).ask("GET", "/v1/me/versions")["data"]
    if json:
        emit(rows)
    else:
        columns = ("number", "state", "active", "watermark", "parent", "bytes", "created")
        table(rows, columns, f"{user} has no version yet: `persona train --user {user} --wait`.")


@adapters.command("export")
def export_adapter(context: typer.Context, folder: Folder, user: ForUser, json: Json = False) -> None:
    """Write the serving version as an ordinary PEFT folder."""
    _folder(settings(context), user, "export", folder, json)


@adapters.command("import")
def import_adapter(context: typer.Context, folder: Folder, user: ForUser, json: Json = False) -> None:
    """Take a LoRA adapter in PEFT's form as the user's next version."""
    _folder(settings(context), user, "import", folder, json)


def _folder(configuration: Settings, user: str, verb: str, folder: Path, json: bool) -> None:
    path = f"/admin/users/{quote(user, safe='')}/adapters/{verb}"
    body = {"directory": str(folder.absolute()), "seen": seen(folder.absolute().parent)}
    done: dict[str, Any] = Link(configuration).ask("POST", path, json=body)
    if json:
        emit(done)
    elif verb == "export":
        say(f"{user}@{done['version']} lies in {folder} for PEFT.")
    else:
        say(f"{folder} serves as {user}@{done['version']}.")


@adapters.command("rollback")
def rollback(
    context: typer.Context,
    user: ForUser,
    version: Annotated[int | None, typer.Option(min=0, help="Number to go back to; 0 is the bare base.")] = None,
    json: Json = False,
) -> None:
    """Serve an earlier version: the one before, or the one named."""
    body = {} if version is None else {"version": version}
    done = Link(settings(context), user).ask("POST", "/v1/me/rollback", json=body)
    if json:
        emit(done)
    else:
        say(f"{user} is served by {plain(done['version'] or 'the bare base')} now.")
