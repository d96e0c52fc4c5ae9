"""What is read back from history: since a watermark, the newest, a page, a sum; and feedback on replies."""

from datetime import timedelta, timezone

import pytest

from persona.domain import EntryId, Finish, Line, Message, Origin, Role
from persona.errors import NotFound, RequestError
from storage import history as histories
from storage.history import ImportItem


@pytest.fixture
async def talk(place, answer):
    """Five messages and five replies, ids 1 to 10; own tokens 2 each."""
    said: list[str] = []
    for at in range(5):
        placed = await place(*said, f"u{at}")
        await answer(placed, f"reply {at}")
        said += [f"u{at}", f"reply {at}"]


def ids(entries) -> list[int]:
    return [entry.id for entry in entries]


async def test_since_gives_what_came_after_the_watermark_in_order(talk, history, ann):
    assert ids(await history.since(ann.id, 0)) == list(range(1, 11))
    assert ids(await history.since(ann.id, 7)) == [8, 9, 10]
    assert ids(await history.since(ann.id, 10)) == []
    assert ids(await history.since(ann.id, 2, limit=3)) == [3, 4, 5]
    assert ids(await history.since(ann.id, 0, roles=[Role.USER], limit=2)) == [1, 3]
    assert ids(await history.since(ann.id, 0, roles={Role.ASSISTANT})) == [2, 4, 6, 8, 10]
    assert ids(await history.since(ann.id, 0, roles=[])) == []


async def test_recent_gives_the_newest_that_are_not_excluded_in_order(talk, history, ann):
    assert ids(await history.recent(ann.id, 0, exclude=(), limit=3)) == [8, 9, 10]
    assert ids(await history.recent(ann.id, 8, exclude=(), limit=3)) == [9, 10]
    assert ids(await history.recent(ann.id, 0, exclude={10, 8, 3}, limit=3)) == [6, 7, 9]
    assert ids(await history.recent(ann.id, 0, exclude=set(range(100)), limit=3)) == []
    assert ids(await history.recent(ann.id, 0, exclude=(), limit=0)) == []
    assert ids(await history.recent(ann.id, 0, exclude=(), limit=3, through=6)) == [4, 5, 6]
    assert ids(await history.recent(ann.id, 4, exclude={6}, limit=3, through=6)) == [5]


async def test_a_conversation_is_the_way_to_its_tail(talk, history, ann, bob):
    assert ids(await history.conversation(ann.id, 4)) == [1, 2, 3, 4]
    assert ids(await history.conversation(ann.id, 99)) == []
    assert ids(await history.conversation(bob.id, 4)) == []


async def test_pages_follow_each_other(talk, history, ann):
    assert ids(await history.page(ann.id, limit=4)) == [1, 2, 3, 4]
    assert ids(await history.page(ann.id, after=4, limit=4)) == [5, 6, 7, 8]
    assert ids(await history.page(ann.id, after=8, limit=4)) == [9, 10]


async def test_a_page_has_so_many_bytes_of_text_and_one_entry_at_least(history, ann, now, monkeypatch):
    monkeypatch.setattr(histories, "PAGE_BYTES", 100)
    lines = (Line("bob", "y" * 60),)
    texts = [("ä" * 50, ()), ("short", ()), ("x" * 300, ()), ("other", lines), ("s" * 40, ()), ("end", ())]
    items = [ImportItem(text=text, ts=now, context=context) for text, context in texts]
    await history.import_(ann.id, items, count=len, now=now)
    found, after = [], EntryId(0)
    while page := await history.page(ann.id, after=after, limit=5):
        found.append(ids(page))
        after = page[-1].id
    assert found == [[1], [2, 3], [4, 5], [6]]


async def test_own_tokens_are_those_of_the_users_words_alone(talk, history, ann, now):
    assert await history.own_tokens(ann.id, 0) == 10
    assert await history.own_tokens(ann.id, 6) == 4
    items = [ImportItem("abc", now), ImportItem("not mine", now, role=Role.ASSISTANT)]
    await history.import_(ann.id, items, count=len, now=now)
    assert await history.own_tokens(ann.id, 0) == 13
    assert await history.own_tokens(ann.id, 12) == 0


async def test_a_history_without_entries(history, ann):
    assert await history.last_id(ann.id) == 0
    assert await history.own_tokens(ann.id, 0) == 0
    assert await history.page(ann.id) == []
    assert await history.recent(ann.id, 0, exclude=(), limit=5) == []


async def test_threat_02_nobody_reads_the_history_of_another(talk, history, ann, bob, now):
    assert await history.last_id(ann.id) == 10
    assert await history.last_id(bob.id) == 0
    assert await history.get(bob.id, 1) is None
    assert await history.since(bob.id, 0) == []
    assert await history.search(bob.id, "reply u0", limit=9) == []
    with pytest.raises(NotFound):
        await history.feedback(bob.id, 2, 1, None)


async def test_a_reply_placed_under_another_users_turn_does_not_hang_on_it(place, history, bob, now):
    placed = await place("ann's words")
    theirs = await history.reply(bob.id, placed, "hm", finish=Finish.STOP, version=None, now=now, tokens=1)
    assert (await history.get(bob.id, theirs)).parent is None


async def test_feedback_rates_and_corrects_a_reply(talk, history, ann):
    rated = await history.feedback(ann.id, 2, 1, None)
    assert (rated.rating, rated.correction, rated.text) == (1, None, "reply 0")
    corrected = await history.feedback(ann.id, 2, None, "better")
    assert (corrected.rating, corrected.correction) == (1, "better")
    taken_back = await history.feedback(ann.id, 2, 0, "")
    assert (taken_back.rating, taken_back.correction) == (None, None)
    assert (await history.feedback(ann.id, 4, -1, None)).rating == -1
    assert await history.feedback(ann.id, 4, None, None) == await history.get(ann.id, 4)


@pytest.mark.parametrize("turn", [1, 99])
async def test_feedback_is_for_replies_only(talk, history, ann, turn):
    with pytest.raises(NotFound) as refusal:
        await history.feedback(ann.id, turn, 1, None)
    assert refusal.value.message == "There is no such reply."


@pytest.mark.parametrize("rating", [2, -2, 10**9])
async def test_a_rating_is_one_of_three(talk, history, ann, rating):
    with pytest.raises(RequestError):
        await history.feedback(ann.id, 2, rating, None)


async def test_times_come_back_aware_and_in_utc(history, ann, now):
    local = now.astimezone(timezone(timedelta(hours=5, minutes=30)))
    await history.place(ann.id, [Message(Role.USER, "hi")], conversation_id=None, now=local, count=len)
    entry = await history.get(ann.id, 1)
    assert (entry.ts, entry.ts.utcoffset(), entry.origin) == (now, timedelta(0), Origin.CHAT)
