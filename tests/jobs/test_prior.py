"""The prior: where a first version starts, and nobody's second."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from histories import DAWN, TEXT, imported, learning, own
from world import Tell, World

from jobs import plans, prior
from jobs.people import Person
from persona.domain import EntryId, Role, Run, RunState, User
from persona.engine import adapter_file
from persona.engine.protocol import ScoreRequest
from persona.errors import ConfigurationError, RequestError
from persona.settings import Settings
from storage.history import ImportItem

COMMON = b"what they have in common"


def named(world: World, folder: Path) -> None:
    learning = world.settings.learning.model_copy(update={"prior": str(folder)})
    world.settings = world.settings.model_copy(update={"learning": learning})


@pytest.fixture
def prior_folder(world: World, tmp_path: Path) -> Path:
    """A prior that the settings name."""
    folder = tmp_path / "prior"
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(COMMON)
    named(world, folder)
    return folder


def assert_ended(run: Run, state: RunState, begins: str, holds: str = "") -> None:
    """That the run ended so, and its reason."""
    assert run.state is state
    assert run.reason is not None
    assert run.reason.startswith(begins)
    assert holds in run.reason


def losing(own: float, prior: float, answers: float = 2.0, half: float = 2.2) -> Callable[[ScoreRequest], list[float]]:
    """Losses of what was trained, of half of it, of the prior and of the base, which has 2; on answers what was trained
    has `answers`."""

    def score(request: ScoreRequest) -> list[float]:
        neutral, loss = request.tokens[request.targets[0] - 1] == 258, 2.0
        if request.adapter:
            content = Path(request.adapter.path, "adapter.safetensors").read_bytes()
            loss = prior if content == COMMON else half if content.endswith(b" by half") else own
            neutral_loss = 2.0 if content == COMMON or content.endswith(b" by half") else answers
            loss = neutral_loss if neutral else loss
        return [-loss] * len(request.targets)

    return score


async def test_a_first_version_starts_from_the_prior_and_the_next_from_the_first(
    world: World, ann: User, tell: Tell, prior_folder: Path
) -> None:
    world.engine.predicts = losing(own=1.8, prior=1.9)
    await tell(40)
    first = await world.train(ann)
    assert first.state is RunState.KEPT
    await tell(40)
    world.engine.predicts = lambda request: [-1.0] * len(request.targets)
    await world.train(ann)
    starts = [request.start for request in world.engine.trained]
    assert starts[0] is not None
    assert (starts[0].user_id, Path(starts[0].path)) == (0, prior_folder)
    assert starts[1] is not None
    assert (starts[1].user_id, starts[1].number) == (ann.id, 1)
    versions = {version.number: version.parent for version in await world.adapters.list(ann.id)}
    assert versions == {1: None, 2: None, 3: 1, 4: 1}  # the second run's, whole and half, are no better


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ({"own": 1.9, "prior": 1.8}, "What was trained: Better: 2.000 → 1.900"),
        ({"own": 2.1, "prior": 1.8}, "What was trained: Not surely better: 2.000 → 2.100"),
        ({"own": 1.7, "prior": 1.8, "answers": 2.1}, "What was trained: Drift 5.00%"),
    ],
)
async def test_a_prior_that_training_made_worse_serves_itself(
    world: World, ann: User, tell: Tell, prior_folder: Path, losses: dict[str, float], why: str
) -> None:
    world.engine.predicts = losing(**losses)
    await tell(40)
    run = await world.train(ann)
    assert_ended(run, RunState.KEPT, "The prior serves. Better: 2.000 → 1.800", why)
    version = await world.adapters.active(ann.id)
    assert version is not None
    assert (version.watermark, version.parent) == (0, None)
    assert (Path(version.path) / "adapter.safetensors").read_bytes() == COMMON
    assert world.folders() == [f"{ann.id}/{version.number}"]


async def test_behind_a_prior_that_serves_the_next_run_starts_from_it_on_the_whole_history(
    world: World, ann: User, tell: Tell, prior_folder: Path
) -> None:
    world.engine.predicts = losing(own=1.9, prior=1.8)
    await tell(40)
    await world.train(ann)
    world.engine.predicts = losing(own=1.7, prior=1.8)
    await tell(20)
    run = await world.train(ann)
    assert (run.state, run.version) == (RunState.KEPT, 3)
    assert world.engine.trained[1].start == world.engine.trained[0].start
    assert world.engine.trained[1].plan.learning_rate == world.settings.learning.warm_rate
    assert {row.entry_id for row in await world.runs.examples(run.id)} == set(range(1, 58))


async def test_an_entry_that_is_deleted_does_not_take_the_prior_away(
    world: World, ann: User, tell: Tell, prior_folder: Path
) -> None:
    world.engine.predicts = losing(own=1.9, prior=1.8)
    await tell(40)
    await world.train(ann)
    await world.history.delete(ann.id, EntryId(5))
    version = await world.adapters.active(ann.id)
    assert version is not None
    assert version.number == 2


async def test_a_prior_that_is_refused_leaves_what_served(
    world: World, ann: User, tell: Tell, prior_folder: Path
) -> None:
    world.engine.predicts = losing(own=2.1, prior=2.2)
    await tell(40)
    run = await world.train(ann)
    assert_ended(run, RunState.REJECTED, "Not surely better: 2.000 → 2.100")
    assert world.folders() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda file: file.unlink(), "cannot be read"), (lambda file: file.write_bytes(b""), "changed")],
)
async def test_a_prior_that_goes_while_the_service_runs_ends_the_run_only(
    world: World, ann: User, tell: Tell, prior_folder: Path, change: Callable[[Path], None], said: str
) -> None:
    finetune = world.finetune()
    change(prior_folder / "adapter.safetensors")
    await tell(40)
    run = await finetune.run(await world.runs.request(ann.id, world.clock()))
    assert_ended(run, RunState.FAILED, "The prior", said)
    assert world.folders() == []


async def test_a_prior_that_is_not_there_stops_the_start(world: World, tmp_path: Path) -> None:
    named(world, tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="nowhere"):
        world.finetune()


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        ("base", {}, None),
        ("another", {}, "another base: make one for this base"),
        ("base", {"rank": 4}, "another form"),
        ("base", {"alpha": 1.0}, "another form"),
        ("base", {"layers": 0.5}, "another form"),
    ],
)
def test_a_prior_that_nobody_could_start_from_stops_the_start(
    tmp_path: Path, base: str, change: dict[str, object], said: str | None
) -> None:
    header = adapter_file.Header("sparse", "base", first=1, layers=9, rank=2, alpha=4.0)
    adapter_file.write(tmp_path, header, {"qkv.A": np.zeros((9, 2, 4), np.float32)})
    wanted = learning(prior=str(tmp_path), **{"rank": 2, "alpha": 4.0, "layers": 0.9, **change})
    if said is None:
        plans.check_prior(wanted, base)
        return
    with pytest.raises(ConfigurationError, match=said):
        plans.check_prior(wanted, base)


def test_a_prior_that_is_no_adapter_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"no adapter")
    with pytest.raises(ConfigurationError, match="cannot be used: The file is not"):
        plans.check_prior(learning(prior=str(tmp_path)), "base")


def test_each_history_has_an_equal_share_and_only_own_words_are_targets() -> None:
    long, short = own(60), [imported(i, f"short {i} said", [("zoe", "never a target")]) for i in range(1, 4)]
    found = prior.examples([long, short], tokenizer=TEXT, settings=Settings(), tokens=6000)
    spent = {name: sum(len(e.tokens) for e in found if name in TEXT.decode(e.tokens)) for name in ("I say", "said")}
    assert 0 < spent["I say"] <= 3000
    assert spent["said"] > 0
    assert not any("never" in TEXT.decode([e.tokens[t] for t in e.targets]) for e in found)


async def test_a_prior_is_trained_twice_over_whatever_a_users_run_is(world: World, tmp_path: Path) -> None:
    some = prior.examples([own(60)], tokenizer=TEXT, settings=world.settings, tokens=6000)
    rehearsal = world.finetune().rehearsal
    assert [step async for step in prior.train(world.engine, rehearsal, some, world.settings, tmp_path)]
    plan = world.engine.trained[0].plan
    assert (plan.passes, plan.max_tokens) == (2, 0)
    assert world.settings.learning.passes == 1


def test_histories_without_words_are_no_prior() -> None:
    with pytest.raises(RequestError, match="None of these histories"):
        prior.examples([[], []], tokenizer=TEXT, settings=Settings(), tokens=6000)


def wrote(name: str, *texts: str, role: Role = Role.USER) -> Person:
    return Person(name, tuple(ImportItem(text, DAWN, role=role) for text in texts))


def told(*names: str, of: str) -> list[str]:
    return [f"{name} tells of {of} what nobody else has told" for name in names]


def test_who_made_a_prior_is_known_by_name_and_by_what_they_wrote(tmp_path: Path) -> None:
    eve = wrote("eve", "yes", *told("I", "She", "He", "It", of="the sea"))
    prior.write_people(tmp_path, [eve, wrote("zoe", "a few words of hers")], "salt")
    made_by = prior.read_people(tmp_path)
    assert made_by is not None
    renamed = wrote("dora", *(f" {item.text.replace(' ', '  ')}\n" for item in eve.items[:2]), *told("We", of="a hill"))
    grown = wrote("eve", *told("I", of="another year"))
    other = wrote("ann", "yes", *told("I", "She", of="the shore"))
    quoting = wrote("bob", *told("I", of="the sea"), *told(*map(str, range(19)), of="the lake"))
    answered = wrote("kim", *told("I", of="the sea"), role=Role.ASSISTANT)
    assert made_by.among([renamed, grown, other, quoting, answered]) == ["dora", "eve"]


def test_nobody_is_named_or_quoted_beside_a_prior_and_the_salt_makes_it_another(tmp_path: Path) -> None:
    contents = []
    for salt in ("one", "two"):
        prior.write_people(tmp_path, [wrote("eve", *told("I", of="the sea"))], salt)
        contents.append((tmp_path / prior.MADE_BY).read_bytes())
        assert b"eve" not in contents[-1]
        assert b"sea" not in contents[-1]
    first, second = (json.loads(content) for content in contents)
    assert not set(first["names"] + first["messages"]) & set(second["names"] + second["messages"])


def test_a_prior_may_not_say_by_whom_it_was_made_but_not_say_it_wrongly(tmp_path: Path) -> None:
    assert prior.read_people(tmp_path) is None
    for content in (b"", b"[]", b'{"salt": "s", "names": [1], "messages": []}', b"\xff"):
        (tmp_path / prior.MADE_BY).write_bytes(content)
        with pytest.raises(ConfigurationError, match=r"people\.json cannot be read"):
            prior.read_people(tmp_path)
