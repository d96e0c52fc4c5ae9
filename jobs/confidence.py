"""A confidence sequence: an interval for a mean that may be looked at after every observation.

Guaranteed: let x_1, x_2, … lie in [-BOUND, BOUND], independent or not, and let μ_i be the expectation of x_i given all
before it. For every m, with probability of at least 1 - ALPHA/2, the upper end is at no time below m while the mean of
the μ so far is m or more; likewise the lower end. So who acts at the first upper end below zero, however often they
looked, does so wrongly with probability ALPHA/2 at most; and if all μ are one number, the interval holds it at every
time with probability 1 - ALPHA.

Source: Waudby-Smith, Ramdas, "Estimating means of bounded random variables by betting", Journal of the Royal
Statistical Society B 86(1), 2024: capital of fixed bets, spread over several stakes. Proof for means that change: the
capital on one stake c is a product of 1 - λ(x_i - m) with 0 ≤ λ ≤ 1/(BOUND - m). Divided by the product of
1 - λ(μ_i - m) it is a martingale that starts at 1, and that product is at most exp(-λ Σ(μ_i - m)), which is at most 1
while the mean of the μ is m or more. By Ville's inequality the average over the stakes then exceeds 2/ALPHA at any time
with probability ALPHA/2 at most.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

ALPHA = 0.05
BOUND = 0.5  # of one observation: what lies outside has to be clipped

_STAKES = 0.95 * 2.0 ** -np.arange(6)  # shares of the capital that may be lost by one observation
_ENOUGH = float(np.log(2 / ALPHA))
_HALVINGS = 40  # of the range: the ends are exact to 1e-12

Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Interval:
    """What mean was seen, and where the true one lies."""

    mean: float
    lower: float
    upper: float


def interval(seen: Numbers) -> Interval:
    """After all of `seen`: [observations], one at least. Raises ValueError if one is not in [-BOUND, BOUND]."""
    if not (np.abs(seen) <= BOUND).all():  # NaN is not, either
        raise ValueError(f"an observation lies outside ±{BOUND}")
    return Interval(float(seen.mean()), -_upper(-seen), _upper(seen))


def capital(seen: Numbers, mean: float) -> Numbers:
    """What betting one coin on «below `mean`» has come to after each observation, as logarithm.

    seen: [..., observations] → [..., observations] · -BOUND ≤ mean < BOUND
    """
    return _together(np.cumsum(_growth(seen, mean), axis=-2))


def _growth(seen: Numbers, mean: float) -> Numbers:
    """By which each observation multiplies what is bet on each stake, as logarithm: [..., observations, stakes]."""
    odds: Numbers = 1 - _STAKES + _STAKES * ((BOUND - seen) / (BOUND - mean))[..., None]
    return np.log(odds)


def _together(grown: Numbers) -> Numbers:
    """The capital whose equal shares have grown so: [..., stakes] → [...]."""
    capital: Numbers = np.logaddexp.reduce(grown, axis=-1) - np.log(len(_STAKES))
    return capital


def _upper(seen: Numbers) -> float:
    """The least mean against which the capital is enough; it grows with the mean."""
    low, high = -BOUND, BOUND
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        enough = _together(_growth(seen, middle).sum(axis=-2)) >= _ENOUGH
        low, high = (low, middle) if enough else (middle, high)
    return high
