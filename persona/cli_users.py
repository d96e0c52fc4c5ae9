"""Commands about who may ask: users and their keys.

A key is shown once, when it is made; the service keeps only its digest.
"""

from typing import Annotated, Any
from urllib.parse import quote

import typer

from persona.cli_link import Link
from persona.cli_screen import Json, emit, say, settings, table

users = typer.Typer(help="Users: who persona learns from.", no_args_is_help=True)
keys = typer.Typer(help="Keys: what a user's clients present.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="Name of the user.")]
Learn = Annotated[
    bool | None, typer.Option("--learn/--no-learn", help="Whether what is said becomes history.  [default: yes]")
]
Device = Annotated[
    bool, typer.Option("--device", help="Several people speak to it: what is said is no history, unless --learn.")
]


@users.command("add")
def add_user(
    context: typer.Context, name: Name, learn: Learn = None, device: Device = False, json: Json = False
) -> None:
    """Make a user and a first key, which is shown once."""
    body = {"name": name, "learn": learn, "device": device}
    made = Link(settings(context)).ask("POST", "/admin/users", json=body)
    if json:
        emit({"user": made["user"], "key": made["key"]})
    else:
        say(f"{made['user']} may now ask with the key {made['key']} — it is not shown again.{_memory(made)}")


@users.command("list")
def list_users(context: typer.Context, json: Json = False) -> None:
    """Show every user."""
    rows = Link(settings(context)).ask("GET", "/admin/users")["data"]
    if json:
        emit(rows)
    else:
        table(rows, ("name", "learn", "paused", "active", "created"), "There is no user yet: `persona users add NAME`.")


@keys.command("add")
def add_key(
    context: typer.Context,
    name: Name,
    label: Annotated[str, typer.Option(help="A word to know the key by.")] = "",
    learn: Learn = None,
    device: Device = False,
    json: Json = False,
) -> None:
    """Make another key for a user, which is shown once."""
    body = {"label": label, "learn": learn, "device": device}
    made = Link(settings(context)).ask("POST", _keys(name), json=body)
    if json:
        emit(made)
    else:
        say(f"Key {made['id']} of {name}: {made['key']} — it is not shown again.{_memory(made)}")


@keys.command("list")
def list_keys(context: typer.Context, name: Name, json: Json = False) -> None:
    """Show a user's keys, without their secrets."""
    rows = Link(settings(context)).ask("GET", _keys(name))["data"]
    if json:
        emit(rows)
    else:
        table(rows, ("id", "label", "learn", "created", "last_used", "revoked"), f"{name} has no key.")


@keys.command("revoke")
def revoke_key(
    context: typer.Context, name: Name, key: Annotated[int, typer.Argument(help="Number of the key.")]
) -> None:
    """Make a key useless at once."""
    Link(settings(context)).ask("DELETE", f"{_keys(name)}/{key}")
    say(f"Key {key} of {name} is revoked.")


def _memory(made: dict[str, Any]) -> str:
    return "" if made["learn"] else " What is said with it is answered and not recorded."


def _keys(name: str) -> str:
    return f"/admin/users/{quote(name, safe='')}/keys"
