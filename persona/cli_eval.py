"""`persona eval`: how well versions predict their users. With --live, by what they wrote while the versions served.

The running service keeps these figures (jobs/live.py); nothing is computed here.
"""

from collections import Counter
from collections.abc import Sequence
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
    user: Annotated[str | None, typer.Option("--user", help="Only this user.")] = None,
    json: Json = False,
) -> None:
    """Say how well versions predict their users."""
    if not live:
        raise RequestError("Say what to evaluate: --live reports from the live checks of the running service.")
    _live(Link(settings(context)), user, json)


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
