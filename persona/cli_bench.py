"""`persona bench`: throughput and latency of the whole service under S-LoRA's workload, over HTTP.

Without --url a service of its own runs in a temporary home, with as many users as asked for; with it, one that runs
already is measured with its own users.
"""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persona.cli_screen import Json, settings
from persona.errors import RequestError

if TYPE_CHECKING:
    from persona.cli_bench_run import Side
    from persona.workload import Workload

_USERS = 8
_REQUESTS = 64  # when nothing says how many
_CLIENTS = 8  # when nothing says how they come


def bench(
    context: typer.Context,
    users: Annotated[
        int | None,
        typer.Option("--users", "--adapters", min=1, help="Registered users, one adapter each (default: 8)."),
    ] = None,
    ranks: Annotated[
        str, typer.Option(help="Ranks of their adapters in turn, say 2,8,16 (default: learning.rank).")
    ] = "",
    alpha: Annotated[float, typer.Option(help="Popularity: 1 is uniform, less makes few users popular.")] = 1.0,
    turns: Annotated[bool, typer.Option("--turns", help="Users take turns instead of being drawn.")] = False,
    rate: Annotated[float | None, typer.Option(help="Open loop: requests per second.")] = None,
    cv: Annotated[
        float | None,
        typer.Option(help="Open loop: variation of the gaps, more comes in bursts (default: 1, Poisson)."),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(min=1, help="Closed loop: clients that ask when their last reply has ended (default: 8)."),
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests of a run (default: 64).")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.001, help="Or: send for so long.")] = None,
    prompt: Annotated[str, typer.Option(help="Tokens of a prompt, template included: LOW:HIGH.")] = "64:256",
    reply: Annotated[str, typer.Option(help="Tokens of a reply, exactly: LOW:HIGH.")] = "16:64",
    slo: Annotated[float, typer.Option(min=0.001, help="Seconds in which the first token should come.")] = 6.0,
    base: Annotated[bool, typer.Option("--base", help="No adapters: everybody asks the bare base.")] = False,
    compare: Annotated[
        str | None, typer.Option(help="Measure in turn with: «base», «alone» (no --flood), or so many users.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each side is measured.")] = 1,
    flood: Annotated[float, typer.Option(help="Open loop: one further user sends so many requests per second.")] = 0.0,
    corrupt: Annotated[float, typer.Option(min=0, max=1, help="Share of the adapters whose files are damaged.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed makes the same requests.")] = 42,
    url: Annotated[str | None, typer.Option(help="Measure the service that answers there.")] = None,
    key: Annotated[list[str] | None, typer.Option(help="With --url: a key; once a user.")] = None,
    keys: Annotated[Path | None, typer.Option(help="With --url: a file with one key a line.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to which the JSON lines are added.")] = None,
    json: Json = False,
) -> None:
    """Measure the whole service: how much it answers, how soon, how smoothly, and what goes wrong."""
    configuration = settings(context)
    secrets = _secrets(url, key or [], keys)
    if url is not None and (users or ranks or corrupt or compare not in (None, "base", "alone")):
        raise RequestError("--users, --ranks, --corrupt and --compare N need users of our own: leave out --url.")
    if corrupt and base:
        raise RequestError("--corrupt damages adapters, and with --base there are none: leave out one of them.")
    if rate is not None and clients is not None:
        raise RequestError("Say how requests come: --rate for an open loop, or --clients for a closed one.")
    if rate is None and cv is not None:
        raise RequestError("--cv shapes the gaps of an open loop: name its --rate.")
    if not all(map(isfinite, (slo, corrupt, seconds or 0.0))):
        raise RequestError("--slo, --seconds and --corrupt have to be finite numbers.")
    if url is not None and flood and len(secrets) < 2:
        raise RequestError("--flood needs a user of its own beside the others: name another key.")
    if requests is not None and seconds is not None:
        raise RequestError("Say when a run ends: after --requests, or after --seconds.")
    from persona import cli_bench_run as run  # a second that no other command needs
    from persona.cli_bench_client import Limit
    from persona.workload import Range, Workload

    count = len(secrets) - bool(flood) if url else users or _USERS
    lengths = Range.of(prompt), Range.of(reply)
    if url is None and lengths[1].high > (most := configuration.prompt.max_reply_tokens):
        raise RequestError(f"--reply exceeds prompt.max_reply_tokens ({most}): shorten it, or raise the setting.")
    work = Workload(count, *lengths, alpha, rate, 1.0 if cv is None else cv, turns, flood, seed)
    sides = _sides(work, base, compare)
    wishes = run.Wishes(
        sides=sides,
        clients=clients or _CLIENTS,
        limit=Limit(requests or (None if seconds else _REQUESTS), seconds),
        rounds=rounds,
        slo=slo,
        ranks=() if {side.model for side in sides} == {run.BASE} else _ranks(ranks) or (configuration.learning.rank,),
        corrupt=corrupt,
        url=url,
        keys=tuple(secrets),
        out=out,
        json=json,
    )
    raise typer.Exit(run.bench(configuration, wishes))


def _secrets(url: str | None, given: list[str], file: Path | None) -> list[str]:
    """The keys of --key and --keys. Raises RequestError unless there are some with --url, and none without."""
    if url is None:
        if given or file:
            raise RequestError("Keys belong to a service that runs: name it with --url.")
        return []
    try:
        lines = file.read_text(encoding="utf-8").split() if file else []
    except (OSError, UnicodeDecodeError):
        raise RequestError(f"{file} cannot be read as a file of keys, one a line.") from None
    if not (found := [*given, *lines]):
        raise RequestError("Name the users to measure with: --key KEY for each, or --keys FILE.")
    if any(not (secret.isascii() and secret.isprintable()) for secret in found):
        raise RequestError("A key has plain characters only: check --key and --keys.")
    return found


def _sides(work: "Workload", base: bool, compare: str | None) -> "tuple[Side, ...]":
    """What is measured, and what it is compared with. Raises RequestError."""
    from dataclasses import replace

    from persona.cli_bench_run import BASE, Side

    first = Side(BASE if base else _people(work.users), BASE if base else "persona", work)
    if compare is None:
        return (first,)
    if compare == BASE and not base:
        return first, Side(BASE, BASE, work)
    if compare == "alone" and work.flood:
        return replace(first, name="beside the flood"), Side("alone", first.model, replace(work, flood=0.0))
    if compare.isdecimal() and 0 < int(compare) != work.users:
        other = replace(work, users=int(compare))
        return replace(first, name=_people(work.users)), Side(_people(other.users), first.model, other)
    raise RequestError(
        f"--compare {compare}: name «base» for users with adapters, «alone» for a --flood, or another number of users."
    )


def _people(users: int) -> str:
    return f"{users} user" if users == 1 else f"{users} users"


def _ranks(text: str) -> tuple[int, ...]:
    """«2,8,16» → ranks. Raises RequestError."""
    from persona.engine.adapter_file import MAX_RANK

    found = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and 1 <= int(part) <= MAX_RANK for part in found):
        raise RequestError(f"{text!r} are no ranks: write numbers from 1 to {MAX_RANK}, separated by commas.")
    return tuple(int(part) for part in found)
