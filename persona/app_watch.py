"""What the service manager hears over one life of the service: more time while it starts, then beats while it is well.

A beat means that the event loop turns and the engine is well, or is being restarted within its limits. A full disk or
an absent broker never stops the beats: a restart would not help.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from persona.notify import Supervisor
from persona.pulse import Pulse

_SECONDS = 5.0  # between two words while it starts; beats come twice as often as the watchdog wants them
_MORE_TIME = 30.0  # seconds that each of these words asks for


class Watch:
    """Speaks to the manager; `ready` turns requests for more time into beats."""

    def __init__(self, manager: Supervisor) -> None:
        self._manager = manager
        self._pulse: Pulse | None = None

    def loading(self, what: str) -> None:
        """The start has come to this."""
        self._manager.tell(STATUS=f"Starting: {what}", **_more_time())

    def ready(self, pulse: Pulse, url: str) -> None:
        """Everything works and the address answers."""
        self._pulse = pulse
        self._manager.tell(READY=1, STATUS=f"Serving at {url}", WATCHDOG=1)

    def stopping(self) -> None:
        self._manager.tell(STOPPING=1, STATUS="Stopping: running replies end, training saves its state")

    def beat(self) -> None:
        """One word, if there is one to be said."""
        if self._pulse is None:
            self._manager.tell(**_more_time())
        elif not self._pulse.lost:
            self._manager.tell(WATCHDOG=1)

    async def go_on(self) -> None:
        """Beat until cancelled."""
        while True:
            self.beat()
            await asyncio.sleep(self._seconds())

    def _seconds(self) -> float:
        wanted = self._manager.watchdog
        return min(_SECONDS, wanted / 2) if wanted else _SECONDS


@asynccontextmanager
async def watching(manager: Supervisor) -> AsyncIterator[Watch]:
    """A watch from the first moment of the start to the last of the stop."""
    watch = Watch(manager)
    task = asyncio.create_task(watch.go_on(), name="watch")
    try:
        yield watch
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _more_time() -> dict[str, int]:
    return {"EXTEND_TIMEOUT_USEC": int(_MORE_TIME * 1e6)}
