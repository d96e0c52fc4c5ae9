"""When a loss says that a run is lost, and when it only speaks of few words."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.course import WORDS, Course


def course(*steps: tuple[float, float]) -> Course:
    """After steps of (nats a word, words)."""
    found = Course()
    for loss, words in steps:
        found = found.after(loss * words, words)
    return found


def test_a_step_of_few_words_explodes_nothing() -> None:
    """From a real run: three words of 11 nats each in the fourth step, and all went well afterwards."""
    assert not course((3.3, 16), (4.9, 62), (5.0, 33), (11.1, 3)).exploded
    assert not course((0.1, 3), (4.0, 70), (4.0, 70), (4.0, 70)).exploded  # three easy words came first


@pytest.mark.parametrize("words", [20, 80, 400])
def test_a_loss_that_stays_far_above_the_first_is_an_explosion(words: float) -> None:
    sound = [(3.0, words)] * 10
    assert not course(*sound).exploded
    assert course(*sound, *[(20.0, words)] * 8).exploded


@given(st.lists(st.tuples(st.floats(0.01, 12.0), st.floats(1, 600)), min_size=1))
def test_a_loss_is_a_mean_of_what_was_told_and_old_words_fade(steps: list[tuple[float, float]]) -> None:
    found = course(*steps)
    assert min(loss for loss, _ in steps) - 1e-9 <= found.loss <= max(loss for loss, _ in steps) + 1e-9
    assert found.words <= max(WORDS, steps[-1][1]) + 1e-6
    assert math.isinf(found.first) or found.words >= WORDS - 1e-6


def test_a_step_that_tells_nothing_changes_nothing() -> None:
    before = course((3.0, 100))
    assert before.after(math.nan, 10) == before.after(math.inf, 10) == before.after(0.0, 0) == before
