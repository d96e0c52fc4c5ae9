"""A real database in a temporary folder, and short ways to talk to it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from persona.domain import EntryId, Finish, Frame, Message, Role, RunState, User, UserId, Version
from storage.adapters import Adapters
from storage.database import Database
from storage.events import Events
from storage.history import History, Placement
from storage.runs import ExampleRow, Runs
from storage.users import Users

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


@pytest.fixture
def now() -> datetime:
    return NOW


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    opened = await Database.open(tmp_path / "persona.db")
    yield opened
    await opened.close()


@pytest.fixture
def users(db: Database) -> Users:
    return Users(db)


@pytest.fixture
def history(db: Database) -> History:
    return History(db)


@pytest.fixture
def events(db: Database) -> Events:
    return Events(db)


@pytest.fixture
def runs(db: Database) -> Runs:
    return Runs(db)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "adapters"


@pytest.fixture
def adapters(db: Database, root: Path) -> Adapters:
    return Adapters(db, root)


@pytest.fixture
async def ann(users: Users) -> User:
    return await users.add("ann")


@pytest.fixture
async def bob(users: Users) -> User:
    return await users.add("bob")


Place = Callable[..., Awaitable[Placement]]


@pytest.fixture
def place(history: History, ann: User) -> Place:
    """`await place("user text", "assistant text", …)`: what a client of ann sends, turn by turn."""

    async def sent(*texts: str, to: str | None = None, store: bool = True, user: UserId = ann.id) -> Placement:
        roles = (Role.USER, Role.ASSISTANT)
        messages = [Message(roles[at % 2], text) for at, text in enumerate(texts)]
        return await history.place(user, messages, conversation_id=to, now=NOW, count=len, store=store)

    return sent


Answer = Callable[..., Awaitable[EntryId | None]]


@pytest.fixture
def answer(history: History, ann: User) -> Answer:
    async def stored(
        placement: Placement, text: str, finish: Finish = Finish.STOP, version: int | None = None
    ) -> EntryId | None:
        return await history.reply(ann.id, placement, text, finish=finish, version=version, now=NOW, tokens=len(text))

    return stored


Make = Callable[..., Awaitable[Version]]


@pytest.fixture
def make(adapters: Adapters, runs: Runs) -> Make:
    """`await make(user_id, entries, parent=…)`: a version that was trained on those entries, serving."""

    async def made(
        user_id: UserId, learned: tuple[EntryId, ...] = (), parent: int | None = None, serve: bool = True
    ) -> Version:
        run = await runs.start((await runs.request(user_id, NOW)).id, NOW)
        await runs.set_examples(run.id, [ExampleRow(entry, Frame.TURN, 7, 1.0) for entry in learned])
        folder = await adapters.workspace(user_id)
        (folder / "adapter.safetensors").write_bytes(b"weights of %d" % run.id)
        version = await adapters.publish(
            user_id,
            folder,
            watermark=max(learned, default=EntryId(0)),
            parent=parent,
            base="base-hash",
            run_id=run.id,
            metrics={"loss": 1.5},
            plan={"rank": 16},
        )
        if serve:
            await adapters.point(user_id, version.number)
        await runs.end(run.id, RunState.KEPT, None, NOW, version=version.number)
        return version

    return made
