"""The database as a file: checked, migrated and copied before and beside its use, each with a connection of its own.

A file of a newer schema, a foreign or a damaged one is refused and left as it is. With database.py and fulltext.py
this is the only place that names the SQL dialect.
"""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from persona.errors import Busy, ConfigurationError, SchemaError, StorageFull
from storage.files import full_disk, reserve

PRAGMAS = (
    "synchronous = FULL",
    "busy_timeout = 5000",
    "foreign_keys = ON",
    "secure_delete = ON",
    "temp_store = MEMORY",
)
LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE}
_UNWRITTEN = {sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_TRUNCATE}
_TRIAL = 1 << 20  # bytes
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_MIGRATIONS = Path(__file__).parent / "migrations"


def code(error: sa.exc.DBAPIError | sqlite3.Error) -> int:
    cause = error.orig if isinstance(error, sa.exc.DBAPIError) else error
    return int(getattr(cause, "sqlite_errorcode", 0))


@contextlib.contextmanager
def answers(path: Path) -> Iterator[None]:
    """What the driver reports about disk, lock and file, in our words."""
    try:
        yield
    except (sa.exc.DBAPIError, sqlite3.Error) as error:
        found = code(error)
        if found in _FULL or (found in _UNWRITTEN and _no_space(path.parent)):
            raise StorageFull("The disk is full: nothing was written; free some space and try again.") from error
        if found in LOCKED or found & 0xFF in LOCKED:
            raise Busy("Another program holds the database; try again in a moment.", retry_after=5) from error
        if found in _DAMAGED or found & 0xFF in _DAMAGED:
            raise damaged(path, "it cannot be read") from error
        if found & 0xFF == sqlite3.SQLITE_CANTOPEN:
            raise ConfigurationError(f"The database {path} cannot be opened: check its folder and owner.") from error
        raise


def _no_space(place: Path) -> bool:
    """SQLite knows a spent quota, and a network's disk that is full, only as a write that failed."""
    try:
        reserve(place, _TRIAL)
    except StorageFull:
        return True
    except OSError:  # so it is the disk itself
        return False
    return False


def damaged(path: Path, finding: str) -> SchemaError:
    return SchemaError(
        f"The database {path} is damaged ({finding.splitlines()[-1]}); move it away together with its -wal and -shm "
        "files, and copy a backup to its place."
    )


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None)
    try:
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def examine(path: Path) -> tuple[str | None, str]:
    """The schema of the existing file and that of this program, changing neither. Raises as `prepare` does."""
    with answers(path):
        return _revision(path), _head()


def knows(schema: str) -> bool:
    """Whether this program can open a file of that schema."""
    return schema in _known()


def prepare(path: Path) -> None:
    """Make the file, or bring it to this program's schema; one process at a time.

    Raises SchemaError if it is damaged, foreign or of a newer schema, ConfigurationError if it cannot be opened.
    """
    try:
        with full_disk():
            _prepare(path)
    except OSError as error:
        raise ConfigurationError(f"The database {path} cannot be opened: {error.strerror}.") from error


def _prepare(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock, answers(path):
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        revision = _revision(path)
        _log_ahead(path)  # a copy comes without it, and readers would wait for the writer
        if revision != _head():
            if revision is not None:
                _optimize(path)  # or the copy held the words that a kill left there
                _keep_before(path, revision)
            _migrate(path)
        with contextlib.suppress(sqlite3.OperationalError):  # full or locked: the next scrub or start does it
            _optimize(path)
            checkpoint(path)


def _revision(path: Path) -> str | None:
    """The schema of the file, None for a fresh one. Raises SchemaError if it is not one of ours."""
    with contextlib.closing(connect(path)) as connection:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise damaged(path, found)
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not tables:
            return None
        rows = connection.execute("SELECT version_num FROM alembic_version").fetchall() if "entries" in tables else []
    revision = str(rows[0][0]) if rows else "unknown"
    if revision not in _known():
        raise SchemaError(
            f"The database {path} has schema {revision}, and this persona knows schemas up to {_head()}; "
            "install the persona that wrote it, or restore a backup."
        )
    return revision


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(_MIGRATIONS))


def _known() -> set[str]:
    return {script.revision for script in _scripts().walk_revisions()}


def _head() -> str:
    return str(_scripts().get_current_head())


def _migrate(path: Path) -> None:
    """All steps in one transaction: after a crash the file has the old schema or the new one."""
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)), isolation_level="AUTOCOMMIT")
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.exec_driver_sql("COMMIT")
    finally:
        engine.dispose()


def _log_ahead(path: Path) -> None:
    with contextlib.closing(connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[sa.Connection]:
    """A transaction on a file that nobody else has open, say a copy."""
    engine = sa.create_engine(sa.URL.create("sqlite", database=str(path)))
    try:
        with answers(path), engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def upgrade_copies(path: Path) -> list[Path]:
    """Copies of the database that an upgrade left beside it."""
    return sorted(path.parent.glob(f"{path.stem}-before-*{path.suffix}"))


def people(copied: Path) -> list[tuple[int, str]]:
    """Id and name of every user in a copy that nobody writes; of one that cannot be read, of nobody."""
    uri = f"{copied.absolute().as_uri()}?mode=ro&immutable=1"  # leaves no file beside it
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            return [(int(user_id), str(name)) for user_id, name in connection.execute("SELECT id, name FROM users")]
    except sqlite3.Error:
        return []


def _keep_before(path: Path, revision: str) -> None:
    """A copy of the file as it was; of earlier upgrades none is kept."""
    for old in upgrade_copies(path):
        old.unlink()
    copy(path, path.with_name(f"{path.stem}-before-{_head()}-was-{revision}{path.suffix}"))


def copy(path: Path, target: Path) -> None:
    """A consistent, complete and durable copy at `target`, or none."""
    part = target.with_name(target.name + ".part")
    part.unlink(missing_ok=True)
    try:
        os.close(os.open(part, os.O_RDWR | os.O_CREAT, 0o600))
        with contextlib.closing(connect(path)) as connection:
            connection.execute("VACUUM INTO ?", (str(part),))
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _optimize(path: Path) -> None:
    """Leave no deleted word in the search index, if a scrub could not do it."""
    with contextlib.closing(connect(path)) as connection:
        connection.execute("INSERT INTO entries_fts(entries_fts) VALUES ('optimize')")


def checkpoint(path: Path) -> bool:
    """Empty the write-ahead log. True if a reader prevented it."""
    with contextlib.closing(connect(path)) as connection:
        connection.execute("PRAGMA busy_timeout = 100")
        return bool(connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
