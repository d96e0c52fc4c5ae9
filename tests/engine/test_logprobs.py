"""What is told of tokens: the model's own numbers, each beside the text that it belongs to."""

from pathlib import Path

import adapters
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Models
from plain import logits, some_tokens
from workbench import Bench

from persona.engine import logprobs
from persona.engine.logprobs import Margin
from persona.engine.protocol import Piece, Scores, TokenLogprob

CLOSE = 0.1  # products of one row and of many round differently in bf16


@pytest.fixture
def bench(models: Models) -> Bench:
    return Bench(models)


def told(bench: Bench, job: int) -> list[TokenLogprob]:
    return [one for answer in bench.answers[job] if isinstance(answer, Piece) for one in answer.chunk.logprobs]


def plainly(bench: Bench, prompt: list[int], found: list[TokenLogprob]) -> torch.Tensor:
    """[tokens, vocab]: what the plain model says where those tokens were generated."""
    whole = logits(bench.decoder, prompt + [one.token for one in found])
    return whole.log_softmax(-1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("weights", ["int4", "none"])
def test_what_is_told_is_what_the_plain_model_says(models: Models, weights: str) -> None:
    bench, prompt = Bench(models, weights=weights), some_tokens(30)
    job = bench.generate(prompt, count=16, logprobs=4)
    bench.finish()
    found = told(bench, job)
    wanted = plainly(bench, prompt, found)
    assert len(found) == 16
    for row, one in zip(wanted, found, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=CLOSE)
        assert one.top[0] == (one.token, one.logprob)
        assert [value for _, value in one.top] == pytest.approx(row.topk(4).values.tolist(), abs=CLOSE)


def test_the_models_own_numbers_are_told_whatever_sampling_does_to_them(bench: Bench) -> None:
    prompt = some_tokens(30)
    wishes = {"temperature": 1.5, "top_k": 40, "repetition_penalty": 1.5, "logit_bias": ((9, 5.0),), "seed": 3}
    job = bench.generate(prompt, count=16, logprobs=0, **wishes)
    bench.finish()
    found = told(bench, job)
    wanted = plainly(bench, prompt, found)[range(16), [one.token for one in found]]
    assert [one.logprob for one in found] == pytest.approx(wanted.tolist(), abs=CLOSE)
    assert all(one.top == [] for one in found)


def test_each_row_is_told_as_much_as_it_asked_for(bench: Bench, tmp_path: Path) -> None:
    ref = adapters.sparse(tmp_path, bench.shape, bench.prepared.base, user=1, number=1)
    jobs = [bench.generate(some_tokens(9, seed=top or 0), ref, 5, logprobs=top) for top in (None, 0, 2, 20)]
    bench.finish()
    assert told(bench, jobs[0]) == []
    for job, top in zip(jobs[1:], (0, 2, 20), strict=True):
        assert [len(one.top) for one in told(bench, job)] == [top] * 5


def test_a_reply_is_the_same_with_and_without(bench: Bench) -> None:
    wishes = {"temperature": 1.0, "seed": 5, "frequency_penalty": 1.0}
    assert bench.alone(some_tokens(9), **wishes) == bench.alone(some_tokens(9), **wishes, logprobs=5)


def test_every_piece_of_text_has_its_own_tokens_beside_it(bench: Bench) -> None:
    job = bench.generate(some_tokens(9), count=40, temperature=2.0, seed=11, logprobs=0)
    bench.finish()
    text = bench.loop._text
    spelled = b"".join(text.piece(one.token) for one in told(bench, job))
    assert spelled.decode(errors="replace") == bench.text(job)
    for answer in bench.answers[job]:
        assert isinstance(answer, Piece)
        begins = b"".join(text.piece(one.token) for one in answer.chunk.logprobs)
        assert begins.decode(errors="replace") == answer.chunk.text


@pytest.mark.parametrize("tell", [False, True])
def test_of_the_token_that_ends_a_text_is_told_who_wants_it(models: Models, tell: bool) -> None:
    """lm-evaluation-harness asks for one token after a prompt, and drops what is told of the last."""
    plain = Bench(models)
    job = plain.generate(some_tokens(9), count=6, logprobs=0)
    plain.finish()
    wanted = [one.token for one in told(plain, job)]
    ended = Bench(models, eos=frozenset({wanted[3]}))
    job = ended.generate(some_tokens(9), count=6, logprobs=1, tell_end=tell)
    ended.finish()
    assert ended.end(job) == "stop"
    assert [one.token for one in told(ended, job)] == wanted[: 4 if tell else 3]


def test_nothing_is_told_of_what_a_stop_string_cut_off(bench: Bench) -> None:
    whole = bench.alone(some_tokens(9), None, 12)
    job = bench.generate(some_tokens(9), count=12, stop=(whole[5:8],), logprobs=0)
    bench.finish()
    assert bench.end(job) == "stop"
    shown, spelled = bench.text(job), b"".join(bench.loop._text.piece(one.token) for one in told(bench, job))
    assert spelled.decode(errors="replace").startswith(shown)
    assert len(told(bench, job)) < 12


@given(st.lists(st.integers(0, 3), max_size=12), st.randoms())
def test_a_margin_gives_every_token_once_and_with_its_first_character(sizes: list[int], chance: object) -> None:
    margin, given_out, written, shown = Margin(), [], 0, 0
    for token, size in enumerate(sizes):
        margin.add(TokenLogprob(token, -1.0), size)
        written += size
        step = chance.randint(0, written - shown)  # type: ignore[attr-defined]
        shown += step
        given_out += [one.token for one in margin.show(step)]
        begins = [sum(sizes[:place]) for place in range(token + 1)]
        assert given_out == [place for place, begin in enumerate(begins) if begin < shown]
    assert given_out + [one.token for one in margin.rest()] == list(range(len(sizes)))
    assert margin.rest() == []


@pytest.mark.parametrize("length", [2, 63, 64, 65, 150])
def test_a_scored_prompt_position_is_what_the_plain_model_says(bench: Bench, length: int) -> None:
    tokens = some_tokens(length)
    job = bench.tell(tokens, 5)
    bench.finish()
    (answer,) = bench.answers[job]
    assert isinstance(answer, Scores)
    whole = logits(bench.decoder, tokens).log_softmax(-1)[:-1]
    assert [one.token for one in answer.told] == tokens[1:]
    assert [one.logprob for one in answer.told] == answer.logprobs
    wanted = whole[range(length - 1), tokens[1:]]
    off = (torch.tensor(answer.logprobs) - wanted).abs()
    assert off.mean() < CLOSE
    assert off.max() < 4 * CLOSE
    top = torch.tensor([[value for _, value in one.top] for one in answer.told])
    assert (top - whole.topk(5).values).abs().mean() < CLOSE


def test_a_reply_scored_as_a_prompt_gets_the_numbers_that_it_had(bench: Bench) -> None:
    prompt = some_tokens(20)
    job = bench.generate(prompt, count=12, logprobs=0)
    bench.finish()
    said = told(bench, job)
    again = bench.score(prompt + [one.token for one in said], targets=list(range(20, 32)))
    bench.finish()
    assert bench.scores(again) == pytest.approx([one.logprob for one in said], abs=CLOSE)


def test_more_alternatives_than_tokens_are_all_tokens() -> None:
    (one,) = logprobs.of(torch.zeros(1, 3), [1], [20])
    assert len(one.top) == 3
    assert one.logprob == pytest.approx(-1.0986, abs=1e-4)
