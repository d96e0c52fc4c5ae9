"""From measured people to sentences with intervals: paired, and honest about few people with few messages each.

Every comparison is between two conditions on the same messages. An interval comes from drawing people and, within each,
messages anew with replacement (a hierarchical bootstrap): it answers what other people would show, not only these.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jobs.rounds import Kept
from jobs.trial import Result

DRAWS = 2000
SEED = 20_264
_ENDS = (2.5, 97.5)  # percentiles


@dataclass(frozen=True, slots=True)
class Comparison:
    """How much lower the loss per token is under one condition than under another, as a share of it."""

    gain: float  # mean over people
    low: float
    high: float
    better: float  # share of people with a gain above zero
    people: int


def gain(result: Result, over: str, under: str) -> float:
    """How much lower one person's loss is `under` a condition than it is in `over`, as a share."""
    return 1 - result.loss(under) / result.loss(over)


def compare(results: Sequence[Result], over: str, under: str) -> Comparison | None:
    """`under` against `over`, on the people who have both; None if nobody has."""
    both = [result for result in results if over in result.nats and under in result.nats]
    if not both:
        return None
    gains = np.array([gain(result, over, under) for result in both])
    drawn = _draws([_messages(result, over, under) for result in both])
    low, high = np.percentile(drawn, _ENDS)
    return Comparison(float(gains.mean()), float(low), float(high), float((gains > 0).mean()), len(both))


def interval(result: Result, over: str, under: str) -> tuple[float, float]:
    """The gain of one person, messages drawn anew."""
    low, high = np.percentile(_draws([_messages(result, over, under)]), _ENDS)
    return float(low), float(high)


PAIRS = {  # under and over, by the names under which README and docs/BENCHMARKS.md speak of them
    "adapter_context_over_context": ("adapter_context", "context"),  # P1
    "adapter_context_over_prior_context": ("adapter_context", "prior_context"),  # P1b
    "adapter_over_base": ("adapter", "base"),
    "adapter_over_prior": ("adapter", "prior"),
    "adapter_over_wrong_user": ("adapter", "wrong_user"),  # P3
    "adapter_context_over_wrong_user_context": ("adapter_context", "wrong_user_context"),
    "adapter_context_over_stale_context": ("adapter_context", "stale_context"),
    "adapter_served_over_base_served": ("adapter_served", "base_served"),
    "adapter_served_over_stale_served": ("adapter_served", "stale_served"),
    "context_over_base": ("context", "base"),
}


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """What the trial says."""
    compared = {name: compare(results, over, under) for name, (under, over) in PAIRS.items()}
    found: dict[str, Any] = {name: asdict(one) for name, one in compared.items() if one is not None}
    found["losses"] = {name: _mean([r.loss(name) for r in results]) for name in _common(results)}
    drift = [result.reference["adapter"] / result.reference["base"] - 1 for result in results if result.reference]
    if drift:
        found["reference_drift"] = {"mean": float(np.mean(drift)), "worst": max(drift)}  # P4
    forgot = [result.replies["adapter"] - result.replies["base"] for result in results if result.replies]
    if forgot:
        found["forgetting"] = {"mean": float(np.mean(forgot)), "worst": max(forgot)}  # nats per token
    kept = Counter(way for result in results for way in result.kept)
    if kept:
        found["kept"] = {way.value: kept[way] for way in Kept}  # rounds
    for part in ("recognised", "answered"):
        names = sorted({name for result in results for name in getattr(result, part)})
        if names:
            found[part] = {
                name: _mean([getattr(r, part)[name] for r in results if name in getattr(r, part)]) for name in names
            }
    found["bytes"] = _mean([r.bytes for r in results if r.bytes] or [0])  # of those who have an adapter
    found["seconds"] = _mean([r.seconds for r in results])
    return found


def as_dict(result: Result) -> dict[str, Any]:
    """One person for a script: losses per token, and nats of each message for further comparisons; no text."""
    conditions = {name: result.loss(name) for name in result.nats}
    about: dict[str, Any] = {"user": result.name, "tokens": result.own_tokens, "kept": result.kept}
    about |= {"held_out_messages": len(result.lengths), "held_out_tokens": sum(result.lengths)}
    about |= {"conditions": conditions, "context_is": result.chosen}
    about["gain"] = gain(result, "context", "adapter_context")
    about["gain_interval"] = list(interval(result, "context", "adapter_context"))
    about["gains"] = dict(_gains(result))
    about |= {"reference": result.reference, "replies": result.replies}
    about |= {"recognised": result.recognised, "answered": result.answered}
    about |= {"curve": result.curve, "bytes": result.bytes, "seconds": result.seconds}
    about["messages"] = {"tokens": result.lengths, "nats": result.nats}
    return about


def _gains(result: Result) -> Iterator[tuple[str, dict[str, float]]]:
    """All that the summary compares, of one person: messages are drawn anew."""
    for name, (under, over) in PAIRS.items():
        if under in result.nats and over in result.nats:
            low, high = interval(result, over, under)
            yield name, {"gain": gain(result, over, under), "low": low, "high": high}


def _common(results: Sequence[Result]) -> list[str]:
    """Conditions that everybody has, in the order in which they were measured."""
    return [name for name in results[0].nats if all(name in result.nats for result in results)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _messages(result: Result, over: str, under: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[2, messages]: nats under both conditions."""
    return np.array([result.nats[over], result.nats[under]])


def _draws(people: Sequence[np.ndarray[Any, np.dtype[np.float64]]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[DRAWS]: the mean gain over people and messages drawn anew."""
    random = np.random.default_rng(SEED)
    # Per person, DRAWS gains from messages drawn anew; the lengths cancel in the ratio of two sums. Who is drawn twice
    # has another draw of messages each time.
    each = np.empty((len(people), DRAWS))
    for place, nats in enumerate(people):
        picked = random.integers(0, nats.shape[1], size=(DRAWS, nats.shape[1]))
        over, under = nats[:, picked].sum(axis=2)
        each[place] = 1 - under / over
    chosen = random.integers(0, len(people), size=(DRAWS, len(people)))
    return np.asarray(each[chosen, random.integers(0, DRAWS, size=chosen.shape)].mean(axis=1))
