"""DESIGN.md, section 6, «Turn identity» and «What is not history», sentence by sentence."""

import asyncio
from collections.abc import Sequence
from datetime import datetime

import pytest

from persona.domain import EntryId, Finish, Message, Origin, Role, User
from persona.errors import NotFound
from storage import identity
from storage.database import Database
from storage.history import History
from storage.users import Users


async def texts(history: History, user: User) -> list[str]:
    return [entry.text for entry in await history.page(user.id)]


async def ids(history: History, user: User) -> list[EntryId]:
    return [entry.id for entry in await history.page(user.id)]


async def test_a_first_message_is_stored_as_the_users_own(place, history, ann, now):
    placed = await place("hello")
    (entry,) = await history.page(ann.id)
    assert placed.user_entry == placed.tail == entry.id
    assert placed.known == (entry.id,)
    assert placed.conversation == entry.conversation
    assert (entry.role, entry.origin, entry.text, entry.ts) == (Role.USER, Origin.CHAT, "hello", now)
    assert (entry.tokens, entry.parent) == (len("hello"), None)


async def test_clients_resend_the_whole_conversation_and_only_unseen_turns_are_stored(place, answer, history, ann):
    first = await place("hello")
    replied = await answer(first, "Hi!")
    second = await place("hello", "Hi!", "how are you?")
    assert await texts(history, ann) == ["hello", "Hi!", "how are you?"]
    assert second.known == (first.user_entry, replied, second.user_entry)
    assert second.conversation == first.conversation
    assert [entry.parent for entry in await history.page(ann.id)] == [None, first.tail, replied]


async def test_messages_are_matched_per_user(place, history, users, ann):
    bob = await users.add("bob")
    mine = await place("hello")
    theirs = await place("hello", user=bob.id)
    assert mine.known != theirs.known
    assert mine.conversation != theirs.conversation
    assert await texts(history, bob) == ["hello"]


async def test_the_chain_is_salted_so_that_equal_texts_of_two_users_have_different_hashes(place, db, users, ann):
    bob = await users.add("bob")
    await place("hello")
    await place("hello", user=bob.id)
    async with db.read() as connection:
        chains = (await connection.exec_driver_sql("SELECT chain FROM entries")).scalars().all()
    assert len(set(chains)) == 2


async def test_the_last_message_sent_again_before_a_reply_is_not_stored_twice(place, history, ann):
    first = await place("hello")
    again = await place("hello")
    assert again.tail == first.tail
    assert again.user_entry is None
    assert await texts(history, ann) == ["hello"]


async def test_the_last_message_sent_again_after_a_reply_is_not_stored_twice(place, answer, history, ann):
    first = await place("hello")
    await answer(first, "Hi!", Finish.ABORT)
    again = await place("hello")
    assert (again.tail, again.conversation) == (first.tail, first.conversation)
    replied = await answer(again, "Hi there!")
    assert await texts(history, ann) == ["hello", "Hi!", "Hi there!"]
    third = await place("hello", "Hi there!", "good")
    assert third.known == (first.tail, replied, third.user_entry)


async def test_the_same_reply_again_from_the_same_version_is_one_entry(place, answer, history, ann):
    first = await place("hello")
    assert await answer(first, "Hi!", version=1) == await answer(await place("hello"), "Hi!", version=1)
    other = await answer(await place("hello"), "Hi!", version=2)
    assert [entry.version for entry in await history.page(ann.id)] == [None, 1, 2]
    assert (await place("hello", "Hi!", "good")).known[1] == other


async def test_a_changed_earlier_message_opens_a_branch_that_shares_what_came_before(place, answer, history, ann):
    first = await place("one")
    two = await answer(first, "two")
    old = await place("one", "two", "three")
    await answer(old, "four")
    new = await place("one", "two", "three, but different")
    assert new.conversation != old.conversation
    assert new.known == (first.tail, two, new.user_entry)
    branch = await history.conversation(ann.id, new.tail)
    assert [entry.text for entry in branch] == ["one", "two", "three, but different"]
    assert await texts(history, ann) == ["one", "two", "three", "four", "three, but different"]


async def test_a_changed_first_message_opens_a_conversation_that_shares_nothing(place, answer, history, ann):
    old = await place("one")
    await answer(old, "two")
    new = await place("uno", "two", "three")
    assert new.conversation != old.conversation
    assert len(new.known) == 3
    assert old.tail not in new.known


async def test_a_turn_in_the_same_place_goes_on_with_the_branch_it_belongs_to(place, answer, history, ann):
    await answer(await place("one"), "two")
    await place("one", "two", "left")
    right = await place("one", "two", "right")
    await answer(right, "four")
    further = await place("one", "two", "right", "four", "five")
    assert further.conversation == right.conversation
    assert [entry.text for entry in await history.conversation(ann.id, further.tail)][2] == "right"


async def test_conversation_id_overrides(place, history, ann):
    kitchen = await place("lights on", to="kitchen")
    garage = await place("lights on", to="garage")
    assert (kitchen.conversation, garage.conversation) == ("kitchen", "garage")
    assert kitchen.tail != garage.tail
    again = await place("lights on", to="kitchen")
    assert again.known == kitchen.known
    changed = await place("lights off", "done", "thanks", to="kitchen")
    assert changed.conversation == "kitchen"


async def test_with_conversation_id_a_client_may_send_the_newest_message_alone(place, answer, history, ann):
    first = await place("lights on", to="kitchen")
    done = await answer(first, "Done.")
    second = await place("and off", to="kitchen")
    assert second.known == (done, second.user_entry)
    assert [e.text for e in await history.conversation(ann.id, second.tail)] == ["lights on", "Done.", "and off"]
    await answer(second, "Off.")
    retry = await place("and off", to="kitchen")
    assert (retry.tail, retry.user_entry) == (second.tail, None)
    yes = await place("yes", to="kitchen")
    await answer(yes, "Sure?")
    await answer(await place("really", to="kitchen"), "OK.")
    assert (await place("yes", to="kitchen")).user_entry is not None


async def test_a_client_that_drops_the_beginning_still_meets_its_turns(place, answer, history, ann):
    await answer(await place("one"), "two")
    await answer(await place("one", "two", "three"), "four")
    before = await texts(history, ann)
    placed = await place("three", "four", "five")
    assert await texts(history, ann) == [*before, "five"]
    assert len(placed.known) == 3
    assert [entry.text for entry in await history.conversation(ann.id, placed.tail)] == [*before, "five"]


@pytest.mark.parametrize("reply", [False, True])
async def test_a_client_that_drops_the_beginning_does_not_bring_a_deleted_turn_back(place, answer, history, ann, reply):
    """The window begins with the deleted question, or the deleted reply is its second message."""
    await answer(await place("one"), "two")
    asked = await place("one", "two", "secret")
    replied = await answer(asked, "four")
    await history.delete(ann.id, asked.tail)
    if reply:
        await history.delete(ann.id, replied)
    before = await texts(history, ann)
    placed = await place("secret", "four", "five")
    assert await texts(history, ann) == [*before, "five"]
    assert placed.known[-1] == placed.user_entry
    again = await place("one", "two", "secret", "four", "five")
    assert again.user_entry is None or await texts(history, ann) == [*before, "five", "five"]
    assert "secret" not in await texts(history, ann)


async def test_words_of_a_deleted_turn_may_be_said_again_elsewhere(place, answer, history, ann):
    asked = await place("one")
    await answer(asked, "two")
    await history.delete(ann.id, asked.tail)
    await place("hello", "hi", "one")
    assert (await texts(history, ann))[-1] == "one"


async def test_an_equal_sentence_in_another_conversation_is_no_middle(place, answer, history, ann):
    await answer(await place("one"), "two")
    await answer(await place("one", "two", "thanks"), "welcome")
    other = await place("thanks", "no worries", "bye")
    assert len(other.known) == 3
    assert other.known[0] == other.known[-1] - 2


async def test_assistant_text_that_we_did_not_generate_is_stored_but_not_as_a_reply(place, history, ann):
    await place("hello", "I am another model.", "oh")
    entries = await history.page(ann.id)
    assert [(entry.role, entry.origin) for entry in entries] == [
        (Role.USER, Origin.CHAT),
        (Role.ASSISTANT, Origin.CHAT),
        (Role.USER, Origin.CHAT),
    ]
    with pytest.raises(NotFound):
        await history.feedback(ann.id, entries[1].id, 1, None)


async def test_our_reply_is_recognised_when_it_comes_back(place, answer, history, ann):
    replied = await answer(await place("hello"), "Hi!")
    await place("hello", "Hi!", "bye")
    reply = await history.get(ann.id, replied)
    assert (reply.origin, reply.finish, reply.role) == (Origin.REPLY, Finish.STOP, Role.ASSISTANT)
    assert len(await history.page(ann.id)) == 3


@pytest.mark.parametrize(
    "thinking",
    ["<think>hm\n\nwell</think>Hi!", "hm well</think>\n\nHi!", "Hi!<think>and then", "<think></think>Hi!\n"],
)
async def test_think_blocks_are_stripped_from_history(place, answer, history, ann, thinking):
    replied = await answer(await place("hello"), thinking)
    assert (await history.get(ann.id, replied)).text == "Hi!"
    with_thought = await place("hello", thinking, "bye")
    assert replied in with_thought.known
    assert (await place("hello", "Hi!", "bye")).known == with_thought.known
    assert "think" not in " ".join(await texts(history, ann))


async def test_think_blocks_of_other_models_and_of_users_are_stripped_too(place, history, ann):
    await place("<think>secret</think>hello", "<think>plan</think>ok", "a <think> tag is not closed here")
    assert await texts(history, ann) == ["hello", "ok", "a <think> tag is not closed here"]


def test_threat_16_unclosed_thoughts_cost_no_more_than_their_length():
    assert identity.clean(Role.USER, "<think>" * 100_000) == "<think>" * 100_000
    assert identity.clean(Role.ASSISTANT, "<think>" * 100_000 + "x") == ""


async def test_white_space_line_ends_and_composition_make_no_difference(place, history, ann):
    first = await place("caf\u00e9\r\nau lait ")
    assert (await place("cafe\u0301\nau lait")).known == first.known


async def test_neighbours_of_one_role_are_turns_of_their_own(history, ann, now):
    messages = [Message(Role.USER, "one"), Message(Role.USER, "two")]
    await history.place(ann.id, messages, conversation_id=None, now=now, count=len)
    assert await texts(history, ann) == ["one", "two"]


async def place_raw(history: History, user: User, messages: Sequence[Message], now: datetime, store: bool = True):
    return await history.place(user.id, messages, conversation_id=None, now=now, count=len, store=store)


async def test_system_and_tool_messages_are_not_history_and_not_in_the_chain(place, history, ann, now):
    first = await place("hello")
    noisy = [
        Message(Role.SYSTEM, "You are a pirate."),
        Message(Role.USER, "hello"),
        Message(Role.TOOL, "42 degrees"),
    ]
    assert (await place_raw(history, ann, noisy, now)).known == first.known
    assert await texts(history, ann) == ["hello"]


async def test_empty_messages_are_no_turns(place, history, ann, now):
    placed = await place_raw(history, ann, [Message(Role.USER, " \n"), Message(Role.ASSISTANT, "")], now)
    assert (placed.known, placed.tail, placed.user_entry) == ((), None, None)
    assert await texts(history, ann) == []


async def test_without_store_nothing_is_written_and_known_turns_are_still_recognised(place, answer, history, ann):
    first = await place("hello")
    replied = await answer(first, "Hi!")
    seen = await ids(history, ann)
    dry = await place("hello", "Hi!", "off the record", store=False)
    assert dry.known == (first.tail, replied)
    assert (dry.tail, dry.user_entry) == (replied, None)
    fresh = await place("nobody knows", store=False)
    assert (fresh.known, fresh.tail) == ((), None)
    assert await ids(history, ann) == seen


async def test_an_empty_reply_is_not_stored(place, answer, history, ann):
    assert await answer(await place("hello"), "", Finish.ABORT) is None
    assert await answer(await place("hello"), "<think>only a thought", Finish.LENGTH) is None
    assert await texts(history, ann) == ["hello"]


async def test_a_partial_reply_keeps_its_finish_and_version(place, answer, history, ann):
    replied = await answer(await place("hello"), "Well, I", Finish.ABORT, 3)
    entry = await history.get(ann.id, replied)
    assert (entry.finish, entry.version, entry.text) == (Finish.ABORT, 3, "Well, I")


async def test_the_same_request_ten_times_at_once_is_stored_once(place, history, ann):
    placed = await asyncio.gather(*(place("hello", "hi", "again") for _ in range(10)))
    assert await texts(history, ann) == ["hello", "hi", "again"]
    assert len({one.tail for one in placed}) == 1
    assert len({one.conversation for one in placed}) == 1


async def test_a_conversation_of_two_thousand_turns_is_matched(place, history, ann):
    said = [f"turn {at}" for at in range(2001)]
    await place(*said[:2000])
    assert len((await place(*said)).known) == 2001
    assert await history.last_id(ann.id) == 2001


async def test_text_that_a_database_cannot_hold_is_stored_without_what_it_cannot_hold(place, history, ann):
    await place("nul \0 and half a pair \ud83d")
    assert await texts(history, ann) == ["nul  and half a pair ?"]
    assert (await place("nul \0 and half a pair \ud83d")).user_entry is None


async def test_a_forgotten_user_is_not_brought_back_by_a_late_request_or_reply(place, answer, users: Users, db, ann):
    placed = await place("hello")
    await users.forget(ann.id)
    assert await answer(placed, "Hi!") is None
    with pytest.raises(NotFound):
        await place("late")
    assert await count(db, "entries") == 0


async def count(db: Database, table: str) -> int:
    async with db.read() as connection:
        return int((await connection.exec_driver_sql(f"SELECT count(*) FROM {table}")).scalar_one())


async def test_a_deleted_turn_is_not_brought_back_by_a_client_that_still_has_it(place, answer, history, ann):
    first = await place("my secret")
    replied = await answer(first, "Noted.")
    await history.delete(ann.id, first.tail)
    placed = await place("my secret", "Noted.", "what else?")
    assert await texts(history, ann) == ["Noted.", "what else?"]
    assert placed.known == (replied, placed.user_entry)
    await history.delete(ann.id, placed.tail)
    again = await place("my secret", "Noted.", "what else?")
    assert again.user_entry is None
    assert await texts(history, ann) == ["Noted."]
