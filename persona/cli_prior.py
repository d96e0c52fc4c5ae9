"""`persona prior train`: an adapter of several people's words, from which users start."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from jobs import people
from jobs import prior as priors
from persona.app_private import Private, private
from persona.cli_screen import Json, emit, progress, say, settings
from persona.cli_serve import fetched
from persona.cli_trial import names
from persona.domain import Entry, EntryId
from persona.engine import adapter_file
from persona.errors import RequestError
from persona.settings import Settings
from storage.history import History
from storage.users import Users

prior = typer.Typer(help="The prior: what users start from.", no_args_is_help=True)


@prior.command("train")
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="Folder to write the adapter into; learning.prior names it then.")],
    data: Annotated[Path, typer.Option(help='JSON lines: {"user", "ts", "text"}, and perhaps "context".')],
    users: Annotated[int | None, typer.Option(min=1, help="So many people of the file.")] = None,
    only: Annotated[str, typer.Option(help="These people, separated by commas.")] = "",
    without: Annotated[str, typer.Option(help="Nobody of these.")] = "",
    tokens: Annotated[
        int, typer.Option(min=1000, help="Tokens to train on, context included, shared by all.")
    ] = 100_000,
    json: Json = False,
) -> None:
    """Train an adapter on people who agreed to it, or on public text, with an engine of its own."""
    configuration = settings(context)
    if out.exists() and any(out.iterdir()):
        raise RequestError(f"{out} is not empty: name a new folder.")
    some = people.read(data, only=names(only), without=names(without), limit=users)
    told = asyncio.run(_train(configuration, some, tokens, out))
    if json:
        emit(told)
    else:
        say(f"Learned from {told['people']} people, {told['examples']} examples: {told['bytes']} bytes in {out}.")
        say(f'Put prior = "{out.absolute()}" under [learning], and users who have no version yet start from it.')


async def _train(
    configuration: Settings, some: list[people.Person], tokens: int, out: Path
) -> dict[str, str | int | float]:
    prepared = await asyncio.to_thread(fetched, configuration)
    async with private(configuration, prepared) as parts:
        histories = [await _history(parts, number, person) for number, person in enumerate(some)]
        examples = priors.examples(histories, tokenizer=parts.tokenizer, settings=parts.settings, tokens=tokens)
        out.mkdir(parents=True, exist_ok=True)
        seconds = 0.0
        with progress(*Progress.get_default_columns()) as bar:
            task = bar.add_task("training")
            async for step in priors.train(parts.engine, examples, parts.settings, out):
                bar.update(task, completed=step.step, total=step.steps)
                seconds = step.seconds
        size = (out / adapter_file.FILE).stat().st_size
        about = {"people": len(some), "examples": len(examples), "seconds": seconds, "bytes": size}
        return {**about, "folder": str(out), "base": parts.base}


async def _history(parts: Private, number: int, person: people.Person) -> list[Entry]:
    """The person's entries, as the service would store them."""
    history = History(parts.database)
    user = await Users(parts.database).add(f"p{number}")

    def count(text: str) -> int:
        return len(parts.tokenizer.encode(text))

    await history.import_(user.id, person.items, count=count, now=datetime.now(UTC))
    return await history.recent(user.id, EntryId(0), exclude=(), limit=len(person.items))
