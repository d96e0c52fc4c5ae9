"""The workload of a measurement: the distributions that it promises, the same again for the same seed."""

from itertools import islice, takewhile

import numpy as np
import pytest

from persona.errors import RequestError
from persona.wording import FIRST, WORDS, Wording
from persona.workload import Range, Request, Workload, requests


def some(count: int, **options: object) -> list[Request]:
    values = {"users": 10, "prompt": Range(8, 16), "reply": Range(4, 4), "rate": 5.0, **options}
    return list(islice(requests(Workload(**values)), count))  # type: ignore[arg-type]


def test_equal_seeds_give_equal_requests_and_others_do_not() -> None:
    assert some(3000) == some(3000)
    assert some(50) != some(50, seed=43)


def test_uniform_popularity_gives_every_user_the_same_share() -> None:
    counts = np.bincount([request.user for request in some(20_000)], minlength=10)
    assert counts.size == 10
    assert abs(counts / 20_000 - 0.1).max() < 0.01


@pytest.mark.parametrize("alpha", [0.2, 0.5, 3.0])
def test_skewed_popularity_is_the_power_function(alpha: float) -> None:
    """P(user < k) = (k / users) ** alpha."""
    users = np.array([request.user for request in some(20_000, alpha=alpha)])
    for k in (1, 3, 5, 9):
        assert abs((users < k).mean() - (k / 10) ** alpha) < 0.015


@pytest.mark.parametrize("cv", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("rate", [0.5, 20.0])
def test_gaps_between_arrivals_have_their_mean_and_variation(rate: float, cv: float) -> None:
    times = np.array([0.0, *(request.at for request in some(40_000, rate=rate, cv=cv))])
    gaps = np.diff(times)
    assert gaps.min() >= 0
    assert abs(gaps.mean() * rate - 1) < 0.06
    assert abs(gaps.std() / gaps.mean() / cv - 1) < 0.1


def test_lengths_fill_their_range_to_both_ends() -> None:
    found = some(2000, prompt=Range(8, 16), reply=Range(4, 4))
    assert {request.prompt for request in found} == set(range(8, 17))
    assert {request.reply for request in found} == {4}


def test_a_closed_loop_has_no_times_and_the_same_users_and_lengths() -> None:
    closed, open_ = some(500, rate=None), some(500)
    assert {request.at for request in closed} == {0.0}
    assert [(r.user, r.prompt, r.reply, r.seed) for r in closed] == [(r.user, r.prompt, r.reply, r.seed) for r in open_]


def test_users_who_take_turns_come_once_each_round() -> None:
    assert [request.user for request in some(25, turns=True)] == [*range(10), *range(10), *range(5)]


def test_a_flood_is_one_further_user_and_leaves_the_others_as_they_were() -> None:
    workload = Workload(10, Range(8, 16), Range(4, 4), rate=5.0, flood=50.0)
    assert (workload.flooder, workload.registered) == (10, 11)
    found = list(takewhile(lambda request: request.at < 60, requests(workload)))
    assert [r.at for r in found] == sorted(r.at for r in found)
    others = [request for request in found if request.user != 10]
    assert others == some(len(others))
    assert abs((len(found) - len(others)) / 60 / 50 - 1) < 0.1
    assert len({request.seed for request in found}) == len(found)


def test_ranges_are_read_as_typed() -> None:
    assert (Range.of("64:256"), Range.of("7")) == (Range(64, 256), Range(7, 7))
    assert str(Range(64, 256)) == "64:256"


@pytest.mark.parametrize("text", ["", ":", "a:b", "-1:5", "0:5", "9:8", "1:2:3", "1e3", "9" * 30])
def test_what_is_no_range_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(RequestError, match="no range of lengths"):
        Range.of(text)


@pytest.mark.parametrize(
    "change",
    [
        {"users": 0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"cv": -1.0},
        {"rate": 0.0},
        {"rate": float("inf")},
        {"flood": -1.0},
        {"flood": 1.0, "rate": None},
        {"seed": -1},
    ],
)
def test_numbers_that_mean_nothing_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(RequestError):
        some(1, **change)


async def characters(text: str) -> int:
    """A tokenizer in whose eyes a word of one letter is one token and others are more, behind a template of 9."""
    return 9 + sum(len(word) for word in text.split())


async def test_a_prompt_has_exactly_the_tokens_that_were_asked_for() -> None:
    wording = await Wording.measure(characters)
    for tokens in (wording.least, wording.least + 1, 500):
        assert await characters(wording.text(tokens, seed=tokens)) == tokens


async def test_prompts_of_other_seeds_have_other_words_and_those_of_equal_seeds_the_same() -> None:
    wording = Wording(5, dict.fromkeys(WORDS, 1))
    assert wording.text(40, 1) == wording.text(40, 1) != wording.text(40, 2)
    assert wording.text(5, 1) == FIRST


async def test_a_prompt_shorter_than_its_template_is_refused_with_what_is_possible() -> None:
    wording = await Wording.measure(characters)
    with pytest.raises(RequestError, match="at least 12 tokens"):
        wording.text(11, seed=1)


async def test_a_tokenizer_without_words_of_one_token_is_refused() -> None:
    async def doubled(text: str) -> int:
        return 2 * len(text)

    with pytest.raises(RequestError, match="No common word"):
        await Wording.measure(doubled)
