"""What a measurement says: one JSON object a run, and a table in which each figure is explained.

Percentiles are those of values that occurred (nearest rank). Requests that failed or were refused have no times; of the
first-token limit they count as missed.
"""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any

from persona.cli_bench_client import Measured, Outcome
from persona.cli_screen import say, table

Line = dict[str, Any]
Read = Callable[[Line], float | None]
_SHARES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}
# Of the engine: what it counts since its start, and what it says at the end of a run.
_COUNTED = {
    "steps": "steps",
    "loads": "adapter_loads",
    "disk_loads": "adapter_disk_loads",
    "loaded_bytes": "adapter_loaded_bytes",
    "prompt_tokens": "prefix_tokens_asked",
    "cached_tokens": "prefix_tokens_found",
}
_STATES = {
    "resident": "adapters",
    "resident_bytes": "adapter_bytes",
    "host": "adapters_in_ram",
    "memory": "memory",
    "base_bytes": "base_bytes",
}


def percentiles(seconds: Iterable[float]) -> dict[str, float] | None:
    """Times in seconds → milliseconds by percentile; None without any."""
    ordered = sorted(seconds)
    if not ordered:
        return None
    return {name: round(1000 * ordered[math.ceil(share * len(ordered)) - 1], 2) for name, share in _SHARES.items()}


def line(run: Measured, slo: float, flooder: int | None = None, corrupt: Collection[int] = ()) -> Line:
    """The figures of one run.

    `slo`: seconds in which the first token should come; `flooder`, `corrupt`: users who are told of apart.
    """
    done = [outcome for outcome in run.outcomes if not outcome.failure]
    failed = [outcome for outcome in run.outcomes if outcome.failure and not outcome.refused]
    seconds = max(run.seconds, 1e-9)
    said = {
        "ended_early": not run.complete,
        "seconds": round(run.seconds, 3),
        "sent": run.sent,
        "answered": len(done),
        "refused": sum(outcome.refused for outcome in run.outcomes),
        "errors": dict(Counter(outcome.failure for outcome in failed)),
        "unfinished": run.sent - len(run.outcomes),
        "users_seen": len({outcome.request.user for outcome in run.outcomes}),
        "requests_per_s": round(len(done) / seconds, 4),
        "tokens_per_s": round(sum(outcome.tokens for outcome in done) / seconds, 3),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in done),
        "reply_tokens": sum(outcome.tokens for outcome in done),
        **_times(done),
        "slo": _attainment(run.outcomes, slo),
        "client_late_ms": round(1000 * run.late, 2),
        "engine": _engine(run.before, run.after),
    }
    if flooder is not None:
        others = [outcome for outcome in run.outcomes if outcome.request.user != flooder]
        said["light_users"] = _part(others, slo)
        said["flooding_user"] = _part([o for o in run.outcomes if o.request.user == flooder], slo)
    if corrupt:
        said["corrupt_users"] = _part([o for o in run.outcomes if o.request.user in corrupt], slo)
        said["sound_users"] = _part([o for o in run.outcomes if o.request.user not in corrupt], slo)
    return said


def comparison(ours: Sequence[Line], others: Sequence[Line]) -> dict[str, float | None]:
    """Medians over the rounds of ratios, of both sides as they ran one after the other.

    Throughput, and the 95th percentile of the first token (where one user floods, of the others).
    """
    read: dict[str, Read] = {
        "requests_per_s": lambda one: one["requests_per_s"],
        "tokens_per_s": lambda one: one["tokens_per_s"],
        "first_token_p95": lambda one: (one.get("light_users", one)["first_token_ms"] or {}).get("p95"),
    }
    return {f"ratio_{name}": _ratio(value, ours, others) for name, value in read.items()}


def _ratio(read: Read, ours: Sequence[Line], others: Sequence[Line]) -> float | None:
    pairs = [(read(a), read(b)) for a, b in zip(ours, others, strict=False)]
    ratios = [a / b for a, b in pairs if a is not None and b]
    return round(statistics.median(ratios), 4) if ratios else None


def show(sides: dict[str, list[Line]], slo: float) -> None:
    """A table: one row a figure, one column a side; medians of the rounds, with their spread."""
    rows = [_row(label, read, digits, meaning, sides) for label, read, digits, meaning in _figures(slo)]
    table([row for row in rows if row], ("figure", *sides, "meaning"), "Nothing was measured.")
    for name, lines in sides.items():
        errors = Counter[str]()
        for one in lines:
            errors.update(one["errors"])
        if errors:
            told = ", ".join(f"{count} × {kind}" for kind, count in errors.most_common())
            say(f"{name}: errors were {told}.")


def _times(done: Sequence[Outcome]) -> dict[str, Any]:
    heard = [outcome for outcome in done if outcome.pieces]
    per_token = [(o.pieces[-1] - o.pieces[0]) / (o.tokens - 1) for o in heard if o.tokens > 1]
    return {
        "first_token_ms": percentiles(outcome.pieces[0] - outcome.start for outcome in heard),
        "between_tokens_ms": percentiles(b - a for outcome in heard for a, b in pairwise(outcome.pieces)),
        "per_token_ms": percentiles(per_token),
        "total_ms": percentiles(outcome.end - outcome.start for outcome in done),
    }


def _attainment(outcomes: Sequence[Outcome], slo: float) -> dict[str, Any]:
    by_user: dict[int, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        in_time = not outcome.failure and bool(outcome.pieces) and outcome.pieces[0] - outcome.start <= slo
        by_user[outcome.request.user].append(in_time)
    shares = {user: sum(kept) / len(kept) for user, kept in by_user.items()}
    worst = min(shares, key=lambda user: (shares[user], -len(by_user[user])), default=None)
    kept = sum(sum(kept) for kept in by_user.values())
    return {
        "seconds": slo,
        "attained": round(kept / len(outcomes), 4) if outcomes else None,
        "worst_user": round(shares[worst], 4) if worst is not None else None,
        "worst_user_requests": len(by_user[worst]) if worst is not None else 0,
    }


def _part(outcomes: Sequence[Outcome], slo: float) -> dict[str, Any]:
    """Some of the users alone."""
    done = [outcome for outcome in outcomes if not outcome.failure]
    return {
        "sent": len(outcomes),
        "answered": len(done),
        "refused": sum(outcome.refused for outcome in outcomes),
        "errors": dict(Counter(o.failure for o in outcomes if o.failure and not o.refused)),
        "first_token_ms": _times(done)["first_token_ms"],
        "slo": _attainment(outcomes, slo),
    }


def _engine(before: dict[str, float], after: dict[str, float]) -> dict[str, int] | None:
    """None where the service tells nothing of its engine."""
    if not before or not after:
        return None
    counted = {
        ours: int(after[name] - before[name]) for name, ours in _COUNTED.items() if name in before.keys() & after
    }
    return {**counted, **{ours: int(after[name]) for name, ours in _STATES.items() if name in after}}


def _found(one: Line) -> float | None:
    engine = one.get("engine") or {}
    asked = engine.get("prefix_tokens_asked")
    return 100 * engine["prefix_tokens_found"] / asked if asked else None


def _figures(slo: float) -> list[tuple[str, Read, int, str]]:
    """Label, value, digits and meaning of each row."""

    def at(*path: str) -> Read:
        def read(one: Line) -> float | None:
            value: Any = one
            for name in path:
                value = value.get(name) if value else None
            return None if value is None else float(value)

        return read

    def scaled(factor: float, *path: str) -> Read:
        read = at(*path)
        return lambda one: None if (value := read(one)) is None else factor * value

    return [
        ("requests/s", at("requests_per_s"), 2, "replies that ended as asked, over the time to the last one"),
        ("tokens/s", at("tokens_per_s"), 1, "tokens of those replies, prompts not counted"),
        ("first token p50, ms", at("first_token_ms", "p50"), 0, "half of the replies began sooner"),
        ("first token p99, ms", at("first_token_ms", "p99"), 0, "all but one in a hundred began sooner"),
        ("between tokens p50, ms", at("between_tokens_ms", "p50"), 1, "how fast text flows once it flows"),
        ("between tokens p99, ms", at("between_tokens_ms", "p99"), 1, "the pauses that readers notice"),
        ("between tokens max, ms", at("between_tokens_ms", "max"), 1, "the longest pause in any reply"),
        ("whole reply p50, ms", at("total_ms", "p50"), 0, "from the request to the end of the reply"),
        ("whole reply p99, ms", at("total_ms", "p99"), 0, "the same for all but one in a hundred"),
        (
            "in time, %",
            scaled(100, "slo", "attained"),
            1,
            f"of all requests, those whose first token came within {slo:g} s",
        ),
        ("in time, worst user, %", scaled(100, "slo", "worst_user"), 1, "the same for the user who fared worst"),
        ("refused", at("refused"), 0, "the service was full and said so"),
        ("errors", lambda one: sum(one["errors"].values()), 0, "everything else that went wrong"),
        ("light users p95, ms", at("light_users", "first_token_ms", "p95"), 0, "their first token, beside the flood"),
        (
            "sound users' errors",
            lambda one: _errors(one.get("sound_users")),
            0,
            "of those whose adapter is not corrupt",
        ),
        ("adapter loads", at("engine", "adapter_loads"), 0, "adapters that had to come from RAM or from their files"),
        ("prompt found, %", _found, 1, "tokens of prompts that the prefix cache had"),
        (
            "adapters, MiB",
            scaled(2**-20, "engine", "adapter_bytes"),
            0,
            "of adapters in the engine's memory at the end",
        ),
        ("engine, MiB", scaled(2**-20, "engine", "memory"), 0, "of the engine's memory in all, at the end"),
    ]


def _errors(part: dict[str, Any] | None) -> float | None:
    return sum(part["errors"].values()) if part else None


def _row(label: str, read: Read, digits: int, meaning: str, sides: dict[str, list[Line]]) -> dict[str, str]:
    """Empty if no side has the figure."""
    found = {name: [value for one in lines if (value := read(one)) is not None] for name, lines in sides.items()}
    if not any(found.values()):
        return {}
    return {"figure": label, "meaning": meaning, **{name: _spread(values, digits) for name, values in found.items()}}


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    median = f"{statistics.median(values):,.{digits}f}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"
