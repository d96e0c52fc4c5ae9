"""The one SQLite file: how it is opened, migrated, read, written, copied and scrubbed.

One writer at a time, who locks before the first read (BEGIN IMMEDIATE); readers that cannot write. A commit is on the
disk when it returns. With database_file.py and fulltext.py this is the only place that names the SQL dialect.

The driver blocks, so statements run in threads. A way there and back costs more than most statements: what a chat
request or a batch of events does to the database is one of them (`reading`, `writing`), and not one for each statement.
"""

import asyncio
import contextlib
import contextvars
import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

import sqlalchemy as sa

from persona.domain import UserId
from persona.errors import Busy, StorageFull
from storage.database_file import (
    LOCKED,
    PRAGMAS,
    answers,
    checkpoint,
    code,
    copy,
    damaged,
    examine,
    people,
    prepare,
    upgrade_copies,
)
from storage.files import full_disk, reserve
from storage.whole import in_thread, whole

__all__ = [
    "NEVER_REUSED",
    "Database",
    "Transaction",
    "examine",
    "people",
    "reading",
    "upgrade_copies",
    "writing",
]

T = TypeVar("T")
P = ParamSpec("P")
Run = Callable[..., Awaitable[Any]]
Removed = Callable[[UserId, Sequence[int] | None], Awaitable[None]]

NEVER_REUSED: dict[str, Any] = {"sqlite_autoincrement": True}  # of a table: its ids are never given twice

_READERS = 4
_LONGEST = 60.0  # seconds that a reader waits for a connection
_SPARE = 1 << 20  # bytes


class _Enough(Exception):
    """Ends a trial transaction: it is rolled back."""


class _Locked(Exception):
    """A transaction did not begin."""

    def __init__(self, error: sa.exc.OperationalError) -> None:
        self.error = error


class Transaction:
    """Runs statements. Who is cancelled here still waits for the statement."""

    def __init__(self, connection: sa.Connection, run: Run) -> None:
        """run: in whose thread."""
        self._connection, self._run = connection, run

    async def execute(self, statement: sa.Executable, parameters: Any = None) -> sa.CursorResult[Any]:
        found: sa.CursorResult[Any] = await self._run(_read_out, self._connection.execute, statement, parameters)
        return found

    async def exec_driver_sql(self, statement: str) -> sa.CursorResult[Any]:
        found: sa.CursorResult[Any] = await self._run(_read_out, self._connection.exec_driver_sql, statement)
        return found


def _read_out(execute: Callable[..., sa.CursorResult[Any]], *args: Any) -> Any:
    """With every row there is: a statement that is not read to its end holds its view of the file open."""
    found = execute(*args)
    return found.freeze()() if found.returns_rows else found


@dataclass(frozen=True, slots=True)
class _Open:
    """The transaction that this thread is in."""

    database: "Database"
    transaction: Transaction
    writes: bool


_open: ContextVar[_Open | None] = ContextVar("open", default=None)


class Stored(Protocol):
    """Whoever keeps something in a database."""

    _db: "Database"


S = TypeVar("S", bound=Stored)
Method = Callable[Concatenate[S, P], Coroutine[Any, Any, T]]


def reading(method: Method[S, P, T]) -> Method[S, P, T]:
    """All that the method reads is one transaction; it awaits the database and nothing else (`Database.at_once`)."""

    @functools.wraps(method)
    async def read(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._db.at_once(method(self, *args, **kwargs))

    return read


def writing(method: Method[S, P, T]) -> Method[S, P, T]:
    """As `reading`, and the method may write: what it returns is committed."""

    @functools.wraps(method)
    async def write(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._db.at_once(method(self, *args, **kwargs), write=True)

    return write


class Database:
    """An open database. `write()` and `read()` are one transaction each; never hold one across the model or the net.

    Both raise StorageFull, Busy (another program holds the lock) or SchemaError (the file is damaged).
    """

    def __init__(self, path: Path, patience: float) -> None:
        self.path = path
        self._patience = patience
        self._writer = _engine(path, pool=1, begin="BEGIN IMMEDIATE")
        self._reader = _engine(path, pool=_READERS, begin="BEGIN", pragmas=("query_only = ON",))
        self._threads = ThreadPoolExecutor(_READERS + 1, thread_name_prefix="database")  # one for each connection
        self._writing = asyncio.Lock()  # first come, first served
        self._places = asyncio.Semaphore(_READERS)
        self._readable = asyncio.Event()
        self._readable.set()
        self._reading = 0
        self._idle = asyncio.Event()  # nobody reads
        self._idle.set()
        self._copying = asyncio.Lock()
        self._removed: list[Removed] = []

    @classmethod
    async def open(cls, path: Path, *, patience: float = 30.0) -> Self:
        """Make or migrate the file at `path` and open it. `patience`: seconds to wait for another program's lock.

        Raises SchemaError if the file is damaged, foreign or of a newer schema.
        """
        await in_thread(prepare, path)
        return cls(path, patience)

    async def close(self, *, wait: float = 5.0) -> None:
        """Let what is under way end, for `wait` seconds at most: a connection that is out would never be closed."""
        async with self._alone(wait):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait), self._writing:
                    pass
            await in_thread(self._reader.dispose)
            await in_thread(self._writer.dispose)
            self._threads.shutdown(wait=False)  # of a statement that goes on after all, they wait for the end

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        """A transaction that is committed at the end of the block, or rolled back if it raises."""
        if (outer := self._outer(write=True)) is not None:
            yield outer
            return
        async with self._writing, self._connected(self._writer) as connection:
            yield Transaction(connection, self._thread)
            await self._thread(connection.commit)

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[Transaction]:
        """A consistent view that cannot write. Blocks nest in `at_once` alone: `scrub` waits for the running ones."""
        if (outer := self._outer(write=False)) is not None:
            yield outer
            return
        async with self._place(), self._connected(self._reader) as connection:
            yield Transaction(connection, self._thread)

    async def at_once(self, work: Coroutine[Any, Any, T], *, write: bool = False) -> T:
        """All that `work` does to the database, `read` and `write` blocks included, as one transaction and in one
        thread, to its end even if the caller is cancelled. It must wait for nothing else."""
        try:
            if self._outer(write=write) is not None:
                return await work
            with answers(self.path):
                async with self._writing if write else self._place():
                    found: T = await self._patiently(self._driven, work, write)
                    return found
        finally:
            if inspect.getcoroutinestate(work) != inspect.CORO_RUNNING:  # the loop itself is being stopped
                work.close()

    def _outer(self, *, write: bool) -> Transaction | None:
        """The transaction that is open in this thread already."""
        outer = _open.get()
        if outer is None or outer.database is not self:
            return None
        if write and not outer.writes:
            raise RuntimeError("Nothing can be written where the database is only read.")
        return outer.transaction

    def _driven(self, work: Coroutine[Any, Any, T], write: bool) -> T:
        with contextlib.closing(_begun(self._writer if write else self._reader)) as connection:
            before = _open.set(_Open(self, Transaction(connection, _at_once), write))
            try:
                work.send(None)
            except StopIteration as end:
                found: T = end.value
            else:
                raise RuntimeError("What is done to the database at once waits for something else.")
            finally:
                _open.reset(before)
            if write:
                connection.commit()
            return found

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """Among those who read. Raises Busy if none is left for a minute."""
        await self._readable.wait()
        self._reading += 1
        self._idle.clear()
        try:
            try:
                async with asyncio.timeout(_LONGEST):
                    await self._places.acquire()
            except TimeoutError:
                raise Busy("Too many requests wait for the database; try again in a moment.") from None
            try:
                yield
            finally:
                self._places.release()
        finally:
            self._reading -= 1
            if not self._reading:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def _connected(self, engine: sa.Engine) -> AsyncIterator[sa.Connection]:
        """In a transaction; what is not committed is rolled back at the end."""
        opened: list[sa.Connection] = []
        with answers(self.path):
            try:
                await self._patiently(lambda: opened.append(_begun(engine)))
                yield opened[0]
            finally:
                for connection in opened:
                    await self._thread(connection.close)

    async def _patiently(self, function: Callable[..., T], *args: Any) -> T:
        """In a thread, once more while another program has the lock; nothing has happened then."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        while True:
            try:
                return await self._thread(function, *args)
            except _Locked as locked:
                if loop.time() >= deadline:
                    raise locked.error from None
            await asyncio.sleep(0.05)

    async def _thread(self, function: Callable[..., T], *args: Any) -> T:
        """In a thread of the database's, to its end."""
        here = contextvars.copy_context()
        return await whole(_running(self._threads, functools.partial(here.run, function, *args)))

    async def check(self) -> None:
        """Prove that the file is sound, search index and foreign keys included. Raises SchemaError with the finding."""
        async with self.write() as connection:
            await connection.exec_driver_sql("INSERT INTO entries_fts(entries_fts) VALUES ('integrity-check')")
        async with self.read() as connection:
            found = (await connection.exec_driver_sql("PRAGMA integrity_check(1)")).scalar_one()
            loose = (await connection.exec_driver_sql("PRAGMA foreign_key_check")).first()
        if found != "ok" or loose:
            raise damaged(self.path, "a reference leads nowhere" if found == "ok" else str(found))

    async def spare(self) -> None:
        """Prove that a few turns would find space. Raises StorageFull if not; nothing is kept."""
        with contextlib.suppress(_Enough):
            async with self.write() as connection:
                await connection.exec_driver_sql("CREATE TABLE spare (bytes)")
                await connection.exec_driver_sql(f"INSERT INTO spare VALUES (zeroblob({_SPARE}))")
                raise _Enough
        await in_thread(reserve, self.path.parent, _SPARE)

    async def copy(self, target: Path) -> None:
        """Copy the database to the new file `target`, consistent while others write. Raises StorageFull."""
        with answers(self.path), full_disk():
            async with self._copying:
                await in_thread(copy, self.path, target)

    async def scrub(self, *, entries: bool = True, wait: float = 10.0) -> bool:
        """Leave no byte of deleted text in the write-ahead log and, where `entries` were deleted, in the search index,
        which is written anew for that. Call it after the commit.

        False: the disk is full, or another program was still reading after `wait` seconds; the next scrub or start
        does it then.
        """
        try:
            if entries:
                async with self.write() as connection:
                    await connection.exec_driver_sql("INSERT INTO entries_fts(entries_fts) VALUES ('optimize')")
            with answers(self.path):
                return await self._truncate(wait)
        except (StorageFull, Busy):
            return False

    async def erase(self, delete: Callable[[Transaction], Awaitable[T]]) -> T:
        """What `delete` gives, in a transaction of its own; of what it deleted, no entries, no byte is left, to the end
        even if the caller is cancelled meanwhile."""

        async def both() -> T:
            async with self.write() as connection:
                gone = await delete(connection)
            await self.scrub(entries=False)
            return gone

        return await whole(both())

    def on_removed(self, callback: Removed) -> None:
        """Have `callback(user, numbers)` called after an entry and these versions (None: the user) were deleted."""
        self._removed.append(callback)

    async def removed(self, user_id: UserId, numbers: Sequence[int] | None) -> None:
        """Tell whoever keeps files that these versions are gone from the database."""
        for callback in self._removed:
            await callback(user_id, numbers)

    @contextlib.asynccontextmanager
    async def _alone(self, wait: float) -> AsyncIterator[None]:
        """Hold new readers back and let the running ones end."""
        self._readable.clear()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._idle.wait()
            yield
        finally:
            self._readable.set()

    async def _truncate(self, wait: float) -> bool:
        """Empty the write-ahead log. While another program reads, ours may between two attempts."""
        deadline = asyncio.get_running_loop().time() + wait
        while True:
            async with self._copying, self._alone(wait), self._writing:
                busy = await in_thread(checkpoint, self.path)
            if not busy or asyncio.get_running_loop().time() >= deadline:
                return not busy
            await asyncio.sleep(0.05)


def _begun(engine: sa.Engine) -> sa.Connection:
    """A connection of the pool, in a transaction. Raises _Locked if another program has the lock."""
    connection = engine.connect()
    try:
        connection.begin()
    except BaseException as error:
        connection.close()
        if isinstance(error, sa.exc.OperationalError) and code(error) in LOCKED:
            raise _Locked(error) from error
        raise
    return connection


async def _at_once(function: Callable[..., T], *args: Any) -> T:
    return function(*args)


async def _running(threads: ThreadPoolExecutor, function: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, function)


def _engine(path: Path, *, pool: int, begin: str, pragmas: Sequence[str] = ()) -> sa.Engine:
    """Parameters are hidden because errors quote them, and they are user text."""
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"check_same_thread": False},  # one thread after another, never two at once
        pool_size=pool,
        max_overflow=0,
        hide_parameters=True,
    )

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        cursor = connection.cursor()
        for pragma in (*PRAGMAS, *pragmas):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine
