"""What the commands put on the screen: one line of JSON for a script, tables and sentences for a person.

Text that people or models wrote loses its control characters first, so that it cannot drive the terminal.
"""

import errno
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn
from rich.table import Table

from persona.errors import PersonaError
from persona.settings import Settings, load

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
ForUser = Annotated[str, typer.Option("--user", help="Whose data is meant.")]
# Columns of times, shown to the minute, in UTC.
_TIMES = ("ts", "created", "last_used", "revoked", "received", "first", "last")


def plain(text: object) -> str:
    """`text` without control characters; line breaks and tabs stay."""
    return "".join(c for c in str(text) if c in "\n\t" or c.isprintable())


def emit(value: Any) -> None:
    """One line of JSON on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def say(sentence: str) -> None:
    typer.echo(plain(sentence))


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> None:
    """`rows` as a table of the named fields; the sentence `empty` when there are none."""
    if not rows:
        say(empty)
        return
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column.replace("_", " "), overflow="fold", no_wrap=column in _TIMES)
    for row in rows:
        grid.add_row(*(escape(_cell(column, row.get(column))) for column in columns))
    Console().print(grid)


def progress(*columns: ProgressColumn) -> Progress:
    """A bar on stderr that leaves no trace; without a terminal, nothing."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column in _TIMES:
        return plain(value)[:16].replace("T", " ")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(f"{value:.3f}" if isinstance(value, float) else value)


def sentence(error: BaseException) -> str:
    """What to tell the person at the keyboard about `error`."""
    if isinstance(error, PersonaError):
        return error.message
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full: free some space and try again."
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "The address is taken by another program: stop it, or choose another port with PERSONA_HTTP__PORT."
    return f"{type(error).__name__}: {error}"


def fail(error: BaseException) -> typer.Exit:
    """Put the sentence on stderr; the caller raises what this returns."""
    sys.stdout.flush()
    typer.echo(plain(sentence(error)), err=True)
    return typer.Exit(1)


def settings(context: typer.Context) -> Settings:
    """The settings under the --config of the root command. Raises ConfigurationError."""
    return load(context.find_root().obj)
