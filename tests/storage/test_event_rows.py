"""Events are stored once each, a batch all or nothing, and come back as entries, facts and ratings."""

import asyncio
import os
import random
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from arriving import DEAD, DUPLICATE, NOW, STORED, refused, store, told

from persona.domain import Finish, Line, Origin, Role
from persona.errors import StorageFull
from persona.event import Reason
from storage.database import Database
from storage.events import Events
from storage.failpoints import KILLED
from storage.history import History

HERE = Path(__file__).parent


async def texts(history, user) -> list[str]:
    return [entry.text for entry in await history.page(user.id, limit=10_000)]


async def test_a_message_becomes_the_users_own_words_with_its_context(events, history, ann):
    context = [{"author": "bob", "text": "where\0 are you?"}]
    assert await store(events, told(ann, text=" At home. ", context=context, source="irc/home", id=1)) == [STORED]
    (entry,) = await history.page(ann.id)
    assert (entry.role, entry.text, entry.origin) == (Role.USER, "At home.", Origin.EVENT)
    assert (entry.conversation, entry.tokens, entry.ts) == ("message/irc/home", 8, NOW)
    assert entry.context == (Line("bob", "where are you?"),)
    assert [found.id for found in await history.search(ann.id, "home", limit=5)] == [entry.id]
    assert await history.own_tokens(ann.id, 0) == 8


async def test_any_other_kind_becomes_an_entry_that_is_nobodys_words(events, history, ann):
    assert await store(events, told(ann, "door.front", open=True)) == [STORED]
    (entry,) = await history.page(ann.id)
    assert (entry.role, entry.text, entry.conversation) == (Role.TOOL, '{"open":true}', "door.front")
    assert await history.own_tokens(ann.id, 0) == 0


async def test_the_user_sees_what_arrived_and_what_became_of_it(events, history, ann, bob):
    await store(events, told(ann, text="hi", id=1, source="phone", seq=7), told(ann, "state", key="lamp", value="on"))
    await store(events, told(bob, text="not ann's"))
    newest, first = await events.newest(ann.id)
    assert (first.kind, first.source, first.seq, first.entry_id) == ("message", "phone", 7, 1)
    assert (newest.kind, newest.source, newest.entry_id) == ("state", "", None)
    assert await events.newest(ann.id, before=newest.id) == [first]
    assert await events.newest(ann.id, limit=1) == [newest]


async def test_threat_21_an_id_counts_once_however_often_and_wherever_it_comes(events, history, ann):
    one = told(ann, text="hello", id="a")
    assert await store(events, one, one, told(ann, text="b", id="b"), one) == [STORED, DUPLICATE, STORED, DUPLICATE]
    later = NOW + timedelta(hours=1)
    other_words = told(ann, text="said otherwise", id="a", received=later)
    assert await store(events, one, other_words, now=later) == [DUPLICATE, DUPLICATE]
    assert await texts(history, ann) == ["hello", "b"]


async def test_threat_21_without_an_id_time_and_content_name_an_event(events, history, ann):
    one = told(ann, text="yes", ts=1_770_000_000)
    assert await store(events, one, one) == [STORED, DUPLICATE]
    assert await store(events, one, told(ann, text="yes", ts=1_770_000_001)) == [DUPLICATE, STORED]
    assert await store(events, told(ann, text="no", ts=1_770_000_000)) == [STORED]


async def test_threat_21_with_neither_only_a_delivery_that_is_marked_as_a_repeat_is_dropped(events, history, ann):
    first = told(ann, text="ping", delivery=b"1")
    assert await store(events, first, told(ann, text="ping", delivery=b"2")) == [STORED, STORED]
    assert await store(events, first) == [STORED]  # the broker gives a number again to another message
    assert await store(events, replace(first, again=True)) == [DUPLICATE]
    unseen = told(ann, text="pong", delivery=b"3", again=True)
    assert await store(events, unseen, unseen) == [STORED, DUPLICATE]
    assert await texts(history, ann) == ["ping", "ping", "ping", "pong"]


async def test_threat_21_a_refused_message_that_comes_again_is_counted_once(events, ann):
    letter = replace(refused(ann), delivery=b"1")
    lost = told(ann, "feedback", turn=77, rating=1, id=1, delivery=b"2")
    assert await store(events, letter, lost) == [DEAD, DEAD]
    assert await store(events, replace(letter, again=True), replace(lost, again=True)) == [DUPLICATE, DUPLICATE]
    assert [one.count for one in await events.letters(ann.id)] == [1, 1]


async def test_ten_thousand_deliveries_are_remembered(events, ann, db):
    many = [told(ann, "fact", key="k", value=1, delivery=b"%d" % at) for at in range(10_001)]
    for begin in range(0, len(many), 5000):
        await store(events, *many[begin : begin + 5000])
    again = [replace(many[at], again=True) for at in (1, 10_000, 0)]
    assert await store(events, *again) == [DUPLICATE, DUPLICATE, STORED]


async def test_two_users_may_use_the_same_id(events, history, ann, bob):
    assert await store(events, told(ann, text="hers", id=1), told(bob, text="his", id=1)) == [STORED, STORED]
    assert await store(events, told(bob, text="his", id=1), told(ann, text="hers", id=1)) == [DUPLICATE, DUPLICATE]
    assert (await texts(history, ann), await texts(history, bob)) == (["hers"], ["his"])


async def test_an_id_is_one_of_its_kind_and_source(events, ann):
    same = {"id": "1", "text": "x"}
    batch = [told(ann, **same), told(ann, "note", **same), told(ann, source="b", **same)]
    assert await store(events, *batch) == [STORED] * 3


async def test_a_deleted_entry_does_not_come_back_even_after_its_row_is_pruned(events, history, ann):
    one = told(ann, text="regretted", id=1)
    await store(events, one)
    await history.delete(ann.id, 1)
    assert [row.entry_id for row in await events.newest(ann.id)] == [None]
    assert await store(events, one) == [DUPLICATE]
    assert await events.prune(NOW + timedelta(days=31), timedelta(days=30)) == 1
    assert await store(events, one) == [DUPLICATE]
    assert await texts(history, ann) == []


async def test_pruning_forgets_receipts_and_letters_and_an_entry_still_recognises_its_event(events, history, ann):
    await store(events, told(ann, text="old", id=1), told(ann, "fact", key="k", value=1), refused(ann))
    await store(events, told(ann, text="new", id=2, received=NOW), now=NOW + timedelta(days=30))
    assert await events.prune(NOW + timedelta(days=30, seconds=1), timedelta(days=30)) == 3
    assert len(await events.newest(ann.id)) == 1
    assert await events.letters(ann.id) == []
    assert await store(events, told(ann, text="old", id=1)) == [DUPLICATE]
    assert await texts(history, ann) == ["old", "new"]
    assert len(await events.facts(ann.id)) == 1


async def test_feedback_weights_a_reply_of_the_same_user_and_of_nobody_else(events, history, place, answer, ann, bob):
    turn = await answer(await place("hi"), "Hello.")
    assert await store(events, told(bob, "feedback", turn=turn, rating=-1)) == [DEAD]
    assert await store(events, told(ann, "feedback", turn=turn - 1, rating=-1)) == [DEAD]  # her own question
    assert (await history.get(ann.id, turn)).rating is None
    both = [told(ann, "feedback", turn=turn, rating=1), told(ann, "feedback", turn=turn, correction=" Hey. ")]
    assert await store(events, *both) == [STORED, STORED]
    entry = await history.get(ann.id, turn)
    assert (entry.rating, entry.correction, entry.finish) == (1, "Hey.", Finish.STOP)
    assert await store(events, told(ann, "feedback", turn=turn, rating=0, correction="")) == [STORED]
    assert (await history.get(ann.id, turn)).rating is None
    (letter,) = await events.letters(bob.id)
    assert (letter.reason, letter.payload) == (Reason.UNKNOWN_TURN, b'{"turn": 2, "rating": -1}')


@pytest.mark.parametrize("text", ["<think>only thoughts</think>", "\0"])
async def test_words_that_come_to_nothing_are_a_dead_letter_and_their_neighbours_live(events, history, ann, text):
    batch = [told(ann, text="one"), told(ann, text=text), told(ann, "fact", key="k", value=1), told(ann, text="two")]
    assert await store(events, *batch) == [STORED, DEAD, STORED, STORED]
    assert await texts(history, ann) == ["one", "two"]
    assert [letter.reason for letter in await events.letters(ann.id)] == [Reason.BAD_PAYLOAD]


async def test_each_entry_gets_its_own_text_whoever_it_belongs_to(events, history, ann, bob):
    batch = [told((ann, bob)[at % 2], text=f"number {at}", id=at) for at in range(50)]
    assert await store(events, *batch) == [STORED] * 50
    await history.delete(bob.id, 50)  # the newest id of all is not given again
    assert await store(events, told(ann, text="number 50", id=50)) == [STORED]
    assert await texts(history, ann) == [f"number {at}" for at in range(0, 51, 2)]
    assert await texts(history, bob) == [f"number {at}" for at in range(1, 49, 2)]
    assert [entry.id for entry in await history.search(ann.id, "50", limit=5)] == [51]
    row = (await events.newest(ann.id, limit=1))[0]
    assert row.entry_id == 51


async def test_a_batch_of_five_thousand_is_stored_in_few_statements(events, history, ann, bob, db):
    kinds = [
        lambda at: told(ann, text=f"number {at}", id=at, source=f"s{at % 50}", seq=at),
        lambda at: told(bob, "state", key=f"k{at}", value=at, id=at, source=f"s{at}"),
    ]
    batch = [kinds[at % 2](at) for at in range(5000)]
    statements = []
    sa.event.listen(db._writer, "before_cursor_execute", lambda *call: statements.append(call[2]))
    assert await store(events, *batch) == [STORED] * 5000
    assert await store(events, *batch) == [DUPLICATE] * 5000
    assert len(statements) < 40
    assert len(await texts(history, ann)) == 2500
    assert len(await events.facts(bob.id, limit=5000)) == 2500


async def test_known_names_are_found_by_an_index_and_not_by_reading_the_table(events, ann, bob, db):
    plans = []

    def explain(connection, cursor, statement, parameters, context, many):
        if statement.startswith("SELECT") and " IN (" in statement:
            plan = connection.connection.driver_connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans.append([row[3] for row in plan])

    sa.event.listen(db._writer, "before_cursor_execute", explain)
    batch = [(told(user, "fact", key="k", value=1, id=1), told(user, text="x", id=2)) for user in (ann, bob)]
    await store(events, *batch[0], *batch[1])
    await store(events, *batch[0], *batch[1])
    assert len(plans) >= 6
    assert not [step for plan in plans for step in plan if step.startswith("SCAN")]


async def test_an_empty_batch_is_nothing(events):
    assert await store(events) == []


async def test_stores_at_once_store_each_event_once(events, history, ann, bob, db):
    batch = [told(user, text=f"text {at}", id=at, source="s", seq=at) for at in range(200) for user in (ann, bob)]
    other = await Database.open(db.path)  # another program's connection
    sides = (events, Events(other), events, Events(other))
    shuffled = [random.Random(side).sample(batch, len(batch)) for side in range(4)]
    results = await asyncio.gather(*(store(side, *some) for side, some in zip(sides, shuffled, strict=True)))
    await other.close()
    assert sum(outcomes.count(STORED) for outcomes in results) == 400
    assert sum(outcomes.count(DUPLICATE) for outcomes in results) == 1200
    for user in (ann, bob):
        assert sorted(await texts(history, user)) == sorted(f"text {at}" for at in range(200))
    await db.check()


async def test_threat_21_two_thousand_events_reordered_and_repeated_have_their_effect_once(events, history, ann, db):
    dice = random.Random(7)
    sent = [told(ann, text=f"event {at}", id=at) for at in range(1500)]
    sent += [told(ann, "state", key=f"k{at % 20}", value=at, ts=1_770_000_000 + at) for at in range(500)]
    line = sent + dice.choices(sent, k=1000)
    dice.shuffle(line)
    outcomes = []
    while line:
        size = dice.randint(1, 400)
        outcomes += await store(events, *line[:size])
        line = line[size:]
    assert (outcomes.count(STORED), outcomes.count(DUPLICATE)) == (2000, 1000)
    assert sorted(await texts(history, ann)) == sorted(f"event {at}" for at in range(1500))
    assert {fact.value for fact in await events.facts(ann.id)} == {str(at) for at in range(480, 500)}
    (source,) = await events.sources(ann.id)
    assert (source.events, source.duplicates) == (2000, 1000)


async def test_threat_23_on_a_full_disk_nothing_of_the_batch_has_happened(events, history, ann, db):
    await store(events, told(ann, "fact", key="k", value="before"))
    async with db.write() as connection:
        pages = (await connection.exec_driver_sql("PRAGMA page_count")).scalar_one()
        await connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
    long = [told(ann, text=f"{at} " * 900, id=at) for at in range(40)]
    batch = [told(ann, "fact", key="k", value="after", id=1), *long]
    with pytest.raises(StorageFull):
        await store(events, *batch, refused(ann))
    async with db.write() as connection:
        await connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    assert [fact.value for fact in await events.facts(ann.id)] == ["before"]
    assert (await texts(history, ann), await events.letters(ann.id)) == ([], [])
    assert (await events.sources(ann.id))[0].events == 1
    assert await store(events, *batch) == [STORED] * 41


@pytest.mark.parametrize("failpoint", ["events-before-commit", "events-after-commit"])
async def test_threat_07_killed_while_storing_a_batch_happened_whole_or_not_at_all(events, history, ann, db, failpoint):
    folders = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    environment = {**os.environ, "PERSONA_FAILPOINT": failpoint, "PYTHONPATH": folders}
    command = [sys.executable, str(HERE / "tell_me.py"), str(db.path), "ann"]
    done = await asyncio.to_thread(subprocess.run, command, env=environment, timeout=60, check=False)
    assert done.returncode == KILLED
    happened = failpoint == "events-after-commit"
    await db.check()
    assert await texts(history, ann) == ["hello"] * happened
    assert len(await events.facts(ann.id)) == len(await events.sources(ann.id)) == happened
    repeated = [told(ann, text="hello", id=1), told(ann, "fact", key="town", value="Ghent", id=2)]
    assert await store(events, *repeated) == [DUPLICATE if happened else STORED] * 2
    assert await texts(history, ann) == ["hello"]


async def test_what_happened_does_not_crowd_out_what_was_said(events, history, ann, place):
    await place("I said this")
    await store(events, *(told(ann, "meter", watts=at, id=at) for at in range(100)))
    recent = await history.recent(ann.id, 0, exclude=(), limit=50)
    assert [entry.text for entry in recent if entry.role is Role.USER] == ["I said this"]
    assert [entry.text for entry in recent if entry.role is Role.TOOL] == [f'{{"watts":{at}}}' for at in range(84, 100)]
    assert [entry.id for entry in recent] == sorted(entry.id for entry in recent)
    assert await history.recent(ann.id, 0, exclude=(), limit=0) == []


async def test_the_next_start_finds_what_was_stored(events, ann, db):
    await store(events, told(ann, text="hello", id=1), told(ann, "fact", key="k", value=1))
    await db.close()
    again = await Database.open(db.path)
    assert await store(Events(again), told(ann, text="hello", id=1)) == [DUPLICATE]
    assert await History(again).page(ann.id)
    await again.close()
