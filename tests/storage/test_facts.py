"""Of facts and states the newest value of each key is known."""

import asyncio
from datetime import timedelta
from itertools import permutations

import pytest
from arriving import DUPLICATE, NOW, STORED, store, told

from storage.events import Events

CANARY = "xylophonquartz"


async def known(events, user, kind=None) -> dict[str, str | None]:
    return {fact.key: fact.value for fact in await events.facts(user.id, kind)}


def at(minute: int) -> str:
    return (NOW - timedelta(hours=1) + timedelta(minutes=minute)).isoformat()


async def test_the_newest_value_of_each_key_stays_and_the_newest_key_comes_first(events, ann):
    await store(events, told(ann, "fact", key="town", value="Ghent", ts=at(1)))
    await store(events, told(ann, "fact", key="tea", value="green", ts=at(2)))
    await store(events, told(ann, "fact", key="town", value="Bruges", ts=at(3)))
    assert list((await known(events, ann)).items()) == [("town", "Bruges"), ("tea", "green")]
    assert [fact.key for fact in await events.facts(ann.id, limit=1)] == ["town"]


@pytest.mark.parametrize("order", list(permutations([1, 2, 3])))
@pytest.mark.parametrize("together", [True, False], ids=["one batch", "one by one"])
async def test_threat_21_the_order_of_arrival_makes_no_difference(events, ann, order, together):
    arrived = [told(ann, "state", key="lamp", value=f"v{minute}", ts=at(minute)) for minute in order]
    for batch in [arrived] if together else [[one] for one in arrived]:
        assert await store(events, *batch) == [STORED] * len(batch)
    assert await known(events, ann) == {"lamp": "v3"}


async def test_of_equal_times_the_one_that_arrived_last_stays(events, ann):
    first, second, third = (told(ann, "fact", key="k", value=value, ts=at(1)) for value in "abc")
    await store(events, first, second)
    assert await known(events, ann) == {"k": "b"}
    await store(events, third)
    assert await known(events, ann) == {"k": "c"}
    assert await store(events, first) == [DUPLICATE]
    assert await known(events, ann) == {"k": "c"}


async def test_facts_and_states_and_users_have_keys_of_their_own(events, ann, bob):
    batch = [told(ann, "fact", key="k", value="fact"), told(ann, "state", key="k", value="state")]
    await store(events, *batch, told(bob, "fact", key="k", value="bob's"))
    assert (await known(events, ann, "fact"), await known(events, ann, "state")) == ({"k": "fact"}, {"k": "state"})
    assert await known(events, bob) == {"k": "bob's"}
    await store(events, told(bob, "fact", key="k", value="changed"), told(ann, "state", key="k", value="changed"))
    assert await known(events, ann, "fact") == {"k": "fact"}


@pytest.mark.parametrize("nothing", [None, "", "  ", "\0"])
async def test_a_fact_that_was_taken_back_stays_back_when_an_older_one_arrives_late(events, ann, nothing):
    await store(events, told(ann, "fact", key="town", value="Ghent", ts=at(1)))
    await store(events, told(ann, "fact", key="town", value=nothing, ts=at(5)))
    assert await known(events, ann) == {}
    await store(events, told(ann, "fact", key="town", value="Bruges", ts=at(3)))
    assert await known(events, ann) == {}
    await store(events, told(ann, "fact", key="town", value="Namur", ts=at(6)))
    assert await known(events, ann) == {"town": "Namur"}


async def test_what_was_never_known_may_be_taken_back_before_it_arrives(events, ann):
    await store(events, told(ann, "fact", key="town", value=None, ts=at(5)))
    await store(events, told(ann, "fact", key="town", value="Ghent", ts=at(1)))
    assert await known(events, ann) == {}


async def test_a_dropped_fact_leaves_no_byte_and_does_not_return(events, ann, bob, tmp_path):
    one = told(ann, "fact", key="secret", value=CANARY, ts=at(1), id=1)
    await store(events, one, told(bob, "fact", key="secret", value="his"))
    assert not await events.drop_fact(ann.id, "state", "secret")
    assert await events.drop_fact(ann.id, "fact", "secret")
    assert not await events.drop_fact(ann.id, "fact", "secret")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
    assert await store(events, one) == [DUPLICATE]
    await store(events, told(ann, "fact", key="secret", value="older", ts=at(0)))
    assert await known(events, ann) == {}
    assert await known(events, bob) == {"secret": "his"}


async def test_who_leaves_while_a_fact_is_dropped_still_leaves_no_byte_of_it(db, events, ann, tmp_path, monkeypatch):
    await store(events, told(ann, "fact", key="secret", value=CANARY))
    scrub = db.scrub

    async def late(**how: bool) -> bool:
        dropping.cancel()
        await asyncio.sleep(0.01)
        return await scrub(**how)

    monkeypatch.setattr(db, "scrub", late)
    dropping = asyncio.create_task(events.drop_fact(ann.id, "fact", "secret"))
    with pytest.raises(asyncio.CancelledError):
        await dropping
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


@pytest.mark.parametrize("value", ["Ghent", None], ids=["told", "taken back"])
@pytest.mark.parametrize("dated", [False, True], ids=["without a time", "with a time"])
async def test_threat_25_what_a_clock_that_was_ahead_told_is_not_frozen(events, ann, value, dated):
    ahead = NOW + timedelta(days=30)
    await store(events, told(ann, "fact", key="town", value=value, received=ahead), now=ahead)
    body = {"value": "Bruges"} | ({"ts": (NOW - timedelta(seconds=1)).isoformat()} if dated else {})
    assert await store(events, told(ann, "fact", key="town", **body)) == [STORED]
    assert await known(events, ann) == {"town": "Bruges"}
    await store(events, told(ann, "fact", key="town", value="older", ts=at(0)))
    assert await known(events, ann) == {"town": "Bruges"}


async def test_threat_25_a_dropped_fact_of_a_clock_that_was_ahead_can_be_told_again_and_no_older_one_returns(db, ann):
    events, ahead = Events(db, lambda: NOW), NOW + timedelta(days=30)
    await store(events, told(ann, "fact", key="town", value="Ghent", received=ahead), now=ahead)
    assert await events.drop_fact(ann.id, "fact", "town")
    await store(events, told(ann, "fact", key="town", value="older", ts=at(0)))
    assert await known(events, ann) == {}
    await store(events, told(ann, "fact", key="town", value="Bruges"))
    assert await known(events, ann) == {"town": "Bruges"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Ghent", "Ghent"),
        (" 21.5 ", "21.5"),
        (21.5, "21.5"),
        (0, "0"),
        (True, "true"),
        (False, "false"),
        ([], "[]"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        ("null", "null"),
        ("a\0b", "ab"),
    ],
)
async def test_a_value_may_be_any_json(events, ann, value, text):
    await store(events, told(ann, "state", key="k", value=value))
    assert await known(events, ann) == {"k": text}


async def test_many_keys_in_one_batch_are_each_kept(events, ann):
    first = [told(ann, "state", key=f"k{number}", value=number, ts=at(1)) for number in range(1500)]
    await store(events, *first)
    later = [told(ann, "state", key=f"k{number}", value="new", ts=at(number % 3)) for number in range(1000, 2000)]
    await store(events, *later)
    found = {fact.key: fact.value for fact in await events.facts(ann.id, limit=5000)}
    assert len(found) == 2000
    for number in range(1500):
        assert found[f"k{number}"] == ("new" if number >= 1000 and number % 3 >= 1 else str(number))
