"""Where adapters are: on disk, in host RAM as they are stored, on the device ready for products.

    disk ── read and verify ──> host ── expand ──> device
            loader thread               loader thread

None is named at start: a request names its version by path and checksum. What is not on the device is loaded by a
thread of its own while steps go on; the request keeps its place in the waiting room. Popular ones stay: what was used
often and lately, and among equals what is dearer to get back (from disk, not from host). Versions in use by a sequence
never leave.
"""

import queue
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, TypeVar

from persona.engine.adapter_file import Adapter
from persona.engine.lora import Resident
from persona.engine.protocol import AdapterRef

FROM_DISK, FROM_HOST = 4.0, 1.0  # what loading costs, against each other

T = TypeVar("T")
Submit = Callable[[Callable[[], None]], object]  # runs it elsewhere, soon


@dataclass(frozen=True, slots=True)
class _Landed:
    """What came of one load."""

    ref: AdapterRef
    adapter: Adapter | None = None
    resident: Resident | None = None
    error: Exception | None = None


class Tiers:
    """Adapters by reference, within two budgets of bytes."""

    def __init__(
        self,
        read: Callable[[AdapterRef], Adapter],
        promote: Callable[[Adapter], Resident],
        *,
        device_budget: int,
        host_budget: int,
        submit: Submit,
    ) -> None:
        """read: raises AdapterError for what is not what the reference says · submit: a thread's, see `landed`."""
        self._read, self._promote, self._submit = read, promote, submit
        self._device: _Kept[Resident] = _Kept(device_budget)
        self._host: _Kept[Adapter] = _Kept(host_budget)
        self._under_way: dict[AdapterRef, bool] = {}  # whether it is still wanted when it comes
        self._arrivals: queue.SimpleQueue[_Landed] = queue.SimpleQueue()
        self.loads: Counter[str] = Counter()  # by where from
        self.loaded_bytes = 0

    def __len__(self) -> int:
        return len(self._device)

    @property
    def nbytes(self) -> int:
        """Of the residents."""
        return self._device.nbytes

    @property
    def host_nbytes(self) -> int:
        return self._host.nbytes

    @property
    def arrived(self) -> bool:
        """Whether `landed` has something to tell."""
        return not self._arrivals.empty()

    def ready(self, ref: AdapterRef) -> bool:
        """Whether the adapter is on the device; if not, it is being loaded from now on."""
        if ref not in self._device:
            self.fetch(ref)
        return ref in self._device

    def find(self, ref: AdapterRef) -> Resident | None:
        """The adapter, if it is on the device: that is one use of it."""
        return self._device.use(ref, FROM_HOST if ref in self._host else FROM_DISK)

    def fetch(self, ref: AdapterRef) -> None:
        """Begin to load `ref` unless that is under way."""
        if ref in self._under_way:
            return
        self._under_way[ref] = True
        known = self._host.use(ref, FROM_DISK)
        self.loads["disk" if known is None else "host"] += 1
        self._submit(lambda: self._arrivals.put(self._load(ref, known)))

    def landed(self, in_use: Collection[AdapterRef]) -> list[tuple[AdapterRef, Resident | None, Exception | None]]:
        """Loads that have ended since the last call: the adapter, now on the device, or why it is not."""
        found = []
        while not self._arrivals.empty():
            one = self._arrivals.get()
            wanted = self._under_way.pop(one.ref, False)
            if wanted and one.adapter is not None and one.resident is not None:
                self.loaded_bytes += one.resident.nbytes()
                self._host.add(one.ref, one.adapter, one.adapter.nbytes(), FROM_DISK, ())
                self._device.add(one.ref, one.resident, one.resident.nbytes(), FROM_HOST, {*in_use, one.ref})
            found.append((one.ref, one.resident, one.error))
        return found

    def flip(self, ref: AdapterRef) -> None:
        """`ref` is its user's newest: the other versions become the first to leave."""
        for kept in (self._device, self._host):
            kept.expire(lambda other: other.user_id == ref.user_id and other != ref)

    def drop(self, user_id: int) -> None:
        """Forget the user's versions. A sequence that runs on one keeps its own reference until it ends."""
        for kept in (self._device, self._host):
            kept.remove(lambda ref: ref.user_id == user_id)
        self._under_way = {ref: wanted and ref.user_id != user_id for ref, wanted in self._under_way.items()}

    def _load(self, ref: AdapterRef, known: Adapter | None) -> _Landed:
        try:
            adapter = known if known is not None else self._read(ref)
            return _Landed(ref, adapter, self._promote(adapter))
        except Exception as error:  # belongs to those who wait for it
            return _Landed(ref, error=error)


class _Kept(Generic[T]):
    """Values within a budget of bytes. Who leaves: LFU with dynamic aging (Arlitt et al. 2000).

    An entry's worth is the age at its last use plus uses times cost; the age is the worth of the last that left, so
    what was popular once does not stay for ever.
    """

    def __init__(self, budget: int) -> None:
        self._budget, self._age = budget, 0.0
        self._values: dict[AdapterRef, T] = {}
        self._sizes: dict[AdapterRef, int] = {}
        self._worth: dict[AdapterRef, float] = {}
        self._uses: Counter[AdapterRef] = Counter()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._values

    def use(self, ref: AdapterRef, cost: float) -> T | None:
        if (value := self._values.get(ref)) is not None:
            self._uses[ref] += 1
            self._worth[ref] = self._age + self._uses[ref] * cost
        return value

    def add(self, ref: AdapterRef, value: T, size: int, cost: float, needed: Collection[AdapterRef]) -> None:
        """Others leave until it fits, but none of `needed`."""
        self.remove(lambda other: other == ref)
        self._values[ref], self._sizes[ref] = value, size
        self.nbytes += size
        self.use(ref, cost)
        leaving = iter(sorted((other for other in self._values if other not in needed), key=self._worth.__getitem__))
        while self.nbytes > self._budget and (other := next(leaving, None)) is not None:
            self._age = max(self._age, self._worth[other])
            self._take_out(other)

    def expire(self, which: Callable[[AdapterRef], bool]) -> None:
        """These leave before all others."""
        for ref in filter(which, self._values):
            self._worth[ref] = -1.0
            self._uses[ref] = 0

    def remove(self, which: Callable[[AdapterRef], bool]) -> None:
        for ref in [ref for ref in self._values if which(ref)]:
            self._take_out(ref)

    def _take_out(self, ref: AdapterRef) -> None:
        self.nbytes -= self._sizes.pop(ref)
        del self._values[ref], self._worth[ref], self._uses[ref]
