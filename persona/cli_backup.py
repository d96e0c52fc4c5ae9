"""Commands that keep everything: `persona backup` asks the running service, `persona restore` wants it stopped."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from persona.app_home import alone
from persona.cli_link import Link, seen
from persona.cli_screen import Json, emit, say, settings
from persona.errors import ConfigurationError
from persona.settings import Settings
from storage import restore as restoring


def backup(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The new folder that the backup becomes.")],
    json: Json = False,
) -> None:
    """Copy database and adapters while the service runs."""
    body = {"folder": str(folder.absolute()), "seen": seen(folder.absolute().parent)}
    done = Link(settings(context)).ask("POST", "/admin/backup", json=body)
    if json:
        emit(done)
        return
    say(f"{folder} holds the database and all versions ({done['versions']}), {done['bytes'] / 2**20:.1f} MiB.")
    if done["left_out"]:
        say(f"Left out, because their own files are damaged: {', '.join(done['left_out'])}.")


def restore(
    context: typer.Context,
    backup: Annotated[Path, typer.Argument(help="The folder that `persona backup` made.")],
    replace: Annotated[bool, typer.Option("--replace", help="Move aside what is there now.")] = False,
    json: Json = False,
) -> None:
    """Put a backup in place while the service is stopped."""
    configuration = settings(context)
    _own(configuration)
    with alone(configuration):
        done = restoring.restore(backup, configuration.home, replace=replace, now=datetime.now(UTC))
    aside = str(done.aside) if done.aside else None
    if json:
        emit(
            {
                "home": str(configuration.home),
                "aside": aside,
                "forgotten_before": list(done.again),
                "deleted_before": done.deleted,
            }
        )
        return
    say(f"{backup} is restored into {configuration.home}; start persona.")
    if aside:
        say(f"What was there lies in {aside}: delete it when you no longer need it.")
    for name in done.again:
        say(f"{name} was forgotten since that backup was made, and is back: `persona forget {name}` once persona runs.")
    if done.deleted:
        say(f"{done.deleted} entries were deleted since that backup was made, and are back: tell their users.")


def _own(configuration: Settings) -> None:
    """Files that root restores could not be opened by the service's account."""
    home = configuration.home
    if home.exists() and (owner := home.stat().st_uid) != os.geteuid():
        raise ConfigurationError(f"{home} belongs to account {owner}: restore as that account, say with runuser.")
