"""Everything that a training run touches, real but for the scripted engine and the clock."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from histories import DAWN, TEXT

from jobs.finetune import Finetune
from jobs.live import LiveCheck
from jobs.schedule import Schedule
from persona.domain import Entry, Run, User
from persona.engine.protocol import ScoreRequest
from persona.engine.scripted import ScriptedEngine
from persona.settings import Settings
from storage.adapters import Adapters
from storage.history import History, ImportItem
from storage.live import LiveChecks
from storage.runs import Runs
from storage.users import Users

Tell = Callable[..., Awaitable[None]]


class Clock:
    """Stands still until it is told to go on, or back."""

    def __init__(self) -> None:
        self.now = DAWN

    def __call__(self) -> datetime:
        return self.now

    def pass_by(self, **time: float) -> None:
        self.now += timedelta(**time)


def improving(request: ScoreRequest) -> list[float]:
    """Each version predicts a little better than the one before; answers stay as they were."""
    answers = request.tokens[request.targets[0] - 1] == 258
    number = request.adapter.number if request.adapter else 0
    return [-2.0 if answers else -2.0 + number / 100] * len(request.targets)


@dataclass
class World:
    """Everything that a run touches."""

    users: Users
    history: History
    adapters: Adapters
    runs: Runs
    checks: LiveChecks
    engine: ScriptedEngine
    clock: Clock
    settings: Settings
    root: Path
    base: str = "base-hash"

    def finetune(self) -> Finetune:
        return Finetune(
            self.settings,
            self.users,
            self.history,
            self.adapters,
            self.runs,
            self.engine,
            TEXT,
            lambda: self.base,
            self.clock,
        )

    def live(self) -> LiveCheck:
        """As after a start of the service."""
        parts = (self.settings, self.users, self.history, self.adapters, self.checks, self.engine)
        return LiveCheck(*parts, TEXT, lambda: self.base, self.clock)

    def schedule(self, finetune: Finetune | None = None, live: LiveCheck | None = None) -> Schedule:
        return Schedule(
            self.settings,
            self.users,
            self.history,
            self.adapters,
            self.runs,
            finetune or self.finetune(),
            self.clock,
            live=live,
        )

    async def say(self, user: User, entries: list[Entry]) -> None:
        """Store what a user wrote, as imported history."""
        items = [ImportItem(entry.text, entry.ts, f"i{entry.id}", entry.context) for entry in entries]
        await self.history.import_(user.id, items, count=len, now=self.clock())

    async def train(self, user: User) -> Run:
        """Ask for a run and carry it out."""
        return await self.finetune().run(await self.runs.request(user.id, self.clock()))

    def folders(self) -> list[str]:
        return sorted(path.relative_to(self.root).as_posix() for path in self.root.glob("*/*"))
