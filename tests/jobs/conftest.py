"""A real database, a scripted engine, a clock that stands still, and the recipe over them."""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from histories import DAWN, TEXT, learning, own

from jobs.finetune import Finetune
from jobs.schedule import Schedule
from persona.domain import Entry, Run, User
from persona.engine.protocol import ScoreRequest
from persona.engine.scripted import ScriptedEngine
from persona.settings import Settings
from storage.adapters import Adapters
from storage.database import Database
from storage.history import History, ImportItem
from storage.runs import Runs
from storage.users import Users


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

    def schedule(self, finetune: Finetune | None = None) -> Schedule:
        return Schedule(
            self.settings,
            self.users,
            self.history,
            self.adapters,
            self.runs,
            finetune or self.finetune(),
            self.clock,
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


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    db = await Database.open(tmp_path / "persona.db")
    clock, root = Clock(), tmp_path / "adapters"
    settings = Settings.model_validate({"home": tmp_path, "learning": learning().model_dump()})
    engine = ScriptedEngine(score=improving)
    yield World(Users(db, clock), History(db), Adapters(db, root), Runs(db), engine, clock, settings, root)
    await db.close()


@pytest.fixture
async def ann(world: World) -> User:
    return await world.users.add("ann")


Tell = Callable[..., Awaitable[None]]


@pytest.fixture
async def tell(world: World, ann: User) -> Tell:
    """`await tell(20)`: ann writes so many more messages of 16 bytes."""
    written = 0

    async def more(count: int, user: User = ann) -> None:
        nonlocal written
        await world.say(user, own(count, start=written + 1))
        written += count

    return more
