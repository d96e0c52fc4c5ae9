"""Requests outside the scheduler that need an adapter on the device: staging, flips and the gate's scoring.

While they wait they hold neither pages nor a lease. Before the scheduler admits anybody they ask again, in order of
arrival, and whatever is idle gives way. But an adapter wants neighbouring pages, and in a busy engine newcomers take
each as it comes back: who was turned away often enough keeps newcomers out for some steps, again and again.
"""

from collections.abc import Callable
from dataclasses import dataclass

from persona.engine.lora import Resident
from persona.engine.protocol import AdapterRef, Reply
from persona.engine.shelf import Absent, Lease
from persona.engine.tiers import Tiers

PATIENT = 256  # steps in which the first one finds no room, before nobody else is let in
CLOSED = 128  # steps for which nobody is; then others have their turn again


@dataclass(frozen=True, eq=False, slots=True)
class Errand:
    """What the request `job` waits for. then: takes the lease over · aborted: what to say if it is aborted."""

    job: int
    ref: AdapterRef
    then: Callable[[Lease[Resident]], None]
    aborted: Reply | None = None


class Awaiting:
    """All that wait."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._errands: list[Errand] = []
        self._blocked = False  # the first one found no room
        self._turned_away = 0  # in so many steps in a row

    def closes(self) -> bool:
        """Once a step: whether nobody shall be let in, as one has waited for room too long."""
        self._turned_away = self._turned_away + 1 if self._blocked else 0
        return self._turned_away % (PATIENT + CLOSED) >= PATIENT

    def add(self, errand: Errand) -> None:
        self._errands.append(errand)

    def served(self) -> list[tuple[Errand, Lease[Resident]]]:
        """Those whose adapter is on the device now, with a lease of it. The others have theirs loaded."""
        served = list[tuple[Errand, Lease[Resident]]]()
        self._blocked = False
        for errand in list(self._errands):
            found = self._tiers.hold(errand.ref)
            if found is Absent.NO_ROOM:
                self._blocked = not served
                break
            if found is not Absent.COMING:
                self._errands.remove(errand)
                served.append((errand, found))
        return served

    def failed(self, ref: AdapterRef) -> list[Errand]:
        """Its adapter could not be loaded: those who waited for it."""
        some = [errand for errand in self._errands if errand.ref == ref]
        self._errands = [errand for errand in self._errands if errand.ref != ref]
        return some

    def abort(self, job: int) -> Errand | None:
        """Take out what belongs to the request, if there is something."""
        errand = next((errand for errand in self._errands if errand.job == job), None)
        if errand is not None:
            self._errands.remove(errand)
        return errand
