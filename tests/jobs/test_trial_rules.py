"""What the instrument promises whatever the model learns, on an engine that says what it is told."""

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from histories import DAWN, TEXT
from world import World

from jobs import plans, summary
from jobs.people import Person
from jobs.rehearsal import Rehearsal
from jobs.rounds import Ground
from jobs.trial import Context, Options, Result, Trial
from persona import prompt
from persona.domain import Line
from persona.engine.protocol import AdapterRef, ScoreRequest, TrainRequest
from persona.errors import RequestError
from storage.history import ImportItem

RECENT = (Context("recent", 400),)
FOUND = (Context("found", 400),)
WORDS = ("north", "south", "east", "west", "home", "away", "over", "under")


def trial(world: World, **more: object) -> Trial:
    rehearsal = Rehearsal(world.engine, TEXT, world.settings, lambda: world.base)
    parts = (world.settings, world.users, world.history, world.engine, TEXT, rehearsal, world.settings.adapters)
    return Trial(Ground(*parts, **more))  # type: ignore[arg-type]


def person(name: str, texts: list[str]) -> Person:
    asked = (Line("zoe", "where is the fox now"),)
    return Person(name, tuple(ImportItem(t, DAWN + timedelta(minutes=i), None, asked) for i, t in enumerate(texts)))


def said(count: int, word: str = "fox") -> list[str]:
    """So many different messages."""
    return [f"the {word} is {WORDS[i % 8]} of {WORDS[i // 8 % 8]} by {WORDS[i // 64]}" for i in range(count)]


async def begin_anew(world: World, context: int) -> None:
    """Nobody is there, and the engine reads so many tokens."""
    for user in await world.users.all():
        await world.users.forget(user.id)
    engine = world.settings.engine.model_copy(update={"context": context})
    world.settings = world.settings.model_copy(update={"engine": engine})


async def test_a_context_that_leaves_a_message_no_room_is_refused_before_anybody_learns(world: World) -> None:
    some = [person("ann", said(40)), person("bob", [*said(39, "dog"), "a long last word " * 12])]
    options = Options(rounds=1, contexts=RECENT, probes=0)
    await begin_anew(world, 512)
    with pytest.raises(
        RequestError, match=r"quotes 400 tokens .* engine.context is 512: raise it, or .*shorter"
    ) as told:
        await trial(world).run(some, options)
    assert (world.engine.trained, world.engine.scored) == ([], [])
    wanted = int(re.findall(r"may have (\d+)", told.value.message)[0])
    await begin_anew(world, wanted - 1)
    with pytest.raises(RequestError, match=f"engine.context is {wanted - 1}"):
        await trial(world).run(some, options)
    await begin_anew(world, wanted)
    results = await trial(world).run(some, options)
    assert max(results[1].lengths) > 200
    assert max(len(request.tokens) for request in world.engine.scored) <= wanted
    for result in results:
        assert all(min(values) > 0 for values in result.nats.values())


async def test_search_looks_among_what_the_trial_uses_and_nowhere_else(world: World) -> None:
    """Hundred older and shorter messages answer better, and are none of this history."""
    old, new = said(100, "fox"), [f"{text}, and later it was told to everybody here" for text in said(40, "fox")]
    own = sum(len(text) for text in new)
    (result,) = await trial(world).run(
        [person("ann", old + new)], Options(tokens=own, rounds=1, contexts=FOUND, probes=0, gate=False)
    )
    prompts = [TEXT.decode(request.tokens) for request in world.engine.scored[: 2 * len(result.lengths)]]
    quoting = [text.partition(prompt.FOUND)[2] for text in prompts if prompt.FOUND in text]
    assert len(quoting) == len(result.lengths)
    for text in quoting:
        lines = re.findall(r'user: "(.*)"', text)
        assert len(lines) >= 3
        assert all("later" in line for line in lines)


async def test_a_long_quotation_of_what_search_finds_is_full(world: World) -> None:
    await begin_anew(world, 8192)
    options = Options(rounds=1, contexts=(Context("found", 6000),), probes=0, gate=False)
    (result,) = await trial(world).run([person("ann", said(200))], options)
    prompts = [TEXT.decode(request.tokens) for request in world.engine.scored[: 2 * len(result.lengths)]]
    line = len('2026-03-01\nuser: "the fox is north of south by under"\n')
    assert max(text.count('user: "') for text in prompts) > 0.9 * 6000 / line


async def test_each_step_of_each_round_is_told_while_somebody_learns(world: World) -> None:
    told: list[tuple[str, int, int]] = []
    made = trial(world, notify=lambda *what: told.append(what))
    await made.run([person("ann", said(60))], Options(rounds=2, contexts=RECENT, probes=0))
    learning = [(what, done, total) for what, done, total in told if "learns" in what]
    steps = [(0, 1), (1, 3), (2, 3), (3, 3), (3, 3)]
    assert learning == [(f"ann learns, round {number} of 2", *step) for number in (1, 2) for step in steps]


async def test_the_seed_is_that_of_every_training(world: World) -> None:
    await trial(world).run([person("ann", said(60))], Options(rounds=2, contexts=RECENT, probes=0, seed=3))
    assert [request.plan.seed for request in world.engine.trained] == [3, 3]


async def test_the_curve_has_prior_and_another_persons_adapter_of_the_same_round(
    world: World, prior: AdapterRef
) -> None:
    world.engine.predicts = lambda request: (
        [-float(request.adapter.number if request.adapter else 9)] * len(request.targets)
    )
    some = [person("ann", said(60)), person("bob", said(80, "dog"))]
    options = Options(rounds=2, contexts=RECENT, probes=0, gate=False)
    results = await trial(world, prior=prior).run(some, options)
    found = [[(point["adapter"], point["wrong_user"], point["prior"]) for point in one.curve] for one in results]
    numbered = [[(30, 40, 0), (60, 80, 0)], [(40, 30, 0), (80, 60, 0)]]  # by entries, two candidates for each
    assert found == [[(2 * own, 2 * wrong, 0) for own, wrong, _ in one] for one in numbered]
    await begin_anew(world, 4096)
    alone = await trial(world).run([person("eve", said(60))], Options(rounds=1, contexts=RECENT, probes=0))
    assert set(alone[0].curve[0]) == {"tokens", "base", "context", "adapter", "adapter_context"}


def costing(world: World, too_much: Callable[[AdapterRef], bool]) -> None:
    """The assistant pays for these adapters what no gate allows; everybody's own words are likelier under any."""

    def predicts(request: ScoreRequest) -> list[float]:
        if "fox is" in TEXT.decode(request.tokens):
            return [-1.0 if request.adapter else -2.0] * len(request.targets)
        return [-2.5 if request.adapter and too_much(request.adapter) else -2.0] * len(request.targets)

    world.engine.predicts = predicts


async def learned(
    world: World, *, rounds: int = 2, gate: bool = True, prior: AdapterRef | None = None
) -> tuple[Result, list[TrainRequest]]:
    options = Options(rounds=rounds, contexts=RECENT, probes=0, gate=gate)
    (result,) = await trial(world, prior=prior).run([person("ann", said(80))], options)
    return result, world.engine.trained


def taught(request: TrainRequest) -> str:
    return "\n".join(TEXT.decode(example.tokens) for example in request.examples)


@pytest.fixture
def prior(tmp_path: Path) -> AdapterRef:
    folder = tmp_path / "prior"
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(b"what they have in common")
    return plans.folder(folder)


def half(adapter: AdapterRef | None) -> bool:
    return adapter is not None and adapter.path.endswith("half")


async def test_what_costs_the_assistant_too_much_is_kept_by_half(world: World) -> None:
    costing(world, lambda adapter: not half(adapter))
    result, (_, second) = await learned(world)
    assert result.kept == ["half", "half"]
    assert half(second.start)
    assert result.reference["adapter"] == result.reference["base"]
    assert result.loss("adapter") < result.loss("base")


async def test_where_half_costs_too_much_what_was_there_stays_and_the_next_round_learns_both(world: World) -> None:
    costing(world, lambda adapter: adapter.number < 2 * 80)
    result, (first, second) = await learned(world)
    assert result.kept == ["nothing", "whole"]
    assert second.start is None
    assert all(text in taught(second) for text in said(80)[:40])
    assert not all(text in taught(first) for text in said(80)[:40])  # the newest of them were held out
    assert result.curve[0]["tokens"] == 0
    assert result.curve[0]["adapter"] == result.loss("base") == result.loss("stale")
    assert result.own_tokens > sum(len(text) for text in said(40))


async def test_a_person_of_whom_nothing_is_kept_has_the_base(world: World) -> None:
    costing(world, lambda adapter: True)
    result, _ = await learned(world)
    assert (result.kept, result.own_tokens, result.bytes) == (["nothing", "nothing"], 0, 0)
    assert result.nats["adapter"] == result.nats["base"]
    assert summary.summary([result])["kept"] == {"whole": 0, "half": 0, "nothing": 2}


async def test_without_a_gate_whatever_was_trained_is_measured(world: World) -> None:
    costing(world, lambda adapter: True)
    result, (_, second) = await learned(world, gate=False)
    assert result.kept == ["whole", "whole"]
    assert second.start is not None
    assert not half(second.start)
    assert result.reference["adapter"] > result.reference["base"]


async def test_a_round_that_is_not_kept_takes_nothing_of_the_ones_before(world: World) -> None:
    lost = 80 * 2 // 3
    costing(world, lambda adapter: adapter.number // 2 == lost)
    result, (first, second, third) = await learned(world, rounds=3)
    assert result.kept == ["whole", "nothing", "whole"]
    assert first.start is None
    assert second.start is not None
    assert second.start == third.start
    assert set(taught(second).splitlines()) <= set(taught(third).splitlines())
    assert said(80)[0] in taught(first)
    assert said(80)[0] not in taught(third)  # it is absorbed
    tokens = [point["tokens"] for point in result.curve]
    assert 0 < tokens[0] == tokens[1] < tokens[2] == result.own_tokens
    assert result.curve[1]["adapter"] < result.loss("base")
    assert result.bytes > 0
    tested = said(80)[-len(result.lengths) :]
    assert tested
    assert not any(text in taught(request) for request in (first, second, third) for text in tested)


async def test_where_nothing_is_kept_a_prior_serves_if_the_gate_lets_it(world: World, prior: AdapterRef) -> None:
    costing(world, lambda adapter: adapter != prior)
    result, (first, second) = await learned(world, prior=prior)
    assert result.kept == ["nothing", "nothing"]
    assert first.start == second.start == prior
    assert result.nats["adapter"] == result.nats["prior"] != result.nats["base"]
    assert (result.own_tokens, result.bytes) == (0, 0)
    await begin_anew(world, 4096)
    costing(world, lambda adapter: True)
    result, trained = await learned(world, prior=prior)
    assert {request.start for request in trained} == {prior}
    assert result.nats["adapter"] == result.nats["base"] != result.nats["prior"]


async def test_who_has_no_adapter_of_their_own_is_nobodys_other(world: World) -> None:
    seen: list[int] = []  # in the order in which they learn

    def bobs(adapter: AdapterRef) -> bool:
        if adapter.user_id not in seen:
            seen.append(adapter.user_id)
        return seen.index(adapter.user_id) == 1

    costing(world, bobs)
    some = [person(name, said(60)) for name in ("ann", "bob", "eve")]
    ann, bob, eve = await trial(world).run(some, Options(rounds=1, contexts=RECENT, probes=2))
    assert [one.kept for one in (ann, bob, eve)] == [["whole"], ["nothing"], ["whole"]]
    for one in (ann, bob, eve):
        assert {"wrong_user", "wrong_user_context"} <= one.nats.keys(), "the next who has one"
    assert bob.nats["adapter"] != bob.nats["wrong_user"]
    assert ["author" in one.recognised for one in (ann, bob, eve)] == [True, False, True]


async def test_where_nobody_else_has_an_adapter_there_is_no_wrong_one(world: World) -> None:
    seen: list[int] = []

    def all_but_the_first(adapter: AdapterRef) -> bool:
        if adapter.user_id not in seen:
            seen.append(adapter.user_id)
        return seen.index(adapter.user_id) > 0

    costing(world, all_but_the_first)
    some = [person(name, said(60)) for name in ("ann", "bob", "eve")]
    ann, bob, eve = await trial(world).run(some, Options(rounds=1, contexts=RECENT, probes=0))
    assert [one.kept for one in (ann, bob, eve)] == [["whole"], ["nothing"], ["nothing"]]
    assert ["wrong_user" in one.nats for one in (ann, bob, eve)] == [False, True, True]
