"""The instrument on a real small engine: everybody learns their own words, and what is tested was never trained on."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import people as files
import pytest
from models import Models

from jobs import people, plans, prior, summary
from jobs.rounds import Ground
from jobs.trial import Context, Options, Trial
from persona.app_private import Private, private
from persona.domain import EntryId
from persona.engine.protocol import ScoreRequest, TrainRequest
from persona.errors import RequestError
from persona.settings import Settings
from storage.history import History
from storage.users import Users

CONTEXTS = (Context("recent", 256), Context("found", 256), Context("recent", 400))
LEARNING = {
    "held_out_messages": 6,
    "held_out_tokens": 30,
    "min_aged_tokens": 20,
    "learning_rate": 0.02,
    "warm_rate": 0.02,
    "passes": 4,
}
SETTINGS = {
    "model": {"device": "cpu"},
    "engine": {"context": 1024, "memory_mb": 64, "threads": 1},
    "learning": LEARNING,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
async def parts(models: Models) -> AsyncIterator[Private]:
    async with private(Settings.model_validate(SETTINGS), models.prepared()) as made:
        yield made


def trial(parts: Private, **more: object) -> Trial:
    users, history = Users(parts.database), History(parts.database)
    folder = parts.settings.adapters
    fixed = parts.settings, users, history, parts.engine, parts.tokenizer, parts.rehearsal, folder
    return Trial(Ground(*fixed, **more))  # type: ignore[arg-type]


async def test_everybody_is_better_served_by_their_own_adapter(parts: Private, tmp_path: Path) -> None:
    some = people.read(files.write(tmp_path / "all.jsonl", count=80))
    told: list[str] = []
    made = trial(parts, notify=lambda what, done, total: told.append(what))
    results = await made.run(some, Options(rounds=2, contexts=CONTEXTS, probes=4, gate=False))
    assert [result.name for result in results] == ["ann", "bob", "eve"]
    for result in results:
        assert result.loss("adapter") < result.loss("base") - 0.2
        assert result.loss("adapter") < result.loss("wrong_user") - 0.2
        assert result.chosen in ("context_recent_256", "context_found_256")
        assert result.nats["context"] == result.nats[result.chosen]
        assert all(len(values) == len(result.lengths) >= 6 for values in result.nats.values())
        assert [point["tokens"] for point in result.curve] == sorted(point["tokens"] for point in result.curve)
        assert len(result.curve) == 2
        assert 0 < result.bytes < 1_000_000
        assert set(result.reference) == {"base", "adapter"}
        recognised = {"next_of_10_base", "next_of_10_adapter", "author", "author_together", "over_each_other"}
        assert set(result.recognised) == recognised
        assert all(0 <= result.recognised[name] <= 1 for name in recognised)
        assert result.recognised["next_of_10_adapter"] == 1.0  # nobody else writes with these words
        assert result.recognised["author_together"] == result.recognised["over_each_other"] == 1.0
        sides = {f"{side}{quoting}" for side in ("adapter", "stale", "wrong_user") for quoting in ("", "_context")}
        sides |= {f"{side}_served" for side in ("base", "adapter", "stale")}
        assert set(result.nats) == {"base", "context", *sides, *(context.name for context in CONTEXTS)}
        assert result.nats["stale"] != result.nats["adapter"]
    said = summary.summary(results)
    assert set(said["recognised"]) == recognised
    assert said["adapter_context_over_stale_context"]["people"] == 3
    assert said["adapter_context_over_wrong_user_context"]["better"] == 1.0
    assert said["adapter_served_over_base_served"]["better"] == 1.0
    assert "bob learns, round 2 of 2" in told


class Watched:
    """An engine that remembers what trained and what was scored."""

    def __init__(self, engine: object) -> None:
        self._engine = engine
        self.trained: list[TrainRequest] = []
        self.scored: list[ScoreRequest] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def train(self, request: TrainRequest) -> object:
        self.trained.append(request)
        return self._engine.train(request)  # type: ignore[attr-defined]

    async def score_all(self, requests: list[ScoreRequest]) -> object:
        self.scored += requests
        return await self._engine.score_all(requests)  # type: ignore[attr-defined]


async def test_nothing_that_is_tested_was_trained_on_and_each_prompt_ends_before_its_message(
    parts: Private, tmp_path: Path
) -> None:
    some = people.read(files.write(tmp_path / "all.jsonl", count=40, people=("ann",)))
    marked = [item.__class__(f"{item.text} end{i:02}", item.ts, item.id) for i, item in enumerate(some[0].items)]
    watched = Watched(parts.engine)
    made = trial(replace(parts, engine=watched))  # type: ignore[type-var]
    options = Options(rounds=1, contexts=CONTEXTS, probes=0, gate=False)
    (result,) = await made.run([people.Person("ann", tuple(marked))], options)
    trained = "\n".join(parts.tokenizer.decode(e.tokens) for request in watched.trained for e in request.examples)
    count = len(result.lengths)
    assert "end33" in trained
    assert not any(f"end{i:02}" in trained for i in range(40 - count, 40))
    prompts = [parts.tokenizer.decode(request.tokens) for request in watched.scored[: 4 * count]]
    for place in range(count):
        number = 40 - count + place
        for prompt in prompts[place::count]:
            assert f"end{number:02}" in prompt
            assert not any(f"end{later:02}" in prompt for later in range(number + 1, 40))
    assert any(f"end{40 - count - 1:02}" in prompt for prompt in prompts[count : 2 * count])  # recent history is quoted


async def test_a_version_is_quoted_as_served_what_it_has_not_absorbed(parts: Private, tmp_path: Path) -> None:
    some = people.read(files.write(tmp_path / "all.jsonl", count=30, people=("ann",)))
    marked = [item.__class__(f"{item.text[:20]} end{i:02}", item.ts, item.id) for i, item in enumerate(some[0].items)]
    watched, limits = Watched(parts.engine), parts.settings.prompt.model_copy(update={"recent_tokens": 3000})
    settings = parts.settings.model_copy(update={"prompt": limits})
    made = trial(replace(parts, engine=watched, settings=settings))  # type: ignore[type-var]
    options = Options(rounds=2, contexts=CONTEXTS[:1], probes=0, gate=False)
    (result,) = await made.run([people.Person("ann", tuple(marked))], options)
    count = len(result.lengths)
    last = next(one for one in watched.scored if f"end{30 - count:02}" in parts.tokenizer.decode(one.tokens))
    at, order = watched.scored.index(last), [name for name in result.nats if name != "context"]

    def shown(name: str, message: int) -> set[int]:
        """The messages that stand in the prompt of one, itself included."""
        one = watched.scored[at + order.index(name) * count + message]
        return {i for i in range(30) if f"end{i:02}" in parts.tokenizer.decode(one.tokens)}

    assert shown("adapter", count - 1) == {29}
    assert shown("adapter_served", count - 1) == set(range(30 - count, 30))
    assert shown("adapter_served", 0) == {30 - count}
    assert min(shown("stale_served", 0)) == 15 - count
    assert min(shown("base_served", 0)) < 15 - count


async def test_a_prior_is_where_everybody_starts_and_what_they_are_compared_with(
    parts: Private, tmp_path: Path
) -> None:
    file = files.write(tmp_path / "all.jsonl", count=60)
    history, users = History(parts.database), Users(parts.database)
    other = await users.add("eve")
    items = people.read(file, only=["eve"])[0].items
    await history.import_(other.id, items, count=len, now=items[-1].ts)
    entries = await history.recent(other.id, EntryId(0), exclude=(), limit=100)
    examples = prior.examples([entries], tokenizer=parts.tokenizer, settings=parts.settings, tokens=20_000)
    folder = tmp_path / "prior"
    folder.mkdir()
    steps = [step async for step in prior.train(parts.engine, parts.rehearsal, examples, parts.settings, folder)]
    assert steps[-1].done
    results = await trial(parts, prior=plans.folder(folder)).run(
        people.read(file, without=["eve"]), Options(rounds=1, contexts=CONTEXTS, probes=0, gate=False)
    )
    for result in results:
        assert result.loss("adapter") < result.loss("prior")
        assert result.nats["prior"] != result.nats["base"]


async def test_only_the_newest_tokens_are_used_when_told(parts: Private, tmp_path: Path) -> None:
    some = people.read(files.write(tmp_path / "all.jsonl", count=80, people=("ann",)))
    (whole,) = await trial(parts).run(some, Options(None, 1, CONTEXTS, 0, gate=False))
    assert whole.own_tokens > 400
    await Users(parts.database).forget((await Users(parts.database).all())[0].id)
    parts.settings.adapters.rename(tmp_path / "whole")
    (part,) = await trial(parts).run(some, Options(400, 1, CONTEXTS, 0, gate=False))
    assert 200 < part.own_tokens < 400
    assert part.lengths == whole.lengths


async def test_a_short_history_is_told_by_name(parts: Private, tmp_path: Path) -> None:
    some = people.read(files.write(tmp_path / "all.jsonl", count=5, people=("ann",)))
    with pytest.raises(RequestError, match="history of ann is too short"):
        await trial(parts).run(some, Options(rounds=1, contexts=CONTEXTS, probes=0))


def test_no_context_is_no_trial() -> None:
    with pytest.raises(RequestError, match="at least one context"):
        Options(contexts=())
