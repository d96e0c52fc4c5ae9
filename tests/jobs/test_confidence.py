"""The confidence sequence: looked at after every observation, it is seldom wrong, and it decides in good time."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.confidence import ALPHA, BOUND, Numbers, capital, interval

USERS, MESSAGES = 600, 500
ENOUGH = math.log(2 / ALPHA)
Draw = Callable[[np.random.Generator, tuple[int, int]], Numbers]

# Gains of messages whose expectation is zero.
NULLS: dict[str, Draw] = {
    "narrow": lambda rng, shape: rng.normal(0, 0.02, shape),
    "usual": lambda rng, shape: rng.normal(0, 0.15, shape),
    "wide": lambda rng, shape: rng.normal(0, 0.6, shape),
    "coins": lambda rng, shape: rng.choice([-BOUND, BOUND], shape),
    "heavy tails": lambda rng, shape: 0.1 * rng.standard_t(1.5, shape),
    "many small losses, few large gains": lambda rng, shape: np.where(rng.random(shape) < 0.02, 0.49, -0.01),
}


def drawn(draw: Draw, seed: int = 1) -> Numbers:
    return np.clip(draw(np.random.default_rng(seed), (USERS, MESSAGES)), -BOUND, BOUND)


@pytest.mark.parametrize("name", NULLS)
def test_threat_10_without_a_difference_a_look_after_every_message_raises_few_false_alarms(name: str) -> None:
    seen = drawn(NULLS[name])
    worse = (capital(seen, 0.0) >= ENOUGH).any(axis=-1)
    better = (capital(-seen, 0.0) >= ENOUGH).any(axis=-1)
    tolerance = 3 * math.sqrt(ALPHA / USERS)
    assert worse.mean() <= ALPHA / 2 + tolerance
    assert (worse | better).mean() <= ALPHA + tolerance


def test_losses_that_earlier_gains_outweigh_raise_few_alarms() -> None:
    seen = drawn(lambda rng, shape: rng.normal(0, 0.1, shape) + 0.2 * np.sin(np.arange(shape[1]) / 20))
    assert (capital(seen, 0.0) >= ENOUGH).any(axis=-1).mean() <= ALPHA / 2


@pytest.mark.parametrize(
    ("mean", "deviation", "within"), [(-1.0, 0.5, 12), (-0.3, 0.3, 30), (-0.1, 0.1, 50), (-0.05, 0.1, 110)]
)
def test_a_loss_is_found_within_a_sensible_number_of_messages(mean: float, deviation: float, within: int) -> None:
    seen = drawn(lambda rng, shape: rng.normal(mean, deviation, shape))
    found = (capital(seen, 0.0) >= ENOUGH)[:, :within].any(axis=-1)
    assert found.mean() >= 0.9


@pytest.mark.parametrize("true", [-0.3, 0.0, 0.02, 0.4])
def test_a_mean_that_stays_lies_in_the_interval(true: float) -> None:
    rng = np.random.default_rng(2)
    outside = 0
    for _ in range(200):
        seen = np.where(rng.random(120) < (true + BOUND) / (2 * BOUND), BOUND, -BOUND)
        found = interval(seen)
        assert found.lower <= found.mean <= found.upper
        outside += not found.lower <= true <= found.upper
    assert outside / 200 <= ALPHA + 0.03


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-BOUND, BOUND), min_size=1, max_size=80))
def test_the_upper_end_is_below_zero_just_when_the_capital_is_enough(values: list[float]) -> None:
    seen = np.array(values)
    found, mirrored = interval(seen), interval(-seen)
    assert -BOUND <= found.lower <= found.upper <= BOUND
    assert (found.lower, found.upper) == pytest.approx((-mirrored.upper, -mirrored.lower), abs=1e-9)
    reached = capital(seen, 0.0)[-1]
    if abs(reached - ENOUGH) > 1e-6:
        assert (found.upper < 0) == (reached >= ENOUGH)


def test_one_observation_says_next_to_nothing_and_many_say_much() -> None:
    one, many = interval(np.array([-BOUND])), interval(np.full(1000, -0.1))
    assert one.upper > 0.4
    assert -0.1 < many.upper < -0.09


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, BOUND + 1e-9])
def test_what_was_not_clipped_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        interval(np.array([0.1, value]))
