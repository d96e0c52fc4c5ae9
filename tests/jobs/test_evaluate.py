"""The gate: what it asks the engine, and what it says to the answers."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from histories import DAWN, TEXT, entry, learning, own

from jobs import dataset, evaluate
from jobs.dataset import Dataset
from jobs.evaluate import Verdict
from jobs.rehearsal import Rehearsal
from persona.domain import EntryId, Origin, Role, UserId, Version, VersionState
from persona.engine.protocol import ScoreRequest
from persona.engine.scripted import ScriptedEngine
from persona.errors import AdapterError
from persona.settings import Settings

Score = Callable[[ScoreRequest], list[float]]
Make = Callable[[int, int], Version]


@pytest.fixture
def version(tmp_path: Path) -> Make:
    """`version(number, watermark)`: a version whose file exists."""

    def make(number: int, watermark: int) -> Version:
        folder, content = tmp_path / str(number), b"weights %d" % number
        folder.mkdir()
        (folder / "adapter.safetensors").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        state, mark = VersionState.CANDIDATE, EntryId(watermark)
        return Version(UserId(1), number, state, mark, None, "base", str(folder), sha256, len(content), DAWN)

    return make


def settings(**changes: Any) -> Settings:
    return Settings.model_validate({"learning": learning(**changes).model_dump(), "home": "/nowhere"})


def data(count: int = 40) -> Dataset:
    made = dataset.build(own(count), tokenizer=TEXT, settings=learning())
    assert isinstance(made, Dataset)
    return made


async def judge(
    engine: ScriptedEngine,
    candidate: Version,
    serving: Version | None = None,
    *,
    made: Dataset | None = None,
    **more: Any,
) -> Verdict:
    made, wanted = made or data(), settings(**more)
    gate = evaluate.Gate(
        engine,
        TEXT,
        serving=serving,
        held_out=made.held_out,
        recent=made.recent,
        rehearsal=Rehearsal(engine, TEXT, wanted, lambda: "base"),
        settings=wanted,
    )
    return await gate.verdict(candidate)


def per_version(scores: dict[int, float]) -> Score:
    """A constant log-probability for each version; 0 is the base."""
    return lambda request: [scores[request.adapter.number if request.adapter else 0]] * len(request.targets)


def on_answers(request: ScoreRequest) -> bool:
    """Whether the reference set is scored: its target is in the assistant's role, token 258."""
    return request.tokens[request.targets[0] - 1] == 258


async def test_a_better_candidate_is_kept(version: Make) -> None:
    verdict = await judge(ScriptedEngine(score=per_version({0: -2.0, 1: -1.9})), version(1, 37))
    assert verdict.keep
    assert verdict.p_better == 1.0
    assert (verdict.loss_before, verdict.loss_after) == (pytest.approx(2.0), pytest.approx(1.9))
    assert verdict.messages == 3
    assert verdict.tokens == 3 * 17  # 16 bytes and the end of turn


async def test_threat_10_a_worse_candidate_is_rejected(version: Make) -> None:
    verdict = await judge(ScriptedEngine(score=per_version({0: -2.0, 1: -2.1})), version(1, 37))
    assert not verdict.keep
    assert verdict.p_better == 0.0
    assert verdict.reason.startswith("Not surely better: 2.000 → 2.100")


async def test_an_equal_candidate_is_rejected(version: Make) -> None:
    assert not (await judge(ScriptedEngine(), version(1, 37))).keep


async def test_the_serving_version_is_the_measure_and_the_base_that_of_drift(version: Make) -> None:
    def score(request: ScoreRequest) -> list[float]:
        number = request.adapter.number if request.adapter else 0
        losses = {0: 1.0, 1: 1.5, 2: 1.004} if on_answers(request) else {0: 3.0, 1: 1.0, 2: 1.1}
        return [-losses[number]] * len(request.targets)

    serving, candidate = version(1, 20), version(2, 37)
    against = await judge(ScriptedEngine(score=score), candidate, serving)
    assert not against.keep
    assert against.loss_before == pytest.approx(1.0)
    assert against.drift == pytest.approx(0.004)
    assert (await judge(ScriptedEngine(score=score), candidate, None)).keep


@pytest.mark.parametrize(
    ("drift", "keep"), [(0.0, True), (-0.2, True), (0.0099, True), (0.011, False), (math.nan, False)]
)
async def test_threat_10_a_candidate_that_unlearned_to_answer_is_rejected(
    version: Make, drift: float, keep: bool
) -> None:
    def score(request: ScoreRequest) -> list[float]:
        if request.adapter is None:
            return [-2.0] * len(request.targets)
        return [-2.0 * (1 + drift) if on_answers(request) else -1.0] * len(request.targets)

    verdict = await judge(ScriptedEngine(score=score), version(1, 37))
    assert verdict.keep is keep


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("where", ["words", "answers"])
async def test_threat_09_scores_that_are_not_finite_are_rejected(version: Make, bad: float, where: str) -> None:
    def score(request: ScoreRequest) -> list[float]:
        scores = [-1.0 if request.adapter else -2.0] * len(request.targets)
        if request.adapter and (where == "answers") is on_answers(request):
            scores[-1] = bad
        return scores

    verdict = await judge(ScriptedEngine(score=score), version(1, 37))
    assert not verdict.keep
    json.dumps(verdict.metrics(), allow_nan=False)


async def test_a_corrupt_candidate_is_an_error_by_name(version: Make) -> None:
    candidate = version(1, 37)
    Path(candidate.path, "adapter.safetensors").write_bytes(b"flipped")
    with pytest.raises(AdapterError):
        await judge(ScriptedEngine(), candidate)


async def test_only_the_users_own_words_are_scored(version: Make) -> None:
    engine = ScriptedEngine(score=per_version({0: -2.0, 1: -1.0}))
    made = data()
    await judge(engine, version(1, 37), made=made)
    words = [request for request in engine.scored if not on_answers(request)]
    said = [TEXT.decode([request.tokens[i] for i in request.targets]) for request in words]
    assert said == [message.text for message in made.held_out] * 2
    assert all(request.tokens[request.targets[-1]] == TEXT.END for request in words)


async def test_each_side_is_shown_what_it_has_not_absorbed(version: Make) -> None:
    engine = ScriptedEngine(score=per_version({1: -1.0, 2: -1.0, 0: -1.0}))
    await judge(engine, version(2, 37), version(1, 30), made=data())
    prompts: dict[int, list[int]] = {1: [], 2: []}
    for request in engine.scored:
        if request.adapter and not on_answers(request):
            prompts[request.adapter.number].append(TEXT.decode(request.tokens).count('user: "I say'))
    assert prompts[2] == [0, 1, 2]  # held-out messages that came before, one by one
    assert prompts[1] == [7, 8, 9]  # and entries 31 to 37


async def test_a_messages_own_conversation_is_context_and_not_quoted(version: Make) -> None:
    talk = [
        entry(41, "first question of mine", conversation="x"),
        entry(42, "an answer", Role.ASSISTANT, Origin.REPLY, conversation="x", parent=41),
        entry(43, "second question of mine", conversation="x", parent=42),
    ]
    made = dataset.build([*own(40), *talk], tokenizer=TEXT, settings=learning())
    assert isinstance(made, Dataset)
    engine = ScriptedEngine()
    await judge(engine, version(1, 39), made=made)
    last = next(r for r in engine.scored if TEXT.decode(r.tokens).endswith("second question of mine"))
    shown = TEXT.decode(last.tokens)
    assert shown.count("first question of mine") == shown.count("an answer") == 1
    assert 'user: "first' not in shown


@pytest.mark.parametrize("absorbed", [1, 50])
async def test_the_same_words_are_scored_on_both_sides_however_short_the_context_is(
    version: Make, absorbed: int
) -> None:
    made, wanted, engine = data(60), settings(), ScriptedEngine()
    gate = evaluate.Gate(
        engine,
        TEXT,
        serving=version(1, absorbed),
        held_out=made.held_out,
        recent=made.recent,
        rehearsal=Rehearsal(engine, TEXT, wanted, lambda: "base"),
        settings=wanted,
        context=600,
    )
    await gate.verdict(version(2, 57))
    scored: dict[int, list[int]] = {1: [], 2: []}
    for request in engine.scored:
        if request.adapter and request.targets and not on_answers(request):
            assert len(request.tokens) <= 600
            scored[request.adapter.number].append(len(request.targets))
    assert scored[1] == scored[2]
    assert "lately" in TEXT.decode(engine.scored[0].tokens)


async def test_what_the_gate_scores_is_bounded_however_much_is_held_out(version: Make) -> None:
    entries = own(2000)
    for count in (20, 100, 400):
        asked = learning(held_out_messages=count)
        made = dataset.build(entries, tokenizer=TEXT, settings=asked)
        assert isinstance(made, Dataset)
        engine = ScriptedEngine()
        await judge(engine, version(count, 1), made=made, held_out_messages=count)
        words = [request for request in engine.scored if not on_answers(request)]
        fixed = len(settings().prompt.system) + 40
        assert sum(len(request.tokens) for request in words) <= 2 * (evaluate.SCORED_TOKENS + count * fixed)


def test_probabilities_come_from_the_messages_not_their_number() -> None:
    sure, unsure = np.full(20, 0.1), np.array([10.0] + [-0.4] * 19)
    assert evaluate.better(sure) == 1.0
    assert 0.3 < evaluate.better(unsure) < 0.8
    assert evaluate.better(-sure) == 0.0
    assert evaluate.better(np.zeros(20)) == 0.0


def test_the_same_scores_give_the_same_probability() -> None:
    gain = np.sin(np.arange(30.0))
    assert evaluate.better(gain) == evaluate.better(gain)


def test_the_reference_set_is_ours_neutral_and_short() -> None:
    items = evaluate.reference()
    assert len(items) == 20
    assert len({ask for ask, _ in items}) == 20
    assert all(40 < len(answer) < 300 for _, answer in items)
