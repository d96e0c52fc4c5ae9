"""Deleting an entry deletes every version that absorbed it, itself or through an ancestor."""

import asyncio
from pathlib import Path

import pytest

from persona.domain import Frame, VersionState
from persona.errors import NotFound
from storage.runs import ExampleRow


async def test_a_version_that_absorbed_the_entry_is_deleted_with_its_files(place, make, history, adapters, ann):
    entry = (await place("secret")).tail
    version = await make(ann.id, (entry,))
    assert await history.delete(ann.id, entry) == (1,)
    assert (await adapters.get(ann.id, 1)).state == VersionState.DELETED
    assert not Path(version.path).exists()
    assert await adapters.active(ann.id) is None
    with pytest.raises(NotFound):
        await adapters.rollback(ann.id, 1)
    with pytest.raises(NotFound):
        await adapters.point(ann.id, 1)


async def test_descendants_go_too_and_the_newest_clean_version_serves(place, make, history, adapters, ann):
    one = (await place("one")).tail
    secret = (await place("secret")).tail
    three = (await place("three")).tail
    await make(ann.id, (one,))  # 1: clean
    await make(ann.id, (secret,), parent=1)  # 2: holds it
    await make(ann.id, (three,), parent=2)  # 3: child of 2
    await make(ann.id, (three,), parent=1)  # 4: clean
    await make(ann.id, (three,), parent=3)  # 5: grandchild of 2
    assert await history.delete(ann.id, secret) == (2, 3, 5)
    assert [version.state for version in await adapters.list(ann.id)] == [
        VersionState.PUBLISHED,
        VersionState.DELETED,
        VersionState.DELETED,
        VersionState.PUBLISHED,
        VersionState.DELETED,
    ]
    assert (await adapters.active(ann.id)).number == 4
    assert (await adapters.rollback(ann.id, None)).number == 1


async def test_a_pruned_ancestor_still_tells_what_its_descendants_hold(place, make, history, adapters, ann):
    secret = (await place("secret")).tail
    other = (await place("other")).tail
    await make(ann.id, (secret,))
    await make(ann.id, (other,), parent=1)
    assert await adapters.prune(ann.id, keep=1) == [1]
    assert await history.delete(ann.id, secret) == (1, 2)
    assert await adapters.active(ann.id) is None


async def test_an_entry_that_no_version_absorbed_deletes_none(place, make, history, adapters, ann):
    one = (await place("one")).tail
    two = (await place("two")).tail
    await make(ann.id, (one,))
    assert await history.delete(ann.id, two) == ()
    assert (await adapters.active(ann.id)).number == 1


async def test_a_serving_version_that_is_clean_goes_on_serving(place, make, history, adapters, ann):
    one = (await place("one")).tail
    secret = (await place("secret")).tail
    await make(ann.id, (one,))
    await make(ann.id, (secret,))
    await adapters.rollback(ann.id, 1)
    assert await history.delete(ann.id, secret) == (2,)
    assert (await adapters.active(ann.id)).number == 1


async def test_deleting_twice_names_each_version_once(place, make, history, ann):
    one = (await place("one")).tail
    two = (await place("two")).tail
    await make(ann.id, (one, two))
    assert await history.delete(ann.id, one) == (1,)
    assert await history.delete(ann.id, two) == ()


async def test_a_candidate_that_is_being_judged_is_deleted_and_cannot_be_published(place, make, history, adapters, ann):
    one = (await place("one")).tail
    await make(ann.id, (one,), serve=False)
    assert await history.delete(ann.id, one) == (1,)
    with pytest.raises(NotFound):
        await adapters.point(ann.id, 1)


@pytest.mark.parametrize("through", ["run", "parent"])
async def test_an_entry_deleted_while_a_run_trains_on_it_stops_the_publication(
    place, make, runs, history, adapters, ann, now, root, through
):
    secret, other = (await place("secret")).tail, (await place("other")).tail
    parent = (await make(ann.id, (secret,))).number if through == "parent" else None
    run = await runs.request(ann.id, now)
    await runs.set_examples(run.id, [ExampleRow(secret if parent is None else other, Frame.DRAFT, 3, 1.0)])
    folder = await adapters.workspace(ann.id)
    (folder / "adapter.safetensors").write_bytes(b"weights")
    await history.delete(ann.id, secret)
    with pytest.raises(NotFound):
        await adapters.publish(
            ann.id, folder, watermark=other, parent=parent, base="b", run_id=run.id, metrics={}, plan={}
        )
    assert list((root / str(ann.id)).iterdir()) == []
    assert await adapters.active(ann.id) is None


async def test_no_byte_of_a_deleted_entry_is_left(place, history, ann, tmp_path):
    entry = (await place("the xylophonquartz is hidden")).tail
    await place("something else")
    await history.delete(ann.id, entry)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"xylophonquartz" in path.read_bytes()]
    assert await history.search(ann.id, "xylophonquartz", limit=5) == []
    assert len(await history.search(ann.id, "something", limit=5)) == 1


async def test_what_followed_a_deleted_turn_follows_its_parent(place, answer, history, ann):
    first = await place("one")
    two = await answer(first, "two")
    third = await place("one", "two", "three")
    await history.delete(ann.id, two)
    assert [entry.text for entry in await history.conversation(ann.id, third.tail)] == ["one", "three"]


async def test_ids_are_not_given_again_after_a_deletion(place, history, ann):
    last = (await place("one")).tail
    await history.delete(ann.id, last)
    assert (await place("two")).tail > last


async def test_threat_02_nobody_deletes_the_entry_of_another(place, history, ann, bob):
    entry = (await place("mine")).tail
    with pytest.raises(NotFound) as foreign:
        await history.delete(bob.id, entry)
    with pytest.raises(NotFound) as unknown:
        await history.delete(bob.id, 12345)
    assert foreign.value.message == unknown.value.message
    assert await history.get(ann.id, entry)


async def test_deletions_at_once_leave_a_sound_database(place, make, history, adapters, db, ann):
    entries = [(await place(f"message {at}")).tail for at in range(6)]
    for entry in entries:
        await make(ann.id, (entry,))
    gone = await asyncio.gather(*(history.delete(ann.id, entry) for entry in entries))
    assert sorted(number for numbers in gone for number in numbers) == [1, 2, 3, 4, 5, 6]
    assert await adapters.active(ann.id) is None
    await db.check()


async def test_any_deletion_takes_what_an_open_run_has_learned_so_far(place, runs, history, adapters, ann, bob, now):
    entry = (await place("quoted somewhere, perhaps")).tail
    states = []
    for user in (ann, bob):
        run = await runs.start((await runs.request(user.id, now)).id, now, entry)
        states.append(await adapters.checkpoint(user.id, run.id))
        (states[-1] / "checkpoint.safetensors").write_bytes(b"moments")
    assert await history.delete(ann.id, entry) == ()
    assert [state.exists() for state in states] == [False, True]
    assert [run.metrics for run in await runs.running()] == [{}, {"through": entry}]
    assert await adapters.repair() == [f"The folder {ann.id} was removed: no version and no run keeps it."]
    assert (states[1] / "checkpoint.safetensors").exists()
