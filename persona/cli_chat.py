"""`persona chat`: a conversation in the terminal, streamed, as the named user.

The client keeps the conversation, as every client of the API does: each request carries all of it.
"""

import asyncio
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from persona.cli_link import Link, events
from persona.cli_screen import plain, settings
from persona.errors import Busy, RequestError
from persona.settings import Settings

Messages = list[dict[str, str]]


def chat(
    context: typer.Context,
    text: Annotated[str | None, typer.Argument(help="One message; without it a conversation begins.")] = None,
    user: Annotated[str | None, typer.Option(help="Who speaks; may be left out when there is one user.")] = None,
    model: Annotated[str, typer.Option(help="persona, persona@N, me or base.")] = "persona",
    store: Annotated[bool, typer.Option("--store/--no-store", help="Whether this becomes history.")] = True,
) -> None:
    """Talk to persona."""
    configuration = settings(context)
    link = Link(configuration, user or _only_user(configuration))
    messages: Messages = []
    for said in [text] if text is not None else _spoken():
        asked = [*messages, {"role": "user", "content": said}]
        try:
            reply = asyncio.run(_reply(link, {"model": model, "messages": asked, "stream": True, "store": store}))
        except Busy as error:
            if text is not None:
                raise
            typer.echo(error.message, err=True)  # the conversation goes on: the person may say it again
            continue
        messages = [*asked, {"role": "assistant", "content": reply}]


def _only_user(configuration: Settings) -> str:
    rows = Link(configuration).ask("GET", "/admin/users")["data"]
    if len(rows) != 1:
        raise RequestError(f"There are {len(rows)} users: name one with --user.")
    return str(rows[0]["name"])


def _spoken() -> Iterator[str]:
    """What the person types, message by message, until end of file or Ctrl-C."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            said = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if said:
            yield said


async def _reply(link: Link, body: dict[str, Any]) -> str:
    """Stream one reply to the screen and return it."""
    pieces: list[str] = []
    async with link.open("POST", "/v1/chat/completions", json=body) as answer:
        async for event in events(answer):
            for choice in event.get("choices", ()):
                pieces.append(choice["delta"].get("content") or "")
                typer.echo(plain(pieces[-1]), nl=False)
    typer.echo()
    return "".join(pieces)
