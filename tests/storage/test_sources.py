"""Gaps in the numbers of each source, however its events arrive."""

import random
from dataclasses import replace
from datetime import timedelta

import pytest
from arriving import NOW, refused, store, told
from hypothesis import given
from hypothesis import strategies as st

from storage import sources
from storage.sources import GAPS, MOST, RESTART, SOURCES


def after(*numbers: int) -> tuple[int | None, int]:
    """The last number and how many are missing, of a source that sent these."""
    found = sources._counted(sources.Source("s", None, (), 0, 0, 0, NOW), [(seq, False) for seq in numbers])
    return found.last_seq, found.missing


@pytest.mark.parametrize(
    ("numbers", "last", "missing"),
    [
        ((0, 1, 2), 2, 0),
        ((57, 58), 58, 0),  # it was counting before we listened
        ((1, 2, 5), 5, 2),
        ((1, 2, 5, 3), 5, 1),  # late
        ((1, 2, 5, 4, 3), 5, 0),
        ((1, 5, 5, 5), 5, 3),  # the same number again tells nothing
        ((5, 4, 6), 6, 0),  # later than the first that we saw: it never counted as missing
        ((0, 2, 3, 1, 4), 4, 0),  # the second one, late: no restart
        ((1, 2, 0, 1, 2), 2, 0),  # restarted, at 0
        ((500, 501, 1, 2), 2, 0),  # restarted, at 1
        ((500, 503, 1, 2), 2, 2),  # restarted; what was missing before stays so
        ((5000, 3999, 4000), 4000, 0),  # so far below that it was restarted
        ((5000, 4000, 5001), 5001, 0),  # just late
        ((1, 3, 2**53 - 1), 2**53 - 1, MOST),
        ((2**53 - 1, 0), 0, 0),
    ],
)
def test_numbers_that_are_left_out_are_missing_until_they_arrive(numbers, last, missing):
    assert after(*numbers) == (last, missing)


def test_the_limits_of_a_restart_are_exact():
    assert after(2000, 2000 - RESTART) == (2000, 0)
    assert after(2000, 2000 - RESTART - 1) == (2000 - RESTART - 1, 0)
    assert after(0, 5000, 1) == (5000, 4998), "what is missing may arrive however late"


@given(st.permutations(range(2, 40)), st.sets(st.integers(3, 38), max_size=10))
def test_in_whatever_order_they_come_those_that_never_came_are_missing(order, lost):
    came = [1, *(seq for seq in order if seq not in lost)]
    assert after(*came) == (39 if 39 not in lost else max(came), len(lost))


@given(st.lists(st.integers(0, 2**53 - 1), min_size=1, max_size=50))
def test_whatever_numbers_come_the_counts_stay_small_and_none_is_negative(numbers):
    last, missing = after(*numbers)
    assert last in numbers
    assert 0 <= missing <= MOST


def test_missing_numbers_are_known_as_ranges_and_the_oldest_give_way():
    def gaps(*numbers: int) -> sources.Gaps:
        before = sources.Source("s", None, (), 0, 0, 0, NOW)
        return sources._counted(before, [(seq, False) for seq in numbers]).gaps

    assert gaps(1, 2, 6) == ((3, 5),)
    assert gaps(1, 6, 4) == ((2, 3), (5, 5))
    assert gaps(1, 6, 2, 5, 3, 4) == ()
    assert gaps(1, 3, 5, 3, 3) == ((2, 2), (4, 4))
    assert gaps(500, 503, 1) == (), "a source that was restarted does not send the old ones"
    assert len(gaps(*range(0, 1000, 2))) == GAPS


async def test_each_source_of_each_user_is_counted_by_itself(events, ann, bob):
    await store(events, *(told(ann, "m", source="a", seq=seq, id=seq) for seq in (1, 2, 4)))
    await store(events, *(told(ann, "m", source="b", seq=seq, id=seq) for seq in (10, 20)), told(ann, "m", v=1))
    await store(events, told(bob, "m", source="a", seq=99))
    found = {one.source: one for one in await events.sources(ann.id)}
    assert {name: (one.last_seq, one.missing, one.events) for name, one in found.items()} == {
        "": (None, 0, 1),
        "a": (4, 1, 3),
        "b": (20, 9, 2),
    }
    assert await events.missing() == 10
    await store(events, told(ann, "m", source="a", seq=3, id=3))
    assert await events.missing() == 9
    assert [one.missing for one in await events.sources(bob.id)] == [0]


async def test_a_repeated_event_is_counted_as_a_repeat_and_fills_no_gap(events, ann):
    sent = [told(ann, "m", source="a", seq=seq, id=seq) for seq in (1, 2, 5)]
    await store(events, *sent)
    await store(events, *sent, sent[0])
    (source,) = await events.sources(ann.id)
    assert (source.last_seq, source.missing, source.events, source.duplicates) == (5, 2, 3, 4)


async def test_a_source_that_is_silent_for_long_is_known_by_its_last_time(events, ann):
    await store(events, told(ann, "m", source="a"))
    assert [one.last for one in await events.sources(ann.id)] == [NOW]


async def test_huge_numbers_of_many_sources_do_not_overflow_the_sum(events, ann):
    for seq in (0, 2**53 - 1):
        await store(events, *(told(ann, "m", source=f"s{at}", seq=seq, id=f"{at}/{seq}") for at in range(900)))
    assert await events.missing() == 900 * MOST


async def test_threat_19_a_device_that_names_itself_anew_each_time_fills_no_table(events, ann, bob):
    await store(events, told(bob, "m", source="lamp", seq=1))
    await store(events, told(ann, "m", source="lamp", seq=1), now=NOW)
    for at in range(4):
        now = NOW + timedelta(minutes=at)
        new = [told(ann, "m", source=f"{at}-{name}", seq=1) for name in range(300)]
        await store(events, *new, told(ann, "m", source="lamp", seq=2 + at), now=now)
    known = {one.source: one for one in await events.sources(ann.id)}
    assert len(known) == SOURCES
    assert {"lamp", "3-0", "3-299"} <= known.keys()
    assert (known["lamp"].last_seq, known["lamp"].missing) == (5, 0)
    assert [one.source for one in await events.sources(bob.id)] == ["lamp"]


async def test_threat_21_a_shuffled_stream_leaves_no_gap(events, ann):
    sent = [told(ann, "m", source="a", seq=seq, id=seq) for seq in range(400)]
    dice = random.Random(3)
    for begin in range(0, 400, 40):  # within a window of the broker
        window = sent[begin : begin + 40]
        head, tail = ([window[0]], window[1:]) if begin == 0 else ([], window)
        dice.shuffle(tail)
        await store(events, *head, *tail[:15])
        await store(events, *(replace(one, again=True) for one in tail[10:]))
    (source,) = await events.sources(ann.id)
    assert (source.last_seq, source.missing, source.events, source.duplicates) == (399, 0, 400, 50)


async def test_dead_letters_are_no_events_of_a_source(events, ann):
    await store(events, refused(ann))
    assert await events.sources(ann.id) == []
