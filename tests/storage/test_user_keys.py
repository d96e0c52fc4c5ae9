"""Users, their keys, and what is kept of both."""

import asyncio
import contextlib
import hmac
import re
import sqlite3
from datetime import timedelta

import pytest

from persona.errors import NotFound, RequestError
from storage.users import Users


@pytest.mark.parametrize("name", ["a", "7", "ann", "living-room.2_b", "a" * 64])
async def test_a_good_name_is_taken(users, name):
    user = await users.add(name, learn=False)
    assert await users.get(name) == user == await users.by_id(user.id)
    assert (user.learn, user.paused, user.active) == (False, False, None)


@pytest.mark.parametrize(
    "name", ["", "Ann", "-ann", ".", "../b", "a" * 65, "a/b", "ann\n", "ann ", "ánn", "a\0b", "аnn"]
)
async def test_a_bad_name_is_refused(users, name):
    with pytest.raises(RequestError) as refusal:
        await users.add(name)
    assert refusal.value.param == "name"
    assert await users.all() == []


async def test_a_name_is_taken_once(users, ann):
    with pytest.raises(RequestError) as refusal:
        await users.add("ann")
    assert refusal.value.code == "user_exists"


async def test_unknown_users_are_none(users):
    assert await users.get("nobody") is None
    assert await users.by_id(7) is None


async def test_all_users_come_in_the_order_of_their_names(users, bob, ann):
    assert [user.name for user in await users.all()] == ["ann", "bob"]


async def test_pausing_is_remembered(users, ann):
    await users.set_paused(ann.id, True)
    assert (await users.get("ann")).paused
    await users.set_paused(ann.id, False)
    assert not (await users.get("ann")).paused


async def test_a_key_speaks_for_its_user(users, ann, bob):
    key_id, secret = await users.add_key(ann.id, label="laptop")
    caller = await users.authenticate(secret)
    assert (caller.user, caller.key_id, caller.learn) == (ann, key_id, True)


async def test_a_key_is_random_and_long(users, ann):
    secrets = {(await users.add_key(ann.id))[1] for _ in range(20)}
    assert len(secrets) == 20
    assert all(re.fullmatch(r"pk-[\w-]{43}", secret) for secret in secrets)


@pytest.mark.parametrize(("user_learns", "key_learns"), [(True, False), (False, True), (False, False)])
async def test_learn_is_off_if_user_or_key_does_not_learn(users, user_learns, key_learns):
    user = await users.add("device", learn=user_learns)
    _, secret = await users.add_key(user.id, learn=key_learns)
    assert not (await users.authenticate(secret)).learn


@pytest.mark.parametrize("secret", ["", "pk-", "pk-" + "A" * 43, "\ud800", "x" * 10_000])
async def test_a_wrong_key_is_nobodys(users, ann, secret):
    await users.add_key(ann.id)
    assert await users.authenticate(secret) is None


async def test_threat_01_keys_are_compared_in_constant_time(users, ann, monkeypatch):
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    await users.authenticate("pk-wrong")
    await users.authenticate((await users.add_key(ann.id))[1])
    assert [len(a) == len(b) == 32 for a, b in compared] == [True, True]


async def test_threat_35_only_the_hash_of_a_key_is_stored(users, ann, db):
    _, secret = await users.add_key(ann.id)
    await users.authenticate(secret)
    stored = b"".join(path.read_bytes() for path in db.path.parent.iterdir() if path.is_file())
    assert secret.encode() not in stored
    assert secret.removeprefix("pk-").encode() not in stored


async def test_threat_35_a_revoked_key_ends_at_once_and_stays_listed(users, ann):
    key_id, secret = await users.add_key(ann.id, label="lost phone")
    other_id, other = await users.add_key(ann.id)
    assert await users.revoke(ann.id, key_id)
    assert await users.authenticate(secret) is None
    assert (await users.authenticate(other)).key_id == other_id
    lost, kept = await users.keys(ann.id)
    assert (lost.id, lost.label, kept.revoked) == (key_id, "lost phone", None)
    assert lost.revoked is not None
    assert await users.revoke(ann.id, key_id)
    assert (await users.keys(ann.id))[0].revoked == lost.revoked


async def test_threat_02_nobody_revokes_the_key_of_another(users, ann, bob):
    key_id, secret = await users.add_key(ann.id)
    assert not await users.revoke(bob.id, key_id)
    assert not await users.revoke(ann.id, key_id + 1)
    assert await users.authenticate(secret)
    assert await users.keys(bob.id) == []


async def test_threat_35_the_last_use_is_shown_and_written_at_most_once_a_minute(db, now):
    time = [now]
    users = Users(db, lambda: time[0])
    ann = await users.add("ann")
    _, secret = await users.add_key(ann.id)
    assert (await users.keys(ann.id))[0].last_used is None
    for seconds, expected in [(0, 0), (59, 0), (60, 60), (119, 60), (121, 121)]:
        time[0] = now + timedelta(seconds=seconds)
        await users.authenticate(secret)
        assert (await users.keys(ann.id))[0].last_used == now + timedelta(seconds=expected)


async def test_a_lock_that_another_program_holds_keeps_nobody_with_a_key_waiting(db, users, ann):
    """Noting the use of the key is tried for some seconds, once a minute."""
    _, secret = await users.add_key(ann.id)
    with contextlib.closing(sqlite3.connect(db.path)) as other:
        other.execute("BEGIN IMMEDIATE")
        async with asyncio.timeout(20):  # 30 s a request before
            for _ in range(20):
                assert (await users.authenticate(secret)).user.id == ann.id


async def test_a_key_for_nobody_is_refused(users):
    with pytest.raises(NotFound):
        await users.add_key(7)
