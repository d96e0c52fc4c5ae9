"""SIGTERM and SIGINT: they end a service that serves in good order, and the start of one that still loads at once."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

log = structlog.get_logger()


class Stop:
    """Made by the task that starts the service; only the first signal counts."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._starting = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ask)

    def started(self) -> None:
        """From here on a signal waits to be heard through `asked`."""
        self._starting = None

    @contextmanager
    def ends_the_start(self) -> Iterator[None]:
        """Whoever is cut short in here by a signal goes on behind the block."""
        try:
            yield
        except asyncio.CancelledError:
            if not self.asked.is_set():
                raise
            log.info("stopped before it served")

    def _ask(self) -> None:
        self.asked.set()
        if self._starting is not None:
            self._starting.cancel()
            self._starting = None
