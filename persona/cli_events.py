"""Commands about events: what arrived, what is known by it, and what was refused and why."""

from collections import Counter
from typing import Annotated, Any

import typer

from persona.cli_link import Link
from persona.cli_screen import ForUser, Json, emit, say, settings, table
from persona.errors import RequestError

events = typer.Typer(help="Events: what devices and programs told persona.", no_args_is_help=True)

OfUser = Annotated[str | None, typer.Option("--user", help="Only this user's; without it everybody's and nobody's.")]
Letters = Annotated[list[int] | None, typer.Argument(help="Numbers of dead letters.")]
All = Annotated[bool, typer.Option("--all", help="All of them.")]
_FEW = 500  # in one request


@events.command("list")
def list_events(
    context: typer.Context,
    user: ForUser,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Events at most.")] = 100,
    json: Json = False,
) -> None:
    """Show what arrived, newest first, and what is missing from each source."""
    answer = Link(settings(context), user).ask("GET", "/v1/me/events", params={"limit": limit})
    if json:
        emit(answer)
        return
    columns = ("id", "kind", "source", "seq", "ts", "received", "entry")
    table(answer["data"], columns, f"No event of {user} has arrived.")
    if answer["sources"]:
        say("")
        table(answer["sources"], ("source", "events", "duplicates", "missing", "last_seq", "last"), "")


@events.command("send")
def send(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="message, fact, state, feedback or any other word.")],
    payload: Annotated[str, typer.Argument(help="JSON, as over MQTT.")],
    user: ForUser,
    json: Json = False,
) -> None:
    """Tell persona one event, as a device would."""
    done = Link(settings(context), user).ask("POST", f"/v1/me/events/{_segment(kind)}", data=payload.encode())
    if json:
        emit(done)
    else:
        say(f"The event is {'stored' if done['outcome'] == 'stored' else 'known already'}.")


@events.command("facts")
def facts(context: typer.Context, user: ForUser, json: Json = False) -> None:
    """Show facts and states, newest first."""
    rows = Link(settings(context), user).ask("GET", "/v1/me/facts")["data"]
    if json:
        emit(rows)
    else:
        table(rows, ("kind", "key", "value", "ts"), f"Nothing is known of {user} by events.")


@events.command("dead")
def dead(context: typer.Context, user: OfUser = None, json: Json = False) -> None:
    """Show refused messages, oldest first, with reason and count; --json shows their payloads too."""
    rows = _all(Link(settings(context), user), user)
    if json:
        emit(rows)
    else:
        table(rows, ("id", "user", "kind", "reason", "count", "last", "detail"), "No message was refused.")


@events.command("replay")
def replay(
    context: typer.Context, letters: Letters = None, every: All = False, user: OfUser = None, json: Json = False
) -> None:
    """Try dead letters again, once their cause is mended."""
    link = Link(settings(context), user)
    chosen = _chosen(link, user, letters, every)
    results: Counter[str] = Counter()
    for start in range(0, len(chosen), _FEW):
        results += Counter(link.ask("POST", f"{_place(user)}/replay", json={"ids": chosen[start : start + _FEW]}))
    if json:
        emit(results)
        return
    counts = {name: results.get(name, 0) for name in ("stored", "duplicate", "dead", "without_payload")}
    sentence = "{stored} stored, {duplicate} known already, {dead} refused again, {without_payload} kept no payload."
    say(sentence.format(**counts))


@events.command("drop")
def drop(context: typer.Context, letters: Letters = None, every: All = False, user: OfUser = None) -> None:
    """Throw dead letters away."""
    link = Link(settings(context), user)
    chosen = _chosen(link, user, letters, every)
    for letter in chosen:
        link.ask("DELETE", f"{_place(user)}/{letter}")
    say(f"{len(chosen)} dead letters are gone.")


def _place(user: str | None) -> str:
    return "/v1/me/events/dead" if user else "/admin/events/dead"


def _all(link: Link, user: str | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    after: int | None = 0
    while after is not None:
        page = link.ask("GET", _place(user), params={"limit": _FEW, "after": after})
        rows, after = rows + page["data"], page["next"]
    return rows


def _chosen(link: Link, user: str | None, letters: list[int] | None, every: bool) -> list[int]:
    if bool(letters) == every:
        raise RequestError("Name dead letters by their numbers (`persona events dead` shows them), or say --all.")
    return letters or [row["id"] for row in _all(link, user)]


def _segment(kind: str) -> str:
    if "/" in kind or not kind.isascii() or not kind.isprintable():
        raise RequestError("A kind has 1 to 64 of the characters a-z, 0-9, dash, dot and underscore.")
    return kind
