"""What live checks say of a version, as numbers and in words. Pure.

A message's gain is per token, so that long ones weigh no more than short ones, and clipped, so that one outlier decides
nothing; the guarantee of the interval is that of confidence.py, for the mean of these gains.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from jobs import confidence
from jobs.confidence import BOUND, Interval
from storage.live import Checked


class Word(StrEnum):
    """What the figures say."""

    BETTER = "better"
    UNDECIDED = "undecided"
    WORSE = "worse"


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a version against another one. `gain`: nats per token that it saves, the mean over the messages."""

    version: int
    against: int | None  # None: the bare base
    messages: int
    tokens: int
    gain: Interval

    @property
    def word(self) -> Word:
        if self.gain.upper < 0:
            return Word.WORSE
        return Word.BETTER if self.gain.lower > 0 else Word.UNDECIDED


def figures(rows: Sequence[Checked]) -> Figures | None:
    """What the rows of one version say, in their order: those that compare it with what the last one does.

    None if there is nothing to judge by.
    """
    judging = [row for row in rows if row.tokens > 0]
    mine = [row for row in judging if row.against == judging[-1].against]
    if not mine:
        return None
    seen = confidence.interval(np.array([gain(row) for row in mine]))
    return Figures(mine[-1].version, mine[-1].against, len(mine), sum(row.tokens for row in mine), seen)


def gain(row: Checked) -> float:
    """Nats per token that the version saves on a message, clipped to ±BOUND; a score that is not finite is the worst.

    One that is not finite on both sides speaks against the version as well: what it was trained from is judged next.
    """
    if row.serving is None or not math.isfinite(row.serving):
        return -BOUND
    if row.before is None or not math.isfinite(row.before):
        return BOUND
    return max(-BOUND, min(BOUND, (row.before - row.serving) / row.tokens))


def reason(found: Figures) -> str:
    other = "the bare base" if found.against is None else f"version {found.against}"
    return (
        f"Rolled back by the live check: {found.gain.mean:+.3f} nats per token against {other} over {found.messages} "
        f"messages, {found.gain.upper:+.3f} at most."
    )
