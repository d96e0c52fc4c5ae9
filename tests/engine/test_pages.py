"""Pages and the waiting room: whatever comes and goes, no page is lost and none has two owners."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from persona.engine.pages import PagePool
from persona.engine.scheduler import Scheduler, Sequence


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


def sequence(number: int, prompt: int, reply: int, background: bool = False) -> Sequence:
    made = Sequence(number, [0] * prompt, prompt, prompt + reply, background=background)
    made.targets = (1,) if background else ()
    return made


def scheduler(pages: int = 8, running: int = 4, prefill: int = 16) -> Scheduler:
    return Scheduler(PagePool(pages, 8), max_running=running, max_waiting=3, prefill_tokens=prefill)


def test_the_waiting_room_is_full_at_its_bound() -> None:
    rooms = scheduler()
    for number in range(3):
        assert not rooms.full()
        rooms.add(sequence(number, 8, 8))
    assert rooms.full()


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


class Rooms(RuleBasedStateMachine):
    """Arrivals, steps and departures in any order."""

    @initialize(pages=st.integers(4, 24), running=st.integers(1, 6), prefill=st.integers(1, 40))
    def open(self, pages: int, running: int, prefill: int) -> None:
        self.rooms = scheduler(pages, running, prefill)
        self.running, self.prefill = running, prefill
        self.here: list[Sequence] = []
        self.count = 0

    @rule(prompt=st.integers(1, 60), reply=st.integers(1, 60), background=st.booleans())
    def arrive(self, prompt: int, reply: int, background: bool) -> None:
        if self.rooms.fits(prompt + reply):
            self.count += 1
            one = sequence(self.count, prompt, reply, background)
            self.here.append(one)
            self.rooms.add(one)

    @rule()
    def step(self) -> None:
        plan = self.rooms.plan()
        assert sum(s.end - s.start for s in plan.prefill) <= self.prefill
        assert len({id(s) for s in [*plan.decode, *(s.sequence for s in plan.prefill)]}) == len(plan.decode) + len(
            plan.prefill
        )
        assert bool(plan) == (not self.rooms.idle)
        for one in plan.decode:
            one.computed += 1
            self._extend(one)
        for segment in plan.prefill:
            assert segment.start == segment.sequence.computed < segment.end
            segment.sequence.computed = segment.end
            if not segment.sequence.prefilling:
                self._extend(segment.sequence)

    @precondition(lambda self: self.here)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.here))
        self._end(one)

    @rule()
    def everybody_leaves(self) -> None:
        for one in list(self.here):
            self._end(one)
        assert self.rooms.idle
        assert self.rooms.pool.free == self.rooms.pool.total

    def _extend(self, one: Sequence) -> None:
        assert len(one.pages) * 8 >= one.limit
        one.tokens.append(0)
        if one.background or len(one.tokens) >= one.limit:
            self._end(one)

    def _end(self, one: Sequence) -> None:
        self.here.remove(one)
        self.rooms.remove(one)
        assert one.pages == []

    @invariant()
    def nothing_leaked(self) -> None:
        if hasattr(self, "rooms"):
            self.rooms.check()
            assert self.rooms.running <= self.running
            assert self.rooms.running + self.rooms.waiting == len(self.here)


TestRooms = Rooms.TestCase
TestRooms.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
