"""Pages and the waiting room: who comes first, who waits, and what comes back."""

import pytest

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
