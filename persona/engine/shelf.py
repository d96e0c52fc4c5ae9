"""Adapters on the device: which pages each has, who uses it, who gives way first. Pure Python over integers.

    reserved ── filled by the loader thread ──> idle <── hold, release ──> in use

An adapter that is being filled or that a sequence uses never leaves, not even when its user is dropped: then nobody
finds it any more, and its pages come back with its last user.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from enum import Enum
from functools import partial
from typing import Generic, TypeVar

from persona.engine.pages import Idle, PagePool
from persona.engine.popularity import Popularity
from persona.engine.protocol import AdapterRef

T = TypeVar("T")


class Absent(Enum):
    """Why an adapter is not on the device."""

    COMING = "it is being loaded"
    NO_ROOM = "there are no pages for it now"


class Lease(Generic[T]):
    """A version's place on the device. Known by identity."""

    __slots__ = ("known", "pages", "ref", "since", "users", "value")

    def __init__(self, ref: AdapterRef, pages: list[int]) -> None:
        self.ref, self.pages = ref, pages
        self.value: T | None = None  # what stands in the pages, once they are filled
        self.users = 1  # the loader; later sequences and others that compute with it
        self.known = True  # whether somebody may find it
        self.since = 0  # when its last user let go of it, by the pool's clock


class Shelf(Generic[T]):
    """All adapters on the device: runs of pages of `pool`."""

    def __init__(self, pool: PagePool) -> None:
        self._pool, self._popularity = pool, Popularity()
        self._leases: dict[AdapterRef, Lease[T]] = {}
        self._forgotten: set[Lease[T]] = set()  # in use, and found no more
        self._line: dict[AdapterRef, int] = {}  # whose turn is near, and how many go before them
        pool.join(self)

    def __contains__(self, ref: AdapterRef) -> bool:
        """Whether it has a place, be it still empty."""
        return ref in self._leases

    @property
    def filled(self) -> list[T]:
        return [lease.value for lease in self._leases.values() if lease.value is not None]

    @property
    def idle_pages(self) -> int:
        return sum(len(lease.pages) for lease in self._leases.values() if not lease.users)

    @property
    def leases(self) -> list[Lease[T]]:
        """All that have pages."""
        return [*self._leases.values(), *self._forgotten]

    def reserve(self, ref: AdapterRef, count: int, spared: Collection[AdapterRef]) -> Lease[T] | None:
        """A run of pages to be filled; `spared` do not leave for it. None if there is no such run now."""
        kept = [lease for other in spared if (lease := self._leases.get(other)) and not lease.users]
        pages = self._pool.take_run(count, [page for lease in kept for page in lease.pages])
        if pages is None:
            return None
        lease = self._leases[ref] = Lease(ref, pages)
        return lease

    def hold(self, ref: AdapterRef) -> Lease[T] | None:
        """Use it, if it is there and filled."""
        lease = self._leases.get(ref)
        if lease is None or lease.value is None:
            return None
        lease.users += 1
        return lease

    def release(self, lease: Lease[T], cost: float | None = None) -> None:
        """Let go of it. cost: what getting it back would cost; None: it was not really used."""
        lease.users -= 1
        if cost is not None and lease.known:
            self._popularity.use(lease.ref, cost)
        if not lease.users:
            lease.since = self._pool.now()
            if not lease.known:
                self._forgotten.discard(lease)
                self._vacate(lease)

    def expect(self, line: Iterable[AdapterRef]) -> None:
        """Those whose turn is near, the next one first: as good as used, and the last in line leaves first."""
        self._line = {ref: place for place, ref in enumerate(dict.fromkeys(line))}
        for ref in reversed(self._line):
            if (lease := self._leases.get(ref)) is not None and not lease.users:
                lease.since = self._pool.now()

    def idle(self) -> Iterator[Idle]:
        """Who leaves first say line and popularity; how soon, against cached text, the age of the longest unused."""
        idle = [lease for lease in self._leases.values() if not lease.users]
        ages = sorted(lease.since for lease in idle)
        for since, lease in zip(ages, sorted(idle, key=self._order), strict=True):
            yield Idle(since, lease.pages, partial(self._give_way, lease))

    def fail(self, lease: Lease[T]) -> None:
        """What should stand there never came: nobody finds it, and its pages come back with its last user."""
        if lease.known:
            self._take_out(lease)
            self._forgotten.add(lease)

    def expire(self, which: Callable[[AdapterRef], bool]) -> None:
        """These leave before all other adapters."""
        for lease in self._leases.values():
            if which(lease.ref) and lease.value is not None:
                self._popularity.expire(lease.ref)

    def forget(self, which: Callable[[AdapterRef], bool]) -> None:
        """These are found no more; those in use give their pages back when they are let go of."""
        for lease in [lease for ref, lease in self._leases.items() if which(ref)]:
            self._take_out(lease)
            if lease.users:
                self._forgotten.add(lease)
            else:
                self._vacate(lease)

    def check(self, users: Collection[Lease[T]]) -> None:
        """Assert that idle leases are filled, and that everybody who uses one counts. users: once for each use."""
        for lease in self.leases:
            assert lease.users or (lease.known and lease.value is not None), "nobody's adapter keeps its pages"
            assert lease.pages, "an adapter lost its pages"
            assert lease.users >= sum(one is lease for one in users), "an adapter has more users than it counts"
        assert all(one.pages for one in users), "an adapter in use has left"

    def _order(self, lease: Lease[T]) -> tuple[float, float]:
        return -self._line.get(lease.ref, math.inf), self._popularity.worth(lease.ref)

    def _give_way(self, lease: Lease[T]) -> None:
        if lease.known:
            self._popularity.gave_way(lease.ref)
            self._take_out(lease)
            self._vacate(lease)

    def _take_out(self, lease: Lease[T]) -> None:
        del self._leases[lease.ref]
        lease.known = False
        if lease.value is not None:
            self._popularity.forget(lease.ref)

    def _vacate(self, lease: Lease[T]) -> None:
        lease.value = None
        self._pool.give(lease.pages)
