"""Rows of live checks: each message counts once, and goes with whatever it was about."""

import math

import pytest

from persona.domain import VersionState
from persona.errors import NotFound
from storage.adapters import Leaving
from storage.live import Checked, LiveChecks


@pytest.fixture
def checks(db):
    return LiveChecks(db)


@pytest.fixture
async def said(place):
    """Three messages."""
    return [(await place(f"message {number}")).tail for number in range(3)]


async def serving(adapters, make, user, entries=(1,), **more):
    version = await make(user.id, entries, **more)
    await adapters.point(user.id, version.number)
    return version.number


async def test_a_message_is_put_on_record_once_for_each_version(checks, adapters, make, ann, said, now):
    first, second = [await serving(adapters, make, ann, (said[0],)) for _ in range(2)]
    one = Checked(first, None, said[1], 5, 10.0, 12.0)
    assert await checks.add(ann.id, one, now)
    assert not await checks.add(ann.id, one, now)
    assert not await checks.add(ann.id, Checked(first, 7, said[1], 6, 1.0, 2.0), now)
    assert await checks.add(ann.id, Checked(second, first, said[1], 5, 9.0, 10.0), now)
    assert await checks.add(ann.id, Checked(first, None, said[0], 1, 1.0, 1.0), now)
    assert [row.entry_id for row in await checks.list(ann.id, first)] == [said[0], said[1]]
    assert (await checks.list(ann.id, first))[1] == one
    assert len(await checks.list(ann.id)) == 3


@pytest.mark.parametrize("nats", [math.nan, math.inf, -math.inf, None])
async def test_what_is_not_finite_has_no_number(checks, adapters, make, ann, said, now, nats):
    version = await serving(adapters, make, ann, (said[0],))
    assert await checks.add(ann.id, Checked(version, None, said[1], 5, nats, 12.0), now)
    (row,) = await checks.list(ann.id, version)
    assert (row.serving, row.before) == (None, 12.0)


async def test_what_is_gone_or_somebody_elses_is_not_put_on_record(
    checks, adapters, make, ann, bob, said, history, now
):
    version = await serving(adapters, make, ann, (said[0],))
    checked = Checked(version, None, said[1], 5, 10.0, 12.0)
    assert not await checks.add(bob.id, checked, now)
    assert not await checks.add(ann.id, Checked(99, None, said[1], 5, 10.0, 12.0), now)
    await history.delete(ann.id, said[1])
    assert not await checks.add(ann.id, checked, now)
    await history.delete(ann.id, said[0])  # the version had absorbed it
    assert not await checks.add(ann.id, Checked(version, None, said[2], 5, 10.0, 12.0), now)
    assert await checks.list(ann.id) == []


async def test_rows_go_with_their_message(checks, adapters, make, ann, said, history, now, db):
    version = await serving(adapters, make, ann, (said[0],))
    for entry in said[1:]:
        await checks.add(ann.id, Checked(version, None, entry, 5, 10.0, 12.0), now)
    await history.delete(ann.id, said[1])
    assert [row.entry_id for row in await checks.list(ann.id)] == [said[2]]
    await db.check()


async def test_rows_go_with_a_version_that_absorbed_what_is_deleted(checks, adapters, make, ann, said, history, now):
    first = await serving(adapters, make, ann, (said[0],))
    second = await serving(adapters, make, ann, (said[1],))
    for version in (first, second):
        await checks.add(ann.id, Checked(version, None, said[2], 5, 10.0, 12.0), now)
    await history.delete(ann.id, said[1])
    assert [row.version for row in await checks.list(ann.id)] == [first]


async def test_threat_32_rows_go_with_their_user(checks, adapters, make, ann, said, users, now, db):
    version = await serving(adapters, make, ann, (said[0],))
    await checks.add(ann.id, Checked(version, None, said[1], 5, 10.0, 12.0), now)
    assert (await users.forget(ann.id))["live_checks"] == 1
    assert await checks.list(ann.id) == []
    await db.check()


async def test_leaving_a_version_says_why_and_nothing_but_its_user_returns_to_it(adapters, make, ann, said):
    first, second, third = [await serving(adapters, make, ann, (said[0],)) for _ in range(3)]
    await adapters.rollback(ann.id, second, leaving=Leaving(third, "It was worse."))
    assert (await adapters.active(ann.id)).number == second
    left = await adapters.get(ann.id, third)
    assert (left.state, left.rolled_back, left.metrics["loss"]) == (VersionState.PUBLISHED, "It was worse.", 1.5)
    fourth = await serving(adapters, make, ann, (said[0],))
    assert (await adapters.quarantine(ann.id, fourth, "broken")).number == second
    assert (await adapters.rollback(ann.id)).number == first
    assert (await adapters.rollback(ann.id, third)).number == third


async def test_a_version_that_does_not_serve_any_more_is_not_left(adapters, make, ann, said):
    first, second = [await serving(adapters, make, ann, (said[0],)) for _ in range(2)]
    await adapters.rollback(ann.id, first)
    with pytest.raises(NotFound):
        await adapters.rollback(ann.id, 0, leaving=Leaving(second, "It was worse."))
    assert (await adapters.active(ann.id)).number == first
    assert (await adapters.get(ann.id, second)).rolled_back is None


async def test_leaving_for_what_cannot_serve_changes_nothing(adapters, make, ann, said):
    first, second = [await serving(adapters, make, ann, (said[0],)) for _ in range(2)]
    await adapters.prune(ann.id, 1)
    with pytest.raises(NotFound):
        await adapters.rollback(ann.id, first, leaving=Leaving(second, "It was worse."))
    assert (await adapters.get(ann.id, second)).rolled_back is None
