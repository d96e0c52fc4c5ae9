"""Which adapters are on the device: loaded and verified on demand, the least recently used leave first.

A request names its version by path and checksum, so nothing is registered at start. Versions in use by a running
sequence never leave. `stage` loads a candidate before the pointer moves; `flip` marks the older versions of its user
as the first to go.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection
from pathlib import Path

from persona.engine import adapter_file
from persona.engine.lora import Resident
from persona.engine.protocol import AdapterRef
from persona.engine.shape import Shape


class Tiers:
    """Residents by reference, within `budget` bytes."""

    def __init__(
        self, shape: Shape, base: str, budget: int, promote: Callable[[adapter_file.Adapter], Resident]
    ) -> None:
        self._shape, self._base, self._budget, self._promote = shape, base, budget, promote
        self._residents: OrderedDict[AdapterRef, Resident] = OrderedDict()
        self.nbytes = 0  # of the residents
        self.loads = self.loaded_bytes = 0  # since the start: adapters made resident, and their bytes on the device

    def __len__(self) -> int:
        return len(self._residents)

    def get(self, ref: AdapterRef, in_use: Collection[AdapterRef]) -> Resident:
        """The adapter on the device. Raises AdapterError and keeps nothing if its file is not what `ref` says."""
        if ref not in self._residents:
            adapter = adapter_file.read(Path(ref.path), ref.sha256, self._base, self._shape)
            self._add(ref, self._promote(adapter))
        self._residents.move_to_end(ref)
        self._evict({ref, *in_use})
        return self._residents[ref]

    def flip(self, ref: AdapterRef, in_use: Collection[AdapterRef]) -> None:
        """`ref` is its user's newest: older versions become the first to leave."""
        for other in [r for r in self._residents if r.user_id == ref.user_id and r.number != ref.number]:
            self._residents.move_to_end(other, last=False)
        self.get(ref, in_use)

    def drop(self, user_id: int) -> None:
        """Forget the user's versions. A sequence that runs on one keeps its own reference until it ends."""
        for ref in [r for r in self._residents if r.user_id == user_id]:
            self._remove(ref)

    def _add(self, ref: AdapterRef, resident: Resident) -> None:
        size = resident.nbytes()
        self._residents[ref] = resident
        self.nbytes += size
        self.loads += 1
        self.loaded_bytes += size

    def _remove(self, ref: AdapterRef) -> None:
        self.nbytes -= self._residents.pop(ref).nbytes()

    def _evict(self, kept: Collection[AdapterRef]) -> None:
        if self.nbytes <= self._budget:
            return
        for ref in [r for r in self._residents if r not in kept]:
            self._remove(ref)
            if self.nbytes <= self._budget:
                return
