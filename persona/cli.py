"""The command line: `persona` and its commands.

Commands about users and their data speak to the running service over its admin socket; serve, restore, model and doctor
work alone. Whatever goes wrong ends as one sentence on stderr and exit code 1.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from persona import cli_data, cli_events, cli_serve, cli_users
from persona.cli_backup import backup, restore
from persona.cli_bench import bench
from persona.cli_chat import chat
from persona.cli_doctor import doctor
from persona.cli_eval import evaluate
from persona.cli_link import Link
from persona.cli_prior import prior
from persona.cli_screen import Json, emit, fail, say, settings
from persona.cli_train import train
from persona.errors import PersonaError


class Commands(TyperGroup):
    """The root of all commands, where every failure ends."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (PersonaError, OSError) as error:
            raise fail(error) from None


app = typer.Typer(
    cls=Commands,
    help="A private language model that learns each of its users.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cli_users.users, name="users")
app.add_typer(cli_users.keys, name="keys")
app.add_typer(cli_data.history, name="history")
app.add_typer(cli_data.adapters, name="adapters")
app.add_typer(cli_events.events, name="events")
app.add_typer(cli_serve.model, name="model")
app.add_typer(prior, name="prior")
app.command()(cli_serve.serve)
app.command()(chat)
app.command()(train)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(doctor)
app.command()(backup)
app.command()(restore)


@app.callback()
def root(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings; PERSONA_CONFIG names it too.")] = None,
) -> None:
    """A private language model that learns each of its users."""
    context.obj = config


Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Name = Annotated[str, typer.Argument(help="Name of the user.")]


@cli_users.users.command("forget")
@app.command("forget")
def forget(context: typer.Context, name: Name, yes: Yes = False, json: Json = False) -> None:
    """Remove a user and everything that was learned from them."""
    configuration = settings(context)
    if not yes:
        typer.confirm(f"Remove {name}: history, versions, keys? This cannot be undone.", abort=True, err=True)
    receipt = Link(configuration, name).ask("POST", "/v1/me/forget", json={"confirm": name})
    if json:
        emit(receipt)
        return
    say(f"{name} is forgotten.")
    for kept in receipt["backups"]:
        say(f"The backup {kept['path']} of {kept['created'][:10]} still holds {name}: delete it, or make a new one.")
