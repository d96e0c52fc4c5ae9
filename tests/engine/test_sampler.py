"""The next token: greedy, tempered, narrowed, penalised, and the same again for the same seed."""

import ctypes
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Models
from parts import program
from watched import Operations

from persona.engine import sampler
from persona.engine.kernels import native
from persona.engine.protocol import Sampling
from persona.engine.sampler import Choose, Sampler

WAY: list[Choose] = []  # the last one is asked


@pytest.fixture(scope="module", autouse=True, params=["torch", "compiled"])
def _way(request: pytest.FixtureRequest, models: Models) -> Iterator[None]:
    """Everything here holds for both."""
    if request.param == "torch":
        WAY.append(sampler.in_torch)
    else:
        program("cc")
        code = native.library(models.root / "kernels", torch.float32)
        assert code is not None
        WAY.append(native.Draw(ctypes.CDLL(str(code))))
    yield
    WAY.pop()


def draw(logits: torch.Tensor, samplers: list[Sampler]) -> list[int]:
    return sampler.draw(logits, samplers, WAY[-1])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(50, generator=torch.Generator().manual_seed(1)) * 2


def draws(logits: torch.Tensor, count: int, prompt: list[int] | None = None, **options: Any) -> list[int]:
    """`count` tokens of one sequence, whose model always says the same."""
    one = Sampler(Sampling(**options), prompt or [])
    return [draw(logits.clone()[None], [one])[0] for _ in range(count)]


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
    together = [draw(rows.clone(), samplers) for _ in range(20)]
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


# --- top-k and min-p


@pytest.mark.parametrize("top_k", [1, 2, 7, 50, 10**9])
def test_top_k_draws_from_so_many_of_the_likeliest(logits: torch.Tensor, top_k: int) -> None:
    drawn = draws(logits, 2000, temperature=3.0, top_k=top_k, seed=4)
    assert set(drawn) <= set(logits.argsort(descending=True)[:top_k].tolist())
    assert len(set(drawn)) == min(top_k, 50)


@pytest.mark.parametrize("min_p", [0.01, 0.2, 1.0])
def test_min_p_leaves_what_has_that_share_of_the_likeliest_tokens_probability(
    logits: torch.Tensor, min_p: float
) -> None:
    mass = torch.softmax(logits, -1)
    left = set((mass >= min_p * mass.max()).nonzero().flatten().tolist())
    assert set(draws(logits, 3000, temperature=1.0, min_p=min_p, seed=4)) == left


AROUND = [count + more for count in sampler.FIRST for more in (-1, 0, 1)]


@pytest.mark.parametrize("size", [1, 50, sampler.BLOCK - 1, sampler.BLOCK, sampler.BLOCK + 1, 5 * sampler.BLOCK + 7])
def test_a_draw_from_everything_falls_where_the_chance_falls(size: int) -> None:
    """In the cumulated probabilities, and never on a token that is ruled out."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(size, generator=generator) * 3
    logits[torch.rand(size, generator=generator) < 0.5] = -torch.inf
    logits[size // 2] = 1.0
    mass = torch.softmax(logits.double(), -1).cumsum(-1)
    chances = Sampler(Sampling(temperature=1.0, seed=9))
    for token in draws(logits, 300, temperature=1.0, seed=9):
        chance = chances.chance()
        assert logits[token].isfinite()
        assert (mass[token - 1] if token else 0) - 1e-6 <= chance <= mass[token] + 1e-6


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-53])
def test_the_ends_of_chance_are_tokens_that_may_be_drawn(chance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "chance", lambda self: chance)
    logits = torch.full((3 * sampler.BLOCK,), -torch.inf)
    logits[sampler.BLOCK + 5 : sampler.BLOCK + 9] = torch.tensor([0.0, 0.3, -40.0, -30.0])
    assert set(draws(logits, 3, temperature=1.0, seed=1)) <= {sampler.BLOCK + 5 + place for place in range(4)}


def test_the_nucleus_is_that_of_what_top_k_leaves() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the two that are left the first has 4/7: a nucleus of a half is the first alone.
    assert set(draws(logits, 500, temperature=1.0, top_k=2, top_p=0.5, seed=1)) == {0}
    assert set(draws(logits, 500, temperature=1.0, top_k=2, top_p=0.6, seed=1)) == {0, 1}
    assert set(draws(logits, 500, temperature=1.0, top_p=0.5, seed=1)) == {0, 1}


@pytest.mark.parametrize("size", [*AROUND, 3 * sampler.FIRST[-1]])
@pytest.mark.parametrize(
    "wishes",
    [
        {"top_p": 0.2},
        {"top_p": 0.99},
        *({"top_p": 0.5, "top_k": count} for count in AROUND),
        {"min_p": 0.999},
        {"min_p": 0.01, "top_p": 0.9},
    ],
    ids=str,
)
def test_what_is_kept_may_be_short_or_long(size: int, wishes: dict[str, Any]) -> None:
    """A nearly even distribution, whose tokens from `kept` on are never drawn."""
    logits = torch.linspace(0.05, 0, size)
    mass = torch.softmax(logits, -1).double()
    mass[mass < mass[0] * wishes.get("min_p", 0.0)] = 0
    mass[wishes.get("top_k", size) :] = 0
    kept = int((mass.cumsum(-1) - mass < wishes.get("top_p", 1.0) * mass.sum()).logical_and(mass > 0).sum())
    drawn = draws(logits, 400, temperature=1.0, seed=2, **wishes)
    assert max(drawn) < kept + 2  # one more where sums round otherwise
    assert max(drawn) > kept * 0.95 - 2
    assert min(drawn) < kept * 0.05 + 2


def test_narrowing_a_draw_keeps_the_proportions_of_what_is_left(logits: torch.Tensor) -> None:
    best = logits.argsort(descending=True)[:5]
    counts = Counter(draws(logits, 4000, temperature=1.0, top_k=5, seed=2))
    mass = torch.softmax(logits[best], -1)
    assert all(abs(counts[int(t)] / 4000 - float(m)) < 0.04 for t, m in zip(best, mass, strict=True))


# --- penalties and biases


def slow(logits: torch.Tensor, said: list[int], prompt: list[int], sampling: Sampling) -> torch.Tensor:
    """The definition, token by token."""
    changed = logits.clone().double()
    for token in range(len(logits)):
        count = said.count(token)
        if count or token in prompt:
            by = sampling.repetition_penalty
            changed[token] = changed[token] / by if changed[token] > 0 else changed[token] * by
        changed[token] -= count * sampling.frequency_penalty + (count > 0) * sampling.presence_penalty
    for token, value in sampling.logit_bias:
        changed[token] += value
    return changed


@given(
    said=st.lists(st.integers(0, 49), max_size=150),
    prompt=st.lists(st.integers(0, 49), max_size=60),
    frequency=st.sampled_from([0.0, -2.0, 0.5]),
    presence=st.sampled_from([0.0, -1.0, 1.5]),
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    bias=st.dictionaries(st.integers(0, 49), st.floats(-100, 100, width=32), max_size=5),
)
def test_penalties_and_biases_are_those_of_the_definition(
    said: list[int], prompt: list[int], frequency: float, presence: float, repetition: float, bias: dict[int, float]
) -> None:
    sampling = Sampling(
        frequency_penalty=frequency,
        presence_penalty=presence,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
    )
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 3
    one, plain = Sampler(sampling, prompt), Sampler(Sampling())
    for token in said:
        one.took(token)
    rows = torch.stack([logits, logits, logits.neg()])
    draw(rows, [plain, one, plain])
    assert torch.allclose(rows[1].double(), slow(logits, said, prompt, sampling), atol=1e-4)
    assert torch.equal(rows[0], logits)
    assert torch.equal(rows[2], -logits)


def test_a_frequency_penalty_grows_with_every_time_and_a_presence_penalty_does_not() -> None:
    logits = torch.tensor([3.0, 2.0, 0.0])
    assert draws(logits, 6, frequency_penalty=0.4) == [0, 0, 0, 1, 0, 1]
    assert draws(logits, 6, presence_penalty=1.5) == [0, 1, 0, 0, 0, 0]


def test_frequency_and_presence_leave_the_prompt_alone_and_repetition_does_not() -> None:
    logits = torch.tensor([3.0, 2.0, 0.0])
    assert draws(logits, 1, [0, 0, 0], frequency_penalty=2.0, presence_penalty=2.0) == [0]
    assert draws(logits, 1, [0], repetition_penalty=2.0) == [1]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 5}])
def test_a_bias_forces_a_token_and_forbids_another(logits: torch.Tensor, options: dict[str, float]) -> None:
    best = int(logits.argmax())
    assert set(draws(logits, 50, logit_bias=((17, 100.0),), seed=1, **options)) == {17}
    assert best not in draws(logits, 50, logit_bias=((best, -100.0),), seed=1, **options)


# --- a row among others

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 3},
    {"temperature": 1.3, "top_p": 0.8, "seed": 4},
    {"temperature": 1.0, "top_k": 9, "min_p": 0.02, "seed": 5},
    {"frequency_penalty": 0.7, "presence_penalty": 0.3},
    {"temperature": 1.1, "repetition_penalty": 1.4, "seed": 6},
    {"temperature": 0.8, "top_k": 3, "logit_bias": ((4, 3.0), (9, -100.0)), "seed": 7},
]


@given(st.permutations(range(len(KINDS))), st.integers(1, len(KINDS)), st.sampled_from([50, 3000]))
def test_a_row_is_drawn_as_alone_whatever_kinds_stand_beside_it(order: list[int], size: int, vocab: int) -> None:
    rows = torch.randn(len(KINDS), vocab, generator=torch.Generator().manual_seed(8)) * 2
    rows[::2] /= 8  # nearly even: where a draw is narrowed, more are left than it looks at first
    chosen = order[:size]
    alone = {kind: draws(rows[kind], 12, [1, 2, 3], **KINDS[kind]) for kind in chosen}
    samplers = [Sampler(Sampling(**KINDS[kind]), [1, 2, 3]) for kind in chosen]
    together = [draw(rows[chosen], samplers) for _ in range(12)]
    assert {kind: [tokens[place] for tokens in together] for place, kind in enumerate(chosen)} == alone


def operations(kinds: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Of a draw in torch, without those by which it sees whether logits are finite."""
    samplers = [Sampler(Sampling(**kind), [1, 2, 3]) for kind in kinds]
    rows = torch.randn(len(kinds), 5000)
    for one in samplers:
        one.took(7)
    with Operations() as check:
        rows.amax(-1).isfinite()
    with Operations() as mode:
        sampler.draw(rows, samplers, sampler.in_torch)
    start = mode.seen.index(check.seen[0])
    assert mode.seen[start : start + len(check.seen)] == check.seen
    return mode.seen[:start] + mode.seen[start + len(check.seen) :]


def test_greedy_rows_that_ask_for_nothing_cost_one_argmax() -> None:
    assert operations([{}] * 8) == [("aten::argmax", 8)]


@pytest.mark.parametrize("kind", [{"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}])
def test_rows_that_all_draw_are_neither_copied_nor_searched_for_the_likeliest(kind: dict[str, Any]) -> None:
    whole = [name for name, size in operations([kind] * 4) if size == 4 * 5000]
    assert whole[0] != "aten::index"
    assert "aten::argmax" not in {name for name, _ in operations([kind] * 4)}


def test_the_number_of_operations_does_not_grow_with_the_rows() -> None:
    few, many = operations(KINDS), operations(KINDS * 9)
    assert [name for name, _ in few] == [name for name, _ in many]


def test_rows_that_ask_for_nothing_cost_nothing_beside_one_that_does() -> None:
    alone, beside = operations([KINDS[5], {}]), operations([KINDS[5], *[{}] * 20])
    assert [seen for seen in beside if seen[0] != "aten::argmax"] == [s for s in alone if s[0] != "aten::argmax"]


def test_penalties_touch_the_tokens_that_were_said_and_no_others() -> None:
    touched = operations([{"frequency_penalty": 1.0, "repetition_penalty": 1.2}])
    assert max(size for name, size in touched if name != "aten::argmax") <= 4


# --- logits that are none


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_a_row_without_a_largest_logit_gets_no_token_and_its_neighbours_theirs(
    logits: torch.Tensor, kind: dict[str, Any], broken: float
) -> None:
    rows = torch.stack([logits, logits, logits])
    rows[1, :] = broken
    rows[2, 7] = math.nan
    found = draw(rows.clone(), [Sampler(Sampling(seed=1, **kind)) for _ in range(3)])
    assert found[1:] == [sampler.NOT_FINITE] * 2
    assert found[0] == draws(logits, 1, seed=1, **kind)[0]


@given(
    vocab=st.sampled_from([1, 15, 16, 17, 127, 128, 129, 1000, 5000]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    ruled_out=st.sampled_from([0.0, 0.5, 0.99]),
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 3.0, 1e30]),
    top_k=st.sampled_from([0, 1, 5, 64, 900]),
    top_p=st.sampled_from([1.0, 0.999, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_token_is_where_the_definition_has_it(
    vocab: int, spread: float, ruled_out: float, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """Sums are rounded, so a chance that falls near the border of two tokens may have either."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=generator) * spread
    logits[torch.rand(vocab, generator=generator) < ruled_out] = -torch.inf
    logits[seed % vocab] = 1.0
    wishes = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    token = draw(logits.clone()[None], [Sampler(wishes)])[0]
    if temperature == 0:
        assert logits[token] == logits.max()
        return
    chance = Sampler(wishes).chance()
    mass = torch.softmax(logits.double() / temperature, -1)
    likeliest = mass.argsort(descending=True, stable=True)
    ordered = mass[likeliest]
    ordered[ordered < ordered[0] * min_p * (1 - 1e-6)] = 0
    if top_k:
        ordered[top_k:] = 0
    whole = mass.sum() if not top_k and not min_p else ordered.sum()
    ordered[ordered.cumsum(-1) - ordered > whole * top_p + 1e-6] = 0
    place = likeliest.tolist().index(token)
    assert mass[token] > 0
    assert ordered[place] > 0 or bool((mass == mass[token]).sum() > 1)
    if top_k or top_p < 1 or min_p:
        if (mass == mass[token]).sum() == 1:
            ends = ordered.cumsum(-1) / ordered.sum()
            assert (ends[place - 1] if place else 0) - 1e-4 <= chance <= ends[place] + 1e-4
    else:
        ends = mass.cumsum(-1)
        assert (ends[token - 1] if token else 0) - 1e-5 <= chance <= ends[token] + 1e-5
