"""`persona eval --data FILE`: an experiment on people's histories, with an engine of its own in a temporary home."""

import asyncio
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jobs import people, plans, summary
from jobs import prior as priors
from jobs.rounds import Ground
from jobs.trial import CONTEXTS, Context, Options, Result, Trial
from persona import chart
from persona.app_private import Private, private
from persona.cli_screen import emit, plain, progress, say, table
from persona.cli_serve import fetched
from persona.engine.protocol import AdapterRef
from persona.errors import RequestError
from persona.settings import Settings
from storage.history import History
from storage.users import Users


@dataclass(frozen=True, slots=True)
class Wishes:
    """The options of the command, as they were typed."""

    data: Path
    users: int | None
    only: str
    without: str
    prior: Path | None
    plot: Path | None
    options: Options


def context(text: str) -> tuple[Context, ...]:
    """«recent:256,found:1024» → contexts, the shortest first. Raises RequestError."""
    found = []
    for part in filter(None, text.split(",")):
        kind, _, tokens = part.strip().partition(":")
        if kind not in ("recent", "found") or not tokens.isdecimal() or not 16 <= int(tokens) <= 8192:
            raise RequestError(f"{part!r} is no context: write recent:TOKENS or found:TOKENS, 16 to 8192 tokens.")
        found.append(Context(kind, int(tokens)))
    return tuple(sorted(found, key=lambda one: one.tokens)) or CONTEXTS


def names(text: str) -> list[str]:
    """Names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def trial(configuration: Settings, wishes: Wishes, *, json: bool) -> None:
    """Run the experiment and show what it says."""
    some = people.read(wishes.data, only=names(wishes.only), without=names(wishes.without), limit=wishes.users)
    prior = plans.folder(wishes.prior) if wishes.prior else None
    if wishes.prior:
        _demand_others(wishes.prior, some)
    if wishes.plot:
        _demand_place(wishes.plot)
    done: list[Result] = []
    try:
        base = asyncio.run(_run(configuration, some, prior, wishes.options, done))
    except BaseException:  # whatever ended it: what took hours to measure is told
        if done:
            _report(done, wishes, {"ended_early": True}, json=json)
        raise
    _report(done, wishes, {"base": base, "ended_early": False}, json=json)


def _report(results: list[Result], wishes: Wishes, about: dict[str, Any], *, json: bool) -> None:
    """Print, then draw, what was measured, of everybody or of those who were done when the experiment was stopped."""
    said = {"users": [summary.as_dict(result) for result in results], "summary": summary.summary(results), **about}
    said["options"] = asdict(wishes.options)
    if json:
        emit(said)
    else:
        _show(results, said["summary"])
    if wishes.plot:
        _draw(wishes.plot, said)


def _demand_others(prior: Path, some: list[people.Person]) -> None:
    """Raises RequestError for people whom the prior was made by: it would know them already."""
    made_by = priors.read_people(prior)
    if made_by is None:
        typer.echo(
            f"{prior} does not say whom it learned from ({priors.MADE_BY} is missing):"
            " its losses mean something only if it was none of these people.",
            err=True,
        )
    elif known := made_by.among(some):
        listed = plain(",".join(known))
        raise RequestError(
            f"The prior {prior} has learned from {listed}: leave them out (--without {listed}), or name another prior."
        )


def _demand_place(plot: Path) -> None:
    """Raises RequestError if nothing can be drawn there: after the experiment that would come too late."""
    try:
        new = not plot.exists()
        plot.open("ab").close()
        if new:
            plot.unlink()
    except OSError as error:
        raise _no_place(plot, error) from None


def _draw(plot: Path, said: dict[str, Any]) -> None:
    try:
        plot.write_text(chart.svg(said), encoding="utf-8")
    except OSError as error:
        raise _no_place(plot, error) from None


def _no_place(plot: Path, error: OSError) -> RequestError:
    return RequestError(f"{plot} cannot be drawn into: {error.strerror}. Name another file with --plot.")


async def _run(
    configuration: Settings,
    some: list[people.Person],
    prior: AdapterRef | None,
    options: Options,
    done: list[Result],
) -> str:
    """Everybody in turn, those who are measured into `done`. Returns the base's hash."""
    prepared = await asyncio.to_thread(fetched, configuration)
    async with private(configuration, prepared) as parts:
        with _bar() as bar:
            if prior is not None:
                await parts.engine.stage(prior)

            def told(result: Result) -> None:
                done.append(result)
                bar.console.print(_line(result, len(done), len(some)), markup=False, highlight=False, soft_wrap=True)

            await _trial(parts, prior, bar).run(some, options, told)
            return parts.base


def _line(result: Result, number: int, total: int) -> str:
    """What is known of one person, on stderr while others are still to come."""
    losses = {"base": "base", "context": "context", "adapter": "adapter", "adapter_context": "adapter + context"}
    told = ", ".join(f"{words} {result.loss(name):.3f}" for name, words in losses.items())
    kept = f"{result.own_tokens} own tokens learned ({', '.join(result.kept)})"
    return plain(f"{number}/{total} {result.name}: {told} nats per token, {kept}")


def _trial(parts: Private, prior: AdapterRef | None, bar: Progress) -> Trial:
    task = bar.add_task("starting", total=1)

    def notify(what: str, done: int, total: int) -> None:
        bar.update(task, description=what, completed=done, total=total)

    users, history = Users(parts.database), History(parts.database)
    settings, engine, tokenizer, rehearsal = parts.settings, parts.engine, parts.tokenizer, parts.rehearsal
    ground = Ground(settings, users, history, engine, tokenizer, rehearsal, settings.adapters, prior, notify)
    return Trial(ground)


def _bar() -> AbstractContextManager[Progress]:
    return progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn()
    )


def _show(results: list[Result], said: dict[str, Any]) -> None:
    rows = []
    for result in results:
        low, high = summary.interval(result, "context", "adapter_context")
        losses = {name: f"{result.loss(name):.3f}" for name in result.nats}
        share = summary.gain(result, "context", "adapter_context")
        rows.append(
            {
                "user": result.name,
                "tokens": result.own_tokens,
                **losses,
                "gain": f"{share:.1%} ({low:.1%} … {high:.1%})",
            }
        )
    shown = ["base", "context", "prior_context", "adapter", "adapter_context", "wrong_user"]
    there = [name for name in shown if any(name in result.nats for result in results)]
    table(rows, ["user", "tokens", *there, "gain"], "Nobody was measured.")
    say("Loss per token of the person's own words; gain: of adapter and context together over context alone.")
    for name, one in said.items():
        told = name.replace("_", " ")
        if isinstance(one, dict) and "gain" in one:
            better = f"{one['better']:.0%} of {one['people']} people better"
            say(f"{told}: {one['gain']:.1%} ({one['low']:.1%} … {one['high']:.1%}), {better}")
        elif name == "kept":
            say(f"rounds kept: {', '.join(f'{key} {value}' for key, value in one.items())}")
        elif isinstance(one, dict) and name != "losses":
            say(f"{told}: {', '.join(f'{key} {value:.3f}' for key, value in one.items())}")
