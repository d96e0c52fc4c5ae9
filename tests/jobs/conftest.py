"""A real database, a scripted engine, a clock that stands still, and the recipe over them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from histories import learning, own
from world import Clock, Tell, World, improving

from persona.domain import User
from persona.engine.scripted import ScriptedEngine
from persona.settings import Settings
from storage.adapters import Adapters
from storage.database import Database
from storage.history import History
from storage.live import LiveChecks
from storage.runs import Runs
from storage.users import Users


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    db = await Database.open(tmp_path / "persona.db")
    clock, root = Clock(), tmp_path / "adapters"
    settings = Settings.model_validate({"home": tmp_path, "learning": learning().model_dump()})
    engine = ScriptedEngine(score=improving)
    parts = (Users(db, clock), History(db), Adapters(db, root), Runs(db), LiveChecks(db))
    yield World(*parts, engine, clock, settings, root)
    await db.close()


@pytest.fixture
async def ann(world: World) -> User:
    return await world.users.add("ann")


@pytest.fixture
async def tell(world: World, ann: User) -> Tell:
    """`await tell(20)`: ann writes so many more messages of 16 bytes."""
    written = 0

    async def more(count: int, user: User = ann) -> None:
        nonlocal written
        await world.say(user, own(count, start=written + 1))
        written += count

    return more
