"""Scores of many sequences at once: what each one alone gets, beside serving, and never across adapters."""

from pathlib import Path

import adapters
import pytest
import torch
from models import Models
from plain import logits, some_tokens
from workbench import Bench

from persona.engine import branches, protocol
from persona.engine.protocol import AdapterRef, Failed, ScoreRequest

LONG = some_tokens(90, seed=5)


def requests(adapter: AdapterRef | None = None) -> list[ScoreRequest]:
    """Many messages under one long beginning, one without it, one that ends where another begins to differ."""
    made = [[*LONG, *some_tokens(7, seed=seed)] for seed in range(6)]
    made += [some_tokens(20, seed=9), LONG[:40], [*LONG[:40], *some_tokens(5, seed=8)]]
    return [ScoreRequest(tokens, list(range(len(tokens) - 4, len(tokens))), adapter) for tokens in made]


def alone(bench: Bench, request: ScoreRequest) -> list[float]:
    job = bench.score(request.tokens, request.adapter, request.targets)
    bench.finish()
    return bench.scores(job)


def together(bench: Bench, some: list[ScoreRequest]) -> list[list[float]]:
    job = bench.score_all(some)
    bench.finish()
    answer = bench.answers[job][-1]
    assert isinstance(answer, protocol.AllScores)
    return answer.logprobs


@pytest.mark.parametrize("size", [16, 100, 500])
def test_scores_are_those_of_the_whole_model(models: Models, size: int) -> None:
    decoder = models.decoder("qwen3", "none")
    wanted = [(request.tokens, request.targets, None) for request in requests()]
    slices = branches.scores(decoder, wanted, size)
    try:
        while True:
            next(slices)
    except StopIteration as ended:
        found = ended.value
    for (tokens, targets, _), values in zip(wanted, found, strict=True):
        table = logits(decoder, tokens).log_softmax(-1)
        expected = [float(table[target - 1, tokens[target]]) for target in targets]
        assert values == pytest.approx(expected, abs=0.02 if decoder.dtype is torch.bfloat16 else 1e-4)


def test_each_request_has_its_own_adapter(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, weights="none")  # int4 computes few rows in bf16 and many in the base's own type
    one = adapters.sparse(tmp_path / "one", bench.shape, bench.prepared.base, user=1)
    two = adapters.sparse(tmp_path / "two", bench.shape, bench.prepared.base, user=2)
    some = [*requests(one), *requests(None), *requests(two), *requests(one)]
    found = together(bench, some)
    assert all(
        values == pytest.approx(alone(bench, request), abs=0.05) for values, request in zip(found, some, strict=True)
    )
    count = len(requests())
    assert found[:count] == found[3 * count :]
    assert found[0] != pytest.approx(found[2 * count], abs=0.05)


@pytest.mark.parametrize("prefill", [16, 160])
def test_a_shared_beginning_is_computed_once(models: Models, prefill: int) -> None:
    """Counted in slices: half a layer each, over as many tokens as a prefill has, however long the beginning is."""
    bench, halves = Bench(models, prefill=prefill), 4
    some = [ScoreRequest([*LONG, 7 + i, 8], [91]) for i in range(50)]
    together(bench, some)
    chunks = -(-(len(LONG) + 50) // (prefill - 1))  # a row is spare
    heads = -(-50 // prefill) + 1  # the 50 questions stand at the end of the forest
    assert bench.health().slices <= chunks * halves + 2 * heads + 1


def test_an_aborted_scoring_leaves_and_the_next_one_is_done(models: Models) -> None:
    bench = Bench(models)
    first, second = bench.score_all(requests()), bench.score_all(requests()[:1])
    bench.loop.work()
    bench.abort(first)
    bench.finish()
    assert isinstance(bench.answers[first][-1], Failed)
    assert isinstance(bench.answers[second][-1], protocol.AllScores)


def test_replies_go_on_between_slices_of_scoring(models: Models) -> None:
    bench = Bench(models)
    scoring, chat = bench.score_all(requests() * 20), bench.generate(some_tokens(5), count=8)
    while not any(isinstance(a, protocol.Piece) and a.chunk.finish for a in bench.answers.get(chat, [])):
        bench.loop.work()
    assert scoring not in bench.answers
    bench.finish()
    assert isinstance(bench.answers[scoring][-1], protocol.AllScores)


def test_beside_a_cpu_heads_that_share_keys_are_written_out() -> None:
    """By a device without numbers: which kernels torch has for a mask and shared heads differs."""
    q, k, mask = torch.empty(5, 6, 8), torch.empty(9, 2, 8), torch.ones(5, 9, dtype=torch.bool)
    found = branches.attended(*(part.to("meta") for part in (q, k, k, mask)))
    assert (found.shape, found.device.type) == (branches.attended(q, k, k, mask).shape, "meta")
