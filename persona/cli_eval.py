"""`persona eval`: how well adapters predict their users, by an experiment on histories or by what was written lately.

With --live the running service is asked, which keeps these figures (jobs/live.py); with --data an engine of its own
trains and measures (persona/cli_trial.py).
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from persona.cli_link import Link
from persona.cli_screen import Json, emit, say, settings, table
from persona.errors import RequestError

_COLUMNS = ("user", "version", "against", "messages", "gain", "interval", "verdict")
_ROLLED_BACK = "worse: rolled back"
_WORDS = {"better": "better", "undecided": "not decided yet", "worse": "worse"}
_NONE = (
    "No message has judged a version yet: what a user writes does, once a training run has put a version into service."
)
_OFF = "The live check is switched off; the settings are learning.enabled and learning.live_check."


def evaluate(
    context: typer.Context,
    live: Annotated[bool, typer.Option("--live", help="By the live checks of the running service.")] = False,
    user: Annotated[str | None, typer.Option("--user", help="With --live: only this user.")] = None,
    data: Annotated[
        Path | None, typer.Option(help='JSON lines: {"user", "ts", "text"}, and perhaps "context".')
    ] = None,
    users: Annotated[int | None, typer.Option(min=1, help="So many people of the file.")] = None,
    only: Annotated[str, typer.Option(help="These people, separated by commas.")] = "",
    without: Annotated[str, typer.Option(help="Nobody of these.")] = "",
    tokens: Annotated[int | None, typer.Option(min=100, help="Own tokens of each history, the newest.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=20, help="Times that each person learns, on ever more.")] = 2,
    contexts: Annotated[
        str, typer.Option(help="Quoted history to measure with: recent:TOKENS and found:TOKENS, separated by commas.")
    ] = "",
    prior: Annotated[Path | None, typer.Option(help="Folder of an adapter from which everybody starts.")] = None,
    probes: Annotated[int, typer.Option(min=0, help="Messages a person for the recognition tests.")] = 10,
    questions: Annotated[int, typer.Option(min=0, max=100, help="Questions with known answers to ask.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of the training: repeat it with others.")] = 0,
    gate: Annotated[
        bool, typer.Option(help="Keep half of what costs the assistant too much, or nothing, as the service does.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="SVG file to draw into.")] = None,
    json: Json = False,
) -> None:
    """Say how well adapters predict their people: of the service's users (--live) or in an experiment (--data)."""
    if live == (data is not None):
        raise RequestError("Say what to evaluate: --live for the running service's users, or --data FILE.jsonl.")
    if data is None:
        _live(Link(settings(context)), user, json)
        return
    from jobs.trial import Options  # half a second that no other command needs
    from persona import cli_trial

    options = Options(tokens, rounds, cli_trial.context(contexts), probes, questions, seed, gate)
    wishes = cli_trial.Wishes(data, users, only, without, prior, plot, options)
    cli_trial.trial(settings(context), wishes, json=json)


def _live(link: Link, user: str | None, json: bool) -> None:
    report = link.ask("GET", "/admin/live", params={"user": user} if user is not None else {})
    if json:
        emit(report)
        return
    rows = report["data"]
    table([_row(item) for item in rows], _COLUMNS, _NONE)
    for item in rows:
        if item["rolled_back"]:
            say(f"{item['user']}@{item['version']}: {item['rolled_back']}")
    if rows:
        say(_summary(rows))
    if not report["enabled"]:
        say(_OFF)


def _row(item: dict[str, Any]) -> dict[str, Any]:
    low, high = item["interval"]
    shown = {"against": item["against"] or "base", "gain": f"{item['gain']:+.3f}", "verdict": _verdict(item)}
    return {**item, **shown, "interval": f"{low:+.3f} … {high:+.3f}"}


def _verdict(item: dict[str, Any]) -> str:
    return _ROLLED_BACK if item["rolled_back"] else _WORDS[item["verdict"]]


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many of which verdict."""
    verdicts = Counter(_verdict(item) for item in rows)
    said = ", ".join(f"{verdicts[word]} {word}" for word in (*_WORDS.values(), _ROLLED_BACK) if verdicts[word])
    messages = sum(item["messages"] for item in rows)
    return f"{messages} messages judged, gain in nats per token: {said}."
