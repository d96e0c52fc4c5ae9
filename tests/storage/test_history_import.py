"""Uploaded history is stored once, whole batches at a time."""

import asyncio
import contextlib
import json
from datetime import datetime, timedelta

import pytest

from persona.domain import EntryId, Line, Origin, Role
from persona.errors import NotFound, Unprocessable
from storage import import_lines
from storage.history import ImportItem
from storage.imports import MAX_CHARS, batches


async def test_an_item_keeps_its_time_context_and_role(history, ann, now):
    then = now - timedelta(days=9)
    context = (Line("bob", "hello?"), Line("eve", "hi \0"))
    items = [ImportItem(" hi all ", then, "1", context), ImportItem("hello", then, "2", role=Role.ASSISTANT)]
    assert await history.import_(ann.id, items, count=len, now=now) == (2, 0)
    first, second = await history.page(ann.id)
    assert (first.text, first.ts, first.tokens) == ("hi all", then, 6)
    assert first.context == (Line("bob", "hello?"), Line("eve", "hi "))
    assert (first.origin, first.role, second.role) == (Origin.IMPORT, Role.USER, Role.ASSISTANT)
    assert (second.context, second.parent) == ((), None)


@pytest.mark.parametrize("size", [0, 1, 499, 500, 501, 1203])
async def test_importing_twice_stores_once(history, ann, now, size):
    items = [ImportItem(f"text {at}", now, f"id-{at}") for at in range(size)]
    assert await history.import_(ann.id, iter(items), count=len, now=now) == (size, 0)
    assert await history.import_(ann.id, iter(items), count=len, now=now) == (0, size)
    assert [entry.text for entry in await history.page(ann.id, limit=5000)] == [item.text for item in items]


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (0, 1, []),
        (500, 1, [500]),
        (501, 1, [500, 1]),
        (17, 1 << 16, [16, 1]),
        (40, 1 << 15, [32, 8]),
        (33, (1 << 15) - 1, [33]),
    ],
)
def test_a_batch_ends_at_so_many_items_or_characters_context_included(now, count, size, expected):
    half = size // 2
    plain = [ImportItem("x" * size, now)] * count
    assert [len(batch) for batch in batches(plain)] == expected
    quoting = [ImportItem("x" * (size - half), now, context=(Line("", "y" * half),))] * count
    assert [len(batch) for batch in batches(quoting)] == expected


@pytest.mark.parametrize(("length", "fits"), [(MAX_CHARS, True), (MAX_CHARS + 1, False)])
@pytest.mark.parametrize("what", ["text", "context", "author"])
def test_text_and_context_have_a_limit_each(now, what, length, fits):
    said = {
        "text": {"text": "x" * length},
        "context": {"context": (Line("", "x" * 9), Line("", "x" * (length - 9)))},
        "author": {"context": (Line("x" * length, ""),)},
    }[what]
    told = f"longer than {MAX_CHARS} characters"
    refused = contextlib.nullcontext() if fits else pytest.raises(Unprocessable, match=told)
    with refused:
        ImportItem(**{"text": "hi", "ts": now, **said})


async def test_each_item_of_a_large_import_is_found_by_its_own_words(history, ann, bob, now):
    for user in (bob, ann):
        items = [ImportItem(f"{user.name} keeps crate{at} here", now, f"id-{at}") for at in range(501)]
        await history.import_(user.id, items, count=len, now=now)
    for at in (0, 1, 250, 499, 500):
        (found,) = await history.search(ann.id, f"crate{at}", limit=2)
        assert found.text == f"ann keeps crate{at} here"


async def test_without_an_id_time_and_text_name_an_item(history, ann, now):
    later = now - timedelta(seconds=1)
    items = [ImportItem("yes", now), ImportItem("yes", now), ImportItem("yes", later), ImportItem("no", now)]
    assert await history.import_(ann.id, items, count=len, now=now) == (3, 1)
    assert await history.import_(ann.id, items, count=len, now=now) == (0, 4)


async def test_with_an_id_the_text_makes_no_difference(history, ann, now):
    assert await history.import_(ann.id, [ImportItem("one", now, "7")], count=len, now=now) == (1, 0)
    assert await history.import_(ann.id, [ImportItem("two", now, "7")], count=len, now=now) == (0, 1)
    assert await history.import_(ann.id, [ImportItem("two", now)], count=len, now=now) == (1, 0)


async def test_two_users_may_import_the_same(history, ann, bob, now):
    items = [ImportItem("shared", now, "7")]
    assert await history.import_(ann.id, items, count=len, now=now) == (1, 0)
    assert await history.import_(bob.id, items, count=len, now=now) == (1, 0)


async def test_two_uploads_at_once_store_each_item_once(history, ann, now):
    items = [ImportItem(f"text {at}", now) for at in range(800)]
    results = await asyncio.gather(*(history.import_(ann.id, items, count=len, now=now) for _ in range(3)))
    assert sum(stored for stored, _ in results) == 800
    assert await history.own_tokens(ann.id, 0) == sum(len(item.text) for item in items)


async def test_threat_25_a_time_in_the_future_is_set_to_now(history, ann, now):
    ahead = [ImportItem("from the future", now + timedelta(days=400))]
    assert await history.import_(ann.id, ahead, count=len, now=now) == (1, 0)
    assert (await history.get(ann.id, 1)).ts == now
    assert await history.import_(ann.id, ahead, count=len, now=now + timedelta(days=1)) == (0, 1)


async def test_a_deleted_item_does_not_come_back_with_the_next_upload(history, ann, now):
    items = [ImportItem("keep", now), ImportItem("delete", now)]
    await history.import_(ann.id, items, count=len, now=now)
    await history.delete(ann.id, 2)
    assert await history.import_(ann.id, items, count=len, now=now) == (0, 2)
    assert [entry.text for entry in await history.page(ann.id)] == ["keep"]


async def test_a_line_of_an_export_is_known_by_its_entry_where_that_says_the_same(history, ann, now):
    await history.import_(ann.id, [ImportItem("here", now, "7")], count=len, now=now)
    items = [
        ImportItem("here", now, entry=EntryId(1)),
        ImportItem("of another place", now, entry=EntryId(1)),
        ImportItem("here", now - timedelta(seconds=1), entry=EntryId(1)),
        ImportItem("never here", now, entry=EntryId((1 << 63) - 1)),
    ]
    assert await history.import_(ann.id, items[:1], count=len, now=now) == (0, 1)
    assert await history.import_(ann.id, items, count=len, now=now) == (3, 1)
    answered = ImportItem("here", now, role=Role.ASSISTANT, entry=EntryId(1))
    assert await history.import_(ann.id, [answered], count=len, now=now) == (1, 0)


@pytest.mark.parametrize("entry", ["7", 7.0, -7, 0, 1 << 63, [7], None, True])
def test_what_others_call_entry_is_no_entry_of_ours(entry, now):
    line = json.dumps({"ts": 0, "text": "hi", "entry": entry}).encode()
    assert import_lines.item(1, import_lines.parse(1, line)).entry is None


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"text": " "}, "text"),
        ({"text": "<think>only</think>"}, "text"),
        ({"ts": datetime(2026, 1, 1)}, "ts"),
        ({"role": Role.SYSTEM}, "role"),
        ({"role": Role.TOOL}, "role"),
    ],
)
def test_an_impossible_item_is_refused_without_quoting_it(now, values, param):
    with pytest.raises(Unprocessable) as refusal:
        ImportItem(**{"text": "canary", "ts": now, **values})
    assert refusal.value.param == param
    assert "canary" not in str(refusal.value)


async def test_an_import_for_a_forgotten_user_is_refused(history, users, ann, now):
    await users.forget(ann.id)
    with pytest.raises(NotFound):
        await history.import_(ann.id, [ImportItem("late", now)], count=len, now=now)
