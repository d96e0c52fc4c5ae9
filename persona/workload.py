"""S-LoRA's synthetic workload (Sheng et al. 2024): who asks when, with how long a prompt, for how long a reply.

    user       int(power(alpha) * users): alpha 1 is uniform, below 1 the first users are the popular ones
    arrivals   gaps from a Gamma distribution with mean 1 / rate seconds and coefficient of variation cv (1: Poisson)
    lengths    uniform over a range of tokens, both ends included; replies are exactly so long

Pure: equal numbers give equal requests, and each quantity has a random stream of its own, so that another rate or
another flood leaves users and lengths as they were.
"""

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from persona.errors import RequestError

_BLOCK = 1024  # numbers drawn at once


@dataclass(frozen=True, slots=True)
class Range:
    """Lengths in tokens, both included."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise RequestError(f"{self.low}:{self.high} is no range of lengths: write LOW:HIGH, at least 1 token.")

    @classmethod
    def of(cls, text: str) -> "Range":
        """«64:256», or «64» for exactly 64. Raises RequestError."""
        low, _, high = text.partition(":")
        if not (_number(low) and _number(high or low)):
            raise RequestError(f"{text!r} is no range of lengths: write LOW:HIGH in tokens, for instance 64:256.")
        return cls(int(low), int(high or low))

    def __str__(self) -> str:
        return f"{self.low}:{self.high}"


@dataclass(frozen=True, slots=True)
class Workload:
    """The distribution of requests. Raises RequestError for numbers that mean nothing."""

    users: int
    prompt: Range
    reply: Range
    alpha: float = 1.0
    rate: float | None = None  # requests per second; None: whoever sends asks when the last reply has ended
    cv: float = 1.0
    turns: bool = False  # users take turns instead of being drawn
    flood: float = 0.0  # requests per second of one further user, beside all others
    seed: int = 42

    def __post_init__(self) -> None:
        positive = {
            "users": self.users,
            "alpha": self.alpha,
            "cv": self.cv,
            "rate": 1 if self.rate is None else self.rate,
        }
        for name, value in positive.items():
            if not 0 < value < 1e9:
                raise RequestError(f"{name} has to be above 0 and below a billion.")
        if not 0 <= self.flood < 1e9 or (self.flood and self.rate is None):
            raise RequestError("flood is a rate in requests per second, beside a rate of the other users.")
        if self.seed < 0:
            raise RequestError("seed has to be 0 or more.")

    @property
    def flooder(self) -> int | None:
        """The number of the user who floods."""
        return self.users if self.flood else None

    @property
    def registered(self) -> int:
        """Users that have to exist."""
        return self.users + bool(self.flood)


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `at` is in seconds after the start; lengths are in tokens; `seed` chooses the words."""

    user: int
    prompt: int
    reply: int
    seed: int
    at: float = 0.0


def requests(workload: Workload) -> Iterator[Request]:
    """Requests without end, in the order in which they are sent."""
    streams = np.random.SeedSequence(workload.seed).spawn(2)
    users = _turns(workload.users) if workload.turns else _drawn(streams[0], workload)
    common = _stream(workload, streams[0], users, workload.rate, 0)
    if workload.flooder is None:
        return common
    flood = _stream(workload, streams[1], _turns(1, workload.flooder), workload.flood, 1)
    return heapq.merge(common, flood, key=lambda request: request.at)


def _stream(
    workload: Workload, seed: np.random.SeedSequence, users: Iterator[int], rate: float | None, offset: int
) -> Iterator[Request]:
    """Requests of `users`; those of another stream have seeds between these."""
    prompts, replies = _lengths(seed, 1, workload.prompt), _lengths(seed, 2, workload.reply)
    arrivals = _arrivals(seed, rate, workload.cv)
    for number, user, prompt, reply, at in zip(count(), users, prompts, replies, arrivals, strict=False):
        yield Request(user, prompt, reply, 2 * number + offset, at)


def _turns(users: int, first: int = 0) -> Iterator[int]:
    return (first + number % users for number in count())


def _drawn(seed: np.random.SeedSequence, workload: Workload) -> Iterator[int]:
    source, users = _source(seed, 0), workload.users
    for share in _blocks(lambda size: source.power(workload.alpha, size)):
        yield min(int(share * users), users - 1)


def _lengths(seed: np.random.SeedSequence, which: int, range_: Range) -> Iterator[int]:
    source = _source(seed, which)
    return _blocks(lambda size: source.integers(range_.low, range_.high, size, endpoint=True))


def _arrivals(seed: np.random.SeedSequence, rate: float | None, cv: float) -> Iterator[float]:
    """Times in seconds; all 0 without a rate."""
    at, source = 0.0, _source(seed, 3)
    shape = cv**-2
    for gap in _blocks(lambda size: source.gamma(shape, 1 / (shape * rate), size) if rate else np.zeros(size)):
        at += gap
        yield at


def _source(seed: np.random.SeedSequence, which: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, which)))


def _blocks(draw: Callable[[int], Any]) -> Iterator[Any]:
    while True:
        yield from draw(_BLOCK).tolist()


def _number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
