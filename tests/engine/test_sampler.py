"""The next token: greedy, tempered, from a nucleus, and the same again for the same seed."""

import math
from collections import Counter

import pytest
import torch

from persona.engine import sampler
from persona.engine.protocol import Sampling
from persona.engine.sampler import Sampler


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2


def draws(logits: torch.Tensor, count: int, **options: float) -> list[int]:
    one = Sampler(Sampling(**options))  # type: ignore[arg-type]
    return [one.draw(logits) for _ in range(count)]


@pytest.mark.parametrize("options", [{}, {"temperature": -1.0}, {"temperature": 1.0, "top_p": 0.0}])
def test_without_temperature_or_nucleus_the_likeliest_token_is_taken(
    logits: torch.Tensor, options: dict[str, float]
) -> None:
    assert draws(logits, 5, **options) == [int(logits.argmax())] * 5


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e-4, math.nan])
def test_a_temperature_near_zero_is_greedy_and_never_fails(logits: torch.Tensor, temperature: float) -> None:
    assert draws(logits, 5, temperature=temperature) == [int(logits.argmax())] * 5


@pytest.mark.parametrize("temperature", [2.0, 1e30, math.inf])
def test_a_high_temperature_draws_from_everything(logits: torch.Tensor, temperature: float) -> None:
    assert len(set(draws(logits * 0, 400, temperature=temperature, seed=1))) > 40


def test_equal_seeds_draw_equally_and_others_do_not(logits: torch.Tensor) -> None:
    assert draws(logits, 30, temperature=1.0, seed=5) == draws(logits, 30, temperature=1.0, seed=5)
    assert draws(logits, 30, temperature=1.0, seed=5) != draws(logits, 30, temperature=1.0, seed=6)


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1])
def test_any_seed_of_64_bits_is_taken(logits: torch.Tensor, seed: int) -> None:
    assert draws(logits, 3, temperature=1.0, seed=seed) == draws(logits, 3, temperature=1.0, seed=seed)


def test_a_seeded_row_draws_the_same_whoever_stands_beside_it(logits: torch.Tensor) -> None:
    alone = draws(logits, 20, temperature=0.9, top_p=0.9, seed=3)
    rows = torch.stack([logits.flip(0), logits, logits * 0.1])
    samplers = [Sampler(Sampling(temperature=t, seed=3)) for t in (1.0, 0.9, 0.0)]
    samplers[1] = Sampler(Sampling(temperature=0.9, top_p=0.9, seed=3))
    together = [sampler.draw(rows, samplers) for _ in range(20)]
    assert [tokens[1] for tokens in together] == alone
    assert {tokens[2] for tokens in together} == {int(logits.argmax())}


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_the_nucleus_is_the_smallest_set_with_that_mass(logits: torch.Tensor, top_p: float) -> None:
    mass = torch.softmax(logits, -1)
    order = mass.argsort(descending=True)
    size = int((mass[order].cumsum(-1) < top_p).sum()) + 1
    drawn = set(draws(logits, 3000, temperature=1.0, top_p=top_p, seed=9))
    assert drawn <= set(order[:size].tolist())
    assert int(order[0]) in drawn


def test_draws_follow_the_probabilities(logits: torch.Tensor) -> None:
    counts = Counter(draws(logits, 4000, temperature=0.7, seed=2))
    mass = torch.softmax(logits / 0.7, -1)
    assert max(abs(counts[token] / 4000 - float(mass[token])) for token in range(50)) < 0.04
