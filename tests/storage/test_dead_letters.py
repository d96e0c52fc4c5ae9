"""Refused messages: each is counted, the first ones are kept, a flood costs a row a minute."""

from dataclasses import replace
from datetime import timedelta

import pytest
from arriving import DEAD, NOW, refused, store, told

from persona.event import Reason
from storage.dead import MAX_KIND, MAX_NAME, MAX_NAMES, Letter

CANARY = "xylophonquartz"


async def rows(events, user=None) -> list[tuple[str, str, int, bool]]:
    """(name, reason, count, whether the payload is there)"""
    letters = await events.letters(user.id if user else None, limit=10_000)
    return [(letter.name, letter.reason.value, letter.count, letter.payload is not None) for letter in letters]


async def test_a_refused_message_is_kept_with_its_reason_and_payload(events, ann):
    assert await store(events, refused(ann, kind="note", payload=b"\xff{")) == [DEAD]
    (letter,) = await events.letters(ann.id)
    assert (letter.name, letter.kind, letter.reason, letter.payload) == ("ann", "note", Reason.BAD_JSON, b"\xff{")
    assert (letter.count, letter.first, letter.last) == (1, NOW, NOW)
    assert letter.detail.endswith(".")
    assert await events.letter(letter.id) == letter


@pytest.mark.parametrize("kept", [0, 1, 3])
async def test_threat_19_the_first_of_a_minute_keep_their_payload_and_a_flood_costs_one_row(events, ann, kept):
    for _ in range(4):
        await store(events, *(refused(ann) for _ in range(250)), kept=kept)
    expected = [("ann", "bad_json", 1, True)] * kept + [("ann", "bad_json", 1000 - kept, False)]
    assert sorted(await rows(events, ann)) == sorted(expected)


async def test_users_reasons_and_minutes_are_counted_apart(events, ann, bob):
    later = NOW + timedelta(minutes=1)
    rate = refused(ann, Reason.RATE, payload=None)
    batch = [refused(ann), refused(ann), refused(bob), rate, refused(ann, last=later)]
    await store(events, *batch, kept=0)
    assert sorted(await rows(events)) == [
        ("ann", "bad_json", 1, False),
        ("ann", "bad_json", 2, False),
        ("ann", "rate", 1, False),
        ("bob", "bad_json", 1, False),
    ]


async def test_an_aggregated_row_knows_its_first_and_its_last_time(events, ann):
    moments = [NOW + timedelta(seconds=at) for at in (5, 20, 59)]
    for moment in moments:
        await store(events, refused(ann, last=moment), kept=0)
    (letter,) = await events.letters(ann.id)
    assert (letter.first, letter.last, letter.count) == (moments[0], moments[2], 3)


async def test_letters_that_stand_for_many_add_up(events, ann):
    shed = refused(ann, Reason.OVERFLOW, payload=None, count=400)
    await store(events, shed, shed)
    assert await rows(events, ann) == [("ann", "overflow", 800, False)]


async def test_without_a_limit_no_letter_is_written(events, ann):
    assert await store(events, refused(ann), told(ann, "feedback", turn=9, rating=1), kept=None) == [DEAD, DEAD]
    assert await rows(events) == []


async def test_threat_02_a_user_sees_only_their_own_letters(events, ann, bob):
    await store(events, refused(ann), refused(bob), refused(None, Reason.UNKNOWN_USER, name="eve"))
    assert [name for name, *_ in await rows(events, ann)] == ["ann"]
    assert [name for name, *_ in await rows(events)] == ["ann", "bob", "eve"]
    theirs = (await events.letters(bob.id))[0]
    assert await events.letter(theirs.id, ann.id) is None
    assert await events.letter(theirs.id, bob.id) == theirs
    assert await events.letter(12345) is None


async def test_letters_come_in_pages(events, ann):
    await store(events, *(refused(ann) for _ in range(5)))
    first = await events.letters(ann.id, limit=2)
    rest = await events.letters(ann.id, after=first[-1].id, limit=100)
    assert [letter.id for letter in [*first, *rest]] == [1, 2, 3, 4, 5]


async def test_threat_19_a_flood_of_unknown_names_stays_small(events):
    for begin in range(0, 2000, 500):
        some = [refused(None, Reason.UNKNOWN_USER, name=f"eve{at}") for at in range(begin, begin + 500)]
        await store(events, *some, kept=10)
    found = await rows(events)
    assert len(found) == MAX_NAMES + 1
    assert sum(whole for *_, whole in found) == 10
    assert sum(count for _, _, count, _ in found) == 2000
    assert [count for name, _, count, _ in found if not name] == [2000 - MAX_NAMES]


async def test_one_unknown_name_that_shouts_keeps_its_name(events):
    await store(events, *(refused(None, Reason.UNKNOWN_USER, name="eve") for _ in range(300)), kept=2)
    assert await rows(events) == [("eve", "unknown_user", 1, True)] * 2 + [("eve", "unknown_user", 298, False)]


async def test_what_a_topic_claims_is_short_and_printable_and_never_somebody_elses_name(events):
    long = "a" * MAX_NAME
    await store(
        events,
        refused(None, Reason.UNKNOWN_USER, name=long + "x", kind="k" * 1000),
        refused(None, Reason.UNKNOWN_USER, name="a\nb\x1b[2J", kind="\0"),
    )
    cut, odd = await events.letters(None)
    assert len(cut.name) == MAX_NAME
    assert cut.name != long
    assert len(cut.kind) == MAX_KIND
    assert (odd.name, odd.kind) == ("a?b?[2J", "?")


async def test_dropped_letters_are_gone_to_the_last_byte(events, ann, tmp_path):
    await store(events, refused(ann, payload=CANARY.encode()), refused(ann))
    assert await events.drop_letters([1, 77]) == 1
    assert [letter.id for letter in await events.letters(ann.id)] == [2]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


async def test_an_anonymous_letter_says_nothing_but_that_it_was(events, users, ann):
    late = told(ann, text=CANARY, delivery=b"mark")
    await users.forget(ann.id)
    assert await store(events, late, refused(ann, payload=CANARY.encode())) == [DEAD, DEAD]
    (letter,) = await events.letters(None)
    assert letter == replace(Letter.anonymous(Reason.FORGOTTEN, NOW), count=2, id=letter.id, first=NOW)
    assert (letter.user_id, letter.name, letter.kind, letter.payload) == (None, "", "", None)
