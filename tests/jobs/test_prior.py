"""The prior: where a first version starts, and nobody's second."""

from pathlib import Path

import pytest
from histories import TEXT, imported, own
from world import Tell, World

from jobs import prior
from persona.domain import RunState, User
from persona.errors import ConfigurationError, RequestError
from persona.settings import Settings


def named(world: World, folder: Path) -> None:
    learning = world.settings.learning.model_copy(update={"prior": str(folder)})
    world.settings = world.settings.model_copy(update={"learning": learning})


async def test_a_first_version_starts_from_the_prior_and_the_next_from_the_first(
    world: World, ann: User, tell: Tell, tmp_path: Path
) -> None:
    (tmp_path / "prior").mkdir()
    (tmp_path / "prior" / "adapter.safetensors").write_bytes(b"what they have in common")
    named(world, tmp_path / "prior")
    await tell(40)
    first = await world.train(ann)
    assert first.state is RunState.KEPT
    await tell(40)
    assert (await world.train(ann)).state is RunState.KEPT
    starts = [request.start for request in world.engine.trained]
    assert starts[0] is not None
    assert (starts[0].user_id, Path(starts[0].path)) == (0, tmp_path / "prior")
    assert starts[1] is not None
    assert (starts[1].user_id, starts[1].number) == (ann.id, 1)
    versions = {version.number: version.parent for version in await world.adapters.list(ann.id)}
    assert versions == {1: None, 2: 1}


async def test_a_prior_that_is_not_there_stops_the_start(world: World, tmp_path: Path) -> None:
    named(world, tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="nowhere"):
        world.finetune()


def test_each_history_has_an_equal_share_and_only_own_words_are_targets() -> None:
    long, short = own(60), [imported(i, f"short {i} said", [("zoe", "never a target")]) for i in range(1, 4)]
    found = prior.examples([long, short], tokenizer=TEXT, settings=Settings(), tokens=6000)
    spent = {name: sum(len(e.tokens) for e in found if name in TEXT.decode(e.tokens)) for name in ("I say", "said")}
    assert 0 < spent["I say"] <= 3000
    assert spent["said"] > 0
    assert not any("never" in TEXT.decode([e.tokens[t] for t in e.targets]) for e in found)


def test_histories_without_words_are_no_prior() -> None:
    with pytest.raises(RequestError, match="None of these histories"):
        prior.examples([[], []], tokenizer=TEXT, settings=Settings(), tokens=6000)
