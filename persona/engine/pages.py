"""Pages of the one device memory, as plain integers: who gets them, and who gives way when they run short.

    0   1   2   3   …                                             …   total − 1
    context takes single pages, lowest first →     ← an adapter takes a run of neighbours, highest first

Free pages go first. Then whatever is not in use gives way, what was last used longest ago before the rest, be it cached
text or an adapter: so neither kind can starve the other, and memory drifts to whichever is wanted. Pages in use never
move. Whoever takes a page gives it back; `check()` proves that nothing leaked. Knows nothing of tensors.
"""

import heapq
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

_FREE = -1  # earlier than any use


class Idle(NamedTuple):
    """Pages that hold something which nobody uses."""

    since: int  # by the pool's clock; no two have the same
    pages: Sequence[int]
    leave: Callable[[], None]  # gives them back, and does nothing when that has happened


class Holder(Protocol):
    """One kind of what pages hold."""

    @property
    def idle_pages(self) -> int:
        """How many of its pages nobody uses."""
        ...

    def idle(self) -> Iterator[Idle]:
        """What nobody uses, longest unused first."""
        ...


class PagePool:
    """`total` pages of `size` tokens each."""

    def __init__(self, total: int, size: int) -> None:
        self.total, self.size = total, size
        self._free = list(range(total))  # ascending
        self._holders: list[Holder] = []
        self._clock = 0

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that are free or would be if all that is idle left."""
        return self.free + sum(holder.idle_pages for holder in self._holders)

    def join(self, holder: Holder) -> None:
        """From now on this one is asked, too, when pages run short."""
        self._holders.append(holder)

    def now(self) -> int:
        """A moment later than all before."""
        self._clock += 1
        return self._clock

    def needed(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, the lowest that are free once enough are; None, and nobody left, if there are not as many."""
        if count > self.available:
            return None
        leaving, missing = list[Idle](), count - self.free
        for one in heapq.merge(*(holder.idle() for holder in self._holders), key=lambda idle: idle.since):
            if missing <= 0:
                break
            leaving.append(one)
            missing -= len(one.pages)
        for one in leaving:
            one.leave()
        taken = self._free[:count]
        del self._free[:count]
        return taken

    def take_run(self, count: int, spared: Collection[int] = ()) -> list[int] | None:
        """`count` neighbours, the highest of those that were longest unused; None if pages in use stand between all.

        spared: idle pages that count as in use.
        """
        if count > self.available - len(spared):
            return None
        in_use = self._clock + 1
        used = [in_use] * self.total  # when each page was last used
        for page in self._free:
            used[page] = _FREE
        run = self._oldest_run(used, count)
        if max(used[page] for page in run) == _FREE:
            return self._claim(run)
        holding: dict[int, Idle] = {}
        for one in chain.from_iterable(holder.idle() for holder in self._holders):
            for page in one.pages:
                used[page], holding[page] = one.since, one
        for page in spared:
            used[page] = in_use
        run = self._oldest_run(used, count)
        if max(used[page] for page in run) == in_use:
            return None
        for page in run:
            if page in holding:
                holding[page].leave()
        return self._claim(run)

    def give(self, pages: list[int]) -> None:
        """Return pages and empty the list, so that none can be given twice."""
        for page in pages:
            insort(self._free, page)
        pages.clear()

    def check(self, held: Iterable[Collection[int]]) -> None:
        """Assert that free pages and the `held` ones are all pages, each once."""
        everything = sorted([*self._free, *(page for pages in held for page in pages)])
        assert everything == list(range(self.total)), "pages leaked or were given twice"

    def _oldest_run(self, used: list[int], count: int) -> range:
        """The `count` neighbours whose latest use is the earliest; among equals the highest."""
        best, start = math.inf, 0
        falling = deque[int]()  # of the run at hand, the pages that were used later than all behind them
        for page in range(self.total - 1, -1, -1):
            while falling and used[falling[-1]] <= used[page]:
                falling.pop()
            falling.append(page)
            if falling[0] >= page + count:
                falling.popleft()
            if page + count <= self.total and used[falling[0]] < best:
                best, start = used[falling[0]], page
        return range(start, start + count)

    def _claim(self, run: range) -> list[int]:
        at = bisect_left(self._free, run.start)
        taken = self._free[at : at + len(run)]
        del self._free[at : at + len(run)]
        assert taken == list(run), "a run that is not free"
        return taken
