"""Pages and the waiting room: who comes first, who gives way, who waits, and what comes back."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from workbench import plain_tiers

from persona.engine.pages import Idle, PagePool
from persona.engine.scheduler import Scheduler
from persona.engine.sequence import Sequence


def test_pages_come_back_and_the_list_that_gave_them_is_empty() -> None:
    pool = PagePool(3, 8)
    pages = pool.take(2)
    assert pages is not None
    assert pool.take(2) is None
    pool.check([pages])
    pool.give(pages)
    assert pages == []
    assert pool.free == 3
    pool.check([])


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_a_page_holds_its_size(tokens: int, pages: int) -> None:
    assert PagePool(10, 8).needed(tokens) == pages


def test_a_leak_is_noticed() -> None:
    pool = PagePool(3, 8)
    pool.take(1)
    with pytest.raises(AssertionError, match="leaked"):
        pool.check([])


class Things:
    """A kind of what pages hold: each thing is idle from the moment it comes."""

    def __init__(self, pool: PagePool) -> None:
        self.pool, self.here = pool, dict[str, tuple[int, list[int]]]()
        pool.join(self)

    def come(self, name: str, pages: list[int] | None) -> None:
        assert pages is not None
        self.here[name] = self.pool.now(), pages

    @property
    def idle_pages(self) -> int:
        return sum(len(pages) for _, pages in self.here.values())

    def idle(self) -> Iterator[Idle]:
        for name, (since, pages) in self.here.items():
            yield Idle(since, pages, partial(self._leave, name))

    def _leave(self, name: str) -> None:
        if name in self.here:
            self.pool.give(self.here.pop(name)[1])


def test_context_comes_from_the_bottom_and_runs_from_the_top() -> None:
    pool = PagePool(8, 8)
    assert pool.take(2) == [0, 1]
    assert pool.take_run(3) == [5, 6, 7]
    assert pool.take_run(4) is None
    assert pool.take_run(3) == [2, 3, 4]
    assert pool.take(1) is None


def test_the_longest_unused_gives_way_whatever_it_is() -> None:
    pool = PagePool(8, 8)
    texts, adapters = Things(pool), Things(pool)
    texts.come("old text", pool.take(2))
    adapters.come("old adapter", pool.take_run(2))
    texts.come("text", pool.take(2))
    adapters.come("adapter", pool.take_run(2))
    assert pool.take(1) == [0]
    assert [*texts.here, *adapters.here] == ["text", "old adapter", "adapter"]
    assert pool.take(2) == [1, 6]
    assert [*texts.here, *adapters.here] == ["text", "adapter"]
    assert pool.available == 5


@pytest.mark.parametrize(("spared", "left", "run"), [([], "bc", [6, 7]), ([6, 7], "ac", [0, 1])])
def test_a_run_is_made_where_it_costs_the_least(spared: list[int], left: str, run: list[int]) -> None:
    pool = PagePool(8, 8)
    things = Things(pool)
    things.come("a", pool.take_run(2))
    pool.take_run(2)  # in use
    things.come("b", pool.take(2))
    things.come("c", pool.take(2))
    assert pool.take_run(2, spared) == run
    assert "".join(sorted(things.here)) == left


def test_a_run_that_pages_in_use_break_up_is_not_to_be_had_and_nobody_leaves_for_it() -> None:
    pool = PagePool(5, 8)
    things = Things(pool)
    things.come("text", pool.take(2))
    pool.take(1)
    assert pool.available == 4
    assert pool.take_run(3) is None
    assert pool.take_run(6) is None
    assert things.here


def sequence(number: int, prompt: int, reply: int, background: bool = False) -> Sequence:
    made = Sequence(number, [0] * prompt, prompt, prompt + reply, background=background)
    made.targets = (1,) if background else ()
    return made


def scheduler(pages: int = 8, running: int = 4, prefill: int = 16) -> Scheduler:
    pool = PagePool(pages, 8)
    return Scheduler(pool, plain_tiers(pool), max_running=running, max_waiting=3, prefill_tokens=prefill)


def test_the_waiting_room_is_crowded_beyond_its_bound_and_scores_wait_elsewhere() -> None:
    rooms = scheduler()
    for number in range(3):
        rooms.add(sequence(number, 8, 8))
        rooms.add(sequence(10 + number, 8, 8, background=True))
        assert not rooms.crowded()
    assert rooms.crowded(1)
    rooms.add(sequence(3, 8, 8))
    assert rooms.crowded()


def test_nobody_overtakes_a_large_request() -> None:
    rooms = scheduler(pages=4)
    large, small = sequence(1, 16, 16), sequence(2, 4, 4)
    first = sequence(0, 8, 8)
    for one in (first, large, small):
        rooms.add(one)
    assert [s.sequence for s in rooms.plan().prefill] == [first]
    rooms.remove(first)
    assert [s.sequence for s in rooms.plan().prefill] == [large]


def test_chat_goes_before_scoring() -> None:
    rooms = scheduler(running=1)
    rooms.add(sequence(1, 8, 8, background=True))
    rooms.add(sequence(2, 8, 8))
    assert [s.sequence.id for s in rooms.plan().prefill] == [2]


def test_a_long_prompt_is_prefilled_in_pieces_beside_the_running_rows() -> None:
    rooms = scheduler(pages=20)
    running, long = sequence(1, 4, 40), sequence(2, 40, 8)
    rooms.add(running)
    rooms.plan()
    running.computed = 4
    rooms.add(long)
    borders = []
    while long.prefilling:
        plan = rooms.plan()
        assert plan.decode == [running]
        (segment,) = plan.prefill
        borders.append((segment.start, segment.end))
        long.computed = segment.end
    assert borders == [(0, 16), (16, 32), (32, 40)]


@given(st.lists(st.integers(-1, 5), min_size=1, max_size=40), st.data())
def test_a_run_is_where_the_latest_use_is_the_earliest_and_the_highest_of_those(used: list[int], data: Any) -> None:
    count = data.draw(st.integers(1, len(used)))
    latest = {start: max(used[start : start + count]) for start in range(len(used) - count + 1)}
    start = max(start for start in latest if latest[start] == min(latest.values()))
    assert PagePool(len(used), 16)._oldest_run(used, count) == range(start, start + count)
