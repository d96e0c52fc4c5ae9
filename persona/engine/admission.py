"""Who may wait, and who is told to come again later, before anything is computed for them.

The room is bounded, and each user's share of it: in a full one a request of whoever has the most there leaves. A
request whose turn would come after `patience` seconds is refused at once; one that has waited so long is sent away.
"""

import math
from collections import Counter
from collections.abc import Callable

from persona.engine.compiling import Compiling
from persona.engine.refusals import crowded
from persona.engine.scheduler import Scheduler, Sequence
from persona.engine.waiting import Pace
from persona.errors import Busy

LOOK_SECONDS = 0.25  # between two looks for those who have waited too long


class Admission:
    """The door of the scheduler, and of those whose grammar is being compiled."""

    def __init__(
        self, scheduler: Scheduler, compiling: Compiling, *, patience: float, clock: Callable[[], float]
    ) -> None:
        """patience: seconds within which a request must be admitted · clock: that of `Sequence.since`."""
        self._scheduler, self._compiling = scheduler, compiling
        self._patience, self._clock = patience, clock
        self._pace, self._looked = Pace(), -math.inf

    def surplus(self) -> Sequence | None:
        """Who has to leave again, if somebody came into a full room: the newest request of the user with the most, and
        of users with as many the newest."""
        if not self._scheduler.crowded(len(self._compiling)):
            return None
        waiting: list[Sequence] = sorted([*self._compiling, *self._scheduler.chats], key=lambda one: one.id)
        theirs = Counter(one.user_id for one in waiting)
        return max(reversed(waiting), key=lambda one: theirs[one.user_id])

    def enter(self, sequence: Sequence) -> None:
        """Into the waiting room. Raises Busy if its turn would come too late."""
        self._scheduler.add(sequence)
        wait = 0.0 if sequence.background else self._pace.wait(self._scheduler.before(sequence))
        if wait > self._patience:
            self._scheduler.remove(sequence)
            raise crowded(wait)

    def late(self) -> list[Sequence]:
        """Those who have waited too long, four times a second. Who waits for a grammar is out with this."""
        now = self._clock()
        if now < self._looked + LOOK_SECONDS:
            return []
        self._looked, since = now, now - self._patience
        waiting = [one for one in self._scheduler.sequences() if not one.pages and not one.silent and one.since < since]
        return [*(coming.sequence for coming in self._compiling.late(since)), *waiting]

    def left(self, admitted: int) -> None:
        """So many left the room for the running set just now."""
        for _ in range(admitted):
            self._pace.left(self._clock(), others=self._scheduler.waiting > 0)

    def refusal(self) -> Busy:
        """What somebody is told who may not wait any longer."""
        return crowded(self._pace.wait(self._scheduler.waiting))
