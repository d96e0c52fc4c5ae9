"""`persona train`: ask for a training run and, with --wait, follow it to its end.

The exit code is 0 when the run reached a verdict (kept, rejected or deferred) and 1 when it failed or was interrupted.
"""

import time
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from persona.cli_link import Link
from persona.cli_screen import ForUser, Json, emit, progress, say, settings
from persona.domain import RunState
from persona.errors import TrainingFailed

_POLL_SECONDS = 2.0


def train(
    context: typer.Context,
    user: ForUser,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the run has ended.")] = False,
    json: Json = False,
) -> None:
    """Train a user's adapter on the new history now."""
    link = Link(settings(context), user)
    run = link.ask("POST", "/v1/me/train")
    if wait:
        run = _ended(link, run)
    if json:
        emit(run)
    else:
        say(_told(run, user))
    if run["state"] in (RunState.FAILED, RunState.INTERRUPTED):
        raise TrainingFailed(f"Run {run['id']} ended without a version.")


def _ended(link: Link, run: dict[str, Any]) -> dict[str, Any]:
    with progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as bar:
        task = bar.add_task(run["state"], total=None)
        while not RunState(run["state"]).ended:
            time.sleep(_POLL_SECONDS)
            run = link.ask("GET", f"/v1/me/runs/{run['id']}")
            now = run.get("progress") or {}
            bar.update(task, description=_doing(run, now), total=now.get("steps"), completed=now.get("step", 0))
    return run


def _doing(run: dict[str, Any], now: dict[str, Any]) -> str:
    return f"{run['state']}, loss {now['loss']:.2f}" if now else str(run["state"])


def _told(run: dict[str, Any], user: str) -> str:
    state = RunState(run["state"])
    if not state.ended:
        return f"Run {run['id']} is {state}; follow it with `persona train --user {user} --wait`."
    version = f" as {user}@{run['version']}" if state is RunState.KEPT else ""
    return f"Run {run['id']} was {state}{version}: {run['reason']}"
