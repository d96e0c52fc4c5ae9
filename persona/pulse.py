"""How the engine is, over time: when it last answered, and whether that is still within its keeper's limits.

The engine's own client restarts a process that died or hangs. This looks from outside whether that helps: who has not
answered for longer than a restart may take at its worst is lost.
"""

import asyncio
import time
from collections.abc import Callable

from persona.engine.client import MAX_BACKOFF
from persona.engine.faces import Serving
from persona.engine.protocol import Health
from persona.errors import PersonaError
from persona.settings import Engine

SECONDS = 2.0  # between two looks


class Pulse:
    """Asks the engine how it is."""

    def __init__(self, engine: Serving, limits: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._silence = limits.hang_seconds
        self._patience = limits.hang_seconds + MAX_BACKOFF + limits.start_seconds
        self._answered = clock()
        self._restarting = True
        self._health: Health | None = None

    async def take(self, seconds: float) -> Health | None:
        """What the engine says of itself; None if it says nothing within `seconds`."""
        health = None
        try:
            async with asyncio.timeout(seconds):
                health = await self._engine.health()
            self._answered = self._clock()
        except (PersonaError, TimeoutError) as error:
            self._restarting = isinstance(error, PersonaError)
        self._health = health
        return health

    @property
    def lost(self) -> bool:
        """Whether it has been silent for longer than hanging, waiting and loading may take together."""
        return self._clock() - self._answered > self._patience

    def trouble(self) -> str | None:
        """What was wrong at the last look, in one sentence with its duration."""
        if self._health is not None:
            return None
        silent = round(self._clock() - self._answered)
        if self._restarting:
            return f"The engine is being restarted; it has been away for {silent} s."
        return f"The engine has not answered for {silent} s; it is restarted after {self._silence:g} s of silence."

    async def go_on(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.take(max(self._silence, SECONDS))
            await asyncio.sleep(SECONDS)
