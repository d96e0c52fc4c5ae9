"""`persona prior train`: an adapter of several people's words, from which users start."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from persona.cli_screen import Json, emit, say, settings
from persona.errors import RequestError

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
    from jobs import people  # half a second that no other command needs
    from persona import cli_prior_run
    from persona.cli_trial import names

    some = people.read(data, only=names(only), without=names(without), limit=users)
    told = asyncio.run(cli_prior_run.train(configuration, some, tokens, out))
    if json:
        emit(told)
    else:
        say(f"Learned from {told['people']} people, {told['examples']} examples: {told['bytes']} bytes in {out}.")
        drift, forgetting, objection = told["drift"], told["forgetting"], told["objection"]
        say(f"It costs the assistant {drift:.2%} on the reference set and {forgetting:.3f} nats per token.")
        if objection:
            say(f"A service would refuse such a version: {objection} Raise learning.rehearsal and train again.")
        say(f'Put prior = "{out.absolute()}" under [learning], and users who have no version yet start from it.')
