"""Where adapters are: on disk, in host RAM as they are stored, on the device ready for products.

    disk ── read and verify ──> host ── pages reserved, then expanded into them ──> device

None is named at start: a request names its version by path and checksum. What is not on the device is loaded by a
thread of its own while steps go on; the request keeps its place in the waiting room. Device memory is shared with the
cache (pages.py); popular adapters stay longest (shelf.py, popularity.py). Who uses an adapter holds a lease of it.

Several threads look at what is where, and change it: who does holds `turn`. The loop holds it but while it computes;
what it computes with has pages in use, which never move. So a load that begins during a step is there at its end.
"""

import queue
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from persona.engine.adapter_file import Adapter
from persona.engine.lora import Resident
from persona.engine.pages import PagePool
from persona.engine.popularity import FROM_DISK, FROM_HOST, Popularity
from persona.engine.protocol import AdapterRef
from persona.engine.shelf import Absent, Lease, Shelf
from persona.errors import TooLarge

LARGE = "The user's adapter is larger than the engine's memory: the owner has to raise engine.memory_mb."
T = TypeVar("T")
Submit = Callable[[Callable[[], None]], object]  # runs it elsewhere, soon


@dataclass(frozen=True, slots=True)
class _Read:
    """What came from disk and found no pages on the device, or did not come."""

    ref: AdapterRef
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _Filled:
    """What stands in the pages of a lease."""

    lease: Lease[Resident]
    resident: Resident | None = None
    error: Exception | None = None


class Tiers:
    """Adapters by reference: on the device within the pool's pages, in RAM within a budget of bytes."""

    def __init__(
        self,
        read: Callable[[AdapterRef], Adapter],
        pages: Callable[[Adapter], int],
        fill: Callable[[Adapter, list[int]], Resident],
        *,
        pool: PagePool,
        host_budget: int,
        submit: Submit,
    ) -> None:
        """read: raises AdapterError for what is not what the reference says, OSError · pages: that its expanded form
        takes · fill: expands it into these pages · submit: a thread's, see `landed`."""
        self._read, self._pages, self._fill, self._pool, self._submit = read, pages, fill, pool, submit
        self.turn = threading.RLock()
        self.shelf = Shelf[Resident](pool)
        self._host: _Kept[Adapter] = _Kept(host_budget)
        self._reading: dict[AdapterRef, bool] = {}  # whether it is still wanted when it comes
        self._arrivals: queue.SimpleQueue[_Read | _Filled] = queue.SimpleQueue()
        self.loads = self.reads = self.loaded_bytes = 0  # to the device; from disk

    @property
    def host(self) -> int:
        """Adapters in RAM."""
        return len(self._host)

    @property
    def host_nbytes(self) -> int:
        return self._host.nbytes

    @property
    def arrived(self) -> bool:
        """Whether `landed` has something to tell."""
        return not self._arrivals.empty()

    def hold(self, ref: AdapterRef) -> Lease[Resident] | Absent:
        """Use the adapter until `release`. If it is not on the device, it is being loaded from now on, unless all that
        is idle leaves no room for it: then ask again."""
        return self.shelf.hold(ref) or self.fetch(ref, ())

    def release(self, lease: Lease[Resident], *, used: bool = True) -> None:
        cost = FROM_HOST if lease.ref in self._host else FROM_DISK
        self.shelf.release(lease, cost if used else None)

    def fetch(self, ref: AdapterRef, spared: Collection[AdapterRef]) -> Absent:
        """Begin to load `ref` unless it is under way or there; `spared` do not give way to it."""
        if ref in self._reading or ref in self.shelf:
            return Absent.COMING
        if (known := self._host.use(ref, FROM_DISK)) is not None:
            return self._expand(ref, known, spared)
        self._reading[ref] = True
        self._submit(lambda: self._arrivals.put(self._from_disk(ref, spared)))
        return Absent.COMING

    def landed(self) -> list[tuple[AdapterRef, Exception | None]]:
        """What is on the device since the last call, or could not be loaded."""
        found: list[tuple[AdapterRef, Exception | None]] = []
        while self.arrived:
            one = self._arrivals.get()
            if isinstance(one, _Filled):
                self._settle(one)
                found.append((one.lease.ref, one.error))
            elif one.error is not None:
                self._reading.pop(one.ref, None)
                found.append((one.ref, one.error))
        return found

    def flip(self, ref: AdapterRef) -> None:
        """`ref` is its user's newest: the other versions become the first to leave."""
        for kept in (self.shelf, self._host):
            kept.expire(lambda other: other.user_id == ref.user_id and other != ref)

    def drop(self, user_id: int) -> None:
        """Forget the user's versions. A sequence that runs on one keeps its lease until it ends."""
        for kept in (self.shelf, self._host):
            kept.forget(lambda ref: ref.user_id == user_id)
        self._reading = {ref: wanted and ref.user_id != user_id for ref, wanted in self._reading.items()}

    def _expand(self, ref: AdapterRef, adapter: Adapter, spared: Collection[AdapterRef]) -> Absent:
        lease = self.shelf.reserve(ref, self._pages(adapter), spared)
        if lease is None:
            return Absent.NO_ROOM
        self._submit(lambda: self._arrivals.put(self._filled(lease, adapter)))
        return Absent.COMING

    def _settle(self, filled: _Filled) -> None:
        """The loader has let go of the pages."""
        lease = filled.lease
        if filled.resident is None:
            self.shelf.fail(lease)
        else:
            lease.value = filled.resident
            self.loads += 1
            self.loaded_bytes += filled.resident.nbytes()
        self.release(lease)

    def _from_disk(self, ref: AdapterRef, spared: Collection[AdapterRef]) -> _Read | _Filled:
        """The whole way, as far as there is room: in the loader's thread."""
        try:
            adapter = self._read(ref)
            if self._pages(adapter) > self._pool.total:
                raise TooLarge(LARGE, code="adapter_too_large")
            with self.turn:
                lease = self._came(ref, adapter, spared)
        except Exception as error:  # belongs to those who wait for it
            return _Read(ref, error=error)
        return self._filled(lease, adapter) if lease is not None else _Read(ref)

    def _came(self, ref: AdapterRef, adapter: Adapter, spared: Collection[AdapterRef]) -> Lease[Resident] | None:
        """It is in RAM now, and has pages if there are some for it."""
        if not self._reading.pop(ref):
            return None
        self.reads += 1
        self._host.add(ref, adapter, adapter.nbytes(), FROM_DISK)
        return self.shelf.reserve(ref, self._pages(adapter), spared)

    def _filled(self, lease: Lease[Resident], adapter: Adapter) -> _Filled:
        try:
            return _Filled(lease, self._fill(adapter, lease.pages))
        except Exception as error:  # belongs to those who wait for it
            return _Filled(lease, error=error)


class _Kept(Generic[T]):
    """Values within a budget of bytes, and the newest in any case; the least popular leave."""

    def __init__(self, budget: int) -> None:
        self._budget, self._popularity = budget, Popularity()
        self._values: dict[AdapterRef, T] = {}
        self._sizes: dict[AdapterRef, int] = {}
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._values

    def use(self, ref: AdapterRef, cost: float) -> T | None:
        if (value := self._values.get(ref)) is not None:
            self._popularity.use(ref, cost)
        return value

    def add(self, ref: AdapterRef, value: T, size: int, cost: float) -> None:
        """Others leave until it fits."""
        self.forget(lambda other: other == ref)
        self._values[ref], self._sizes[ref] = value, size
        self.nbytes += size
        self._popularity.use(ref, cost)
        leaving = iter(sorted((other for other in self._values if other != ref), key=self._popularity.worth))
        while self.nbytes > self._budget and (other := next(leaving, None)) is not None:
            self._popularity.gave_way(other)
            self._take_out(other)

    def expire(self, which: Callable[[AdapterRef], bool]) -> None:
        """These leave before all others."""
        for ref in filter(which, self._values):
            self._popularity.expire(ref)

    def forget(self, which: Callable[[AdapterRef], bool]) -> None:
        for ref in [ref for ref in self._values if which(ref)]:
            self._take_out(ref)

    def _take_out(self, ref: AdapterRef) -> None:
        self.nbytes -= self._sizes.pop(ref)
        del self._values[ref]
        self._popularity.forget(ref)
