"""What `persona bench` does: a service of its own or a running one, sides in turn, rounds, and what came of them.

A signal ends the measurement in good order: what was measured until then is told, and the private service goes.
"""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.progress import Progress

from persona import app_bench
from persona.app import House
from persona.cli_bench_client import Limit, Outcome, Run, Target
from persona.cli_bench_report import Line, comparison, line, show
from persona.cli_screen import emit, progress, say
from persona.cli_serve import fetched
from persona.errors import PersonaError, RequestError
from persona.settings import Settings
from persona.wording import Wording
from persona.workload import Request, Workload

BASE = "base"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the things that are measured in turn."""

    name: str
    model: str
    workload: Workload


@dataclass(frozen=True, slots=True)
class Wishes:
    """The options of the command, understood."""

    sides: tuple[Side, ...]  # the first is the one of interest
    clients: int
    limit: Limit
    rounds: int
    slo: float
    ranks: tuple[int, ...]
    corrupt: float  # share of the users
    url: str | None
    keys: tuple[str, ...]
    out: Path | None
    json: bool


@dataclass(slots=True)
class Found:
    """Lines by side, in the order in which they were measured."""

    wishes: Wishes
    sides: dict[str, list[Line]] = field(default_factory=dict)

    def tell(self, told: Line) -> None:
        """A line for scripts, at once: a later kill does not lose it."""
        if self.wishes.json:
            emit(told)
        if self.wishes.out is not None:
            with self.wishes.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")


def bench(configuration: Settings, wishes: Wishes) -> int:
    """Measure and tell. Returns the exit code: 0, or 128 and the number of the signal that ended it."""
    if wishes.out is not None:
        _check(wishes.out)
    found = Found(wishes)
    try:
        number = asyncio.run(_until_signal(_measure(configuration, wishes, found)))
    finally:
        if found.sides:
            _conclude(found)
    if number and not found.sides:
        typer.echo("The measurement ended before a reply had come.", err=True)
    return 128 + number if number else 0


def _conclude(found: Found) -> None:
    """Compare the sides; for a person, show the figures."""
    wishes, names = found.wishes, [side.name for side in found.wishes.sides]
    ratios = {}
    if len(found.sides) == 2:
        ratios = comparison(*(found.sides[name] for name in names))
        found.tell({"compared": names, **ratios})
    if wishes.json:
        return
    show(found.sides, wishes.slo)
    if ratios:
        told = ", ".join(f"{name.removeprefix('ratio_')} {value}" for name, value in ratios.items())
        say(f"{names[0]} over {names[1]}, medians of the rounds: {told}.")


async def _until_signal(measuring: Coroutine[Any, Any, None]) -> int:
    """Run to the end or to the first signal, whose number is returned; 0 without one."""
    task = asyncio.create_task(measuring)
    heard: list[int] = []

    def stop(number: int) -> None:
        if not heard:
            heard.append(number)
            task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, partial(stop, number))
    await asyncio.wait([task])
    if task.cancelled() and heard:
        return heard[0]
    await task
    return 0


async def _measure(configuration: Settings, wishes: Wishes, found: Found) -> None:
    async with _service(configuration, wishes) as measured:
        wordings = {}
        for side in wishes.sides:
            wordings[side.name] = await measured.target.wording(side.model, side.workload)
            await _warm(measured.target, side, wordings[side.name])
        for number in range(wishes.rounds):
            for place, side in enumerate(wishes.sides, number * len(wishes.sides)):
                run = Run(measured.target, side.model, wordings[side.name], side.workload, wishes.clients, place)
                try:
                    await run.go(wishes.limit)
                finally:
                    if run.found.outcomes:
                        _note(found, side, number + 1, run, measured)
                if not run.found.outcomes:
                    raise PersonaError("Nobody asked within --seconds: raise --rate, or measure for longer.")


def _note(found: Found, side: Side, number: int, run: Run, measured: "Measurable") -> None:
    wishes = found.wishes
    bad = [user for user in measured.corrupt if user < side.workload.registered]
    figures = line(run.found, wishes.slo, side.workload.flooder, bad)
    told = {"side": side.name, "round": number, **figures, "workload": _described(side, wishes), **measured.about}
    found.sides.setdefault(side.name, []).append(told)
    found.tell(told)


async def _warm(target: Target, side: Side, wording: Wording) -> None:
    """One request that is not measured. Raises PersonaError when it is not answered."""
    outcome = Outcome(Request(0, side.workload.prompt.low, 1, 0), 0.0)
    await target.ask(side.model, wording.text(side.workload.prompt.low, 0), outcome, 0.0)
    if outcome.failure:
        raise PersonaError(f"The first request ended with {outcome.failure}: there is nothing to measure.")


@dataclass(frozen=True, slots=True)
class Measurable:
    """A service, what it is, and which of its users have corrupt adapters."""

    target: Target
    about: dict[str, Any]
    corrupt: frozenset[int] = frozenset()


@asynccontextmanager
async def _service(configuration: Settings, wishes: Wishes) -> AsyncIterator[Measurable]:
    if wishes.url is not None:
        async with Target.open(wishes.url, wishes.keys) as target:
            yield Measurable(target, {"url": wishes.url})
        return
    prepared = await asyncio.to_thread(fetched, configuration)
    async with app_bench.private_service(configuration, prepared) as house:
        keys, corrupt = await _people(house, wishes)
        health = await house.services.engine.health()
        about = {name: getattr(health, name) for name in ("model", "device", "weights", "base")}
        about |= {"patience_seconds": configuration.engine.patience_seconds}
        async with Target.open(house.url, keys) as target:
            yield Measurable(target, about, corrupt)


async def _people(house: House, wishes: Wishes) -> tuple[list[str], frozenset[int]]:
    """The users' keys, and who has a corrupt adapter."""
    users = max(side.workload.registered for side in wishes.sides)
    with progress(*Progress.get_default_columns()) as bar:
        task = bar.add_task("registering users", total=users)
        keys, versions = await app_bench.populate(
            house, users, wishes.ranks, lambda done: bar.update(task, completed=done)
        )
    corrupt = _corrupt(users, wishes.corrupt)
    for user in corrupt:
        await asyncio.to_thread(app_bench.corrupt, versions[user])
    return keys, corrupt


def _corrupt(users: int, share: float) -> frozenset[int]:
    """That share of the users, at least one of them, spread evenly."""
    count = max(1, round(share * users)) if share else 0
    return frozenset(index * users // count for index in range(count))


def _described(side: Side, wishes: Wishes) -> dict[str, Any]:
    """The workload, so that a line can be measured again."""
    work = side.workload
    return {
        "users": work.users,
        "model": side.model,
        "ranks": list(wishes.ranks) if side.model != BASE else [],
        "prompt": str(work.prompt),
        "reply": str(work.reply),
        "alpha": work.alpha,
        "turns": work.turns,
        "rate": work.rate,
        "cv": work.cv if work.rate else None,
        "clients": None if work.rate else wishes.clients,
        "flood": work.flood,
        "corrupt": wishes.corrupt,
        "requests": wishes.limit.requests,
        "seconds": wishes.limit.seconds,
        "seed": work.seed,
    }


def _check(out: Path) -> None:
    """Raises RequestError unless lines can be added there."""
    try:
        out.open("a", encoding="utf-8").close()
    except OSError as error:
        raise RequestError(f"{out} cannot be written: {error.strerror}.") from None
