"""An engine of one's own in a home that is gone afterwards: for experiments, beside a service or without one."""

import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs.rehearsal import Rehearsal
from persona import logs
from persona.doctor import available_memory
from persona.domain import ChatTokenizer
from persona.engine.client import LocalEngine
from persona.engine.faces import Engine
from persona.engine.prepare import Prepared
from persona.engine.text import Text
from persona.errors import ConfigurationError
from persona.settings import Log, Settings
from storage.database import Database

MEMORY_MB = 768  # for cache and adapters, at most: few sequences run at once
SLICE_TOKENS = 512  # nobody waits for a step between two slices
_OVERHEAD = 1 << 30  # bytes of a process with torch in it, and of activations


@dataclass(frozen=True, slots=True)
class Private:
    """The parts of an experiment."""

    settings: Settings
    engine: Engine
    tokenizer: ChatTokenizer
    database: Database
    base: str
    rehearsal: Rehearsal


@asynccontextmanager
async def private(settings: Settings, prepared: Prepared) -> AsyncIterator[Private]:
    """An engine with the prepared model and an empty database. Raises ConfigurationError if memory is short."""
    logs.configure(Log(level="warning"), sys.stderr)  # stdout is for what was found
    require_memory(prepared, MEMORY_MB)
    with _ended_properly(), tempfile.TemporaryDirectory(prefix="persona-") as home:
        mine = _adapted(settings, Path(home))
        tokenizer = await asyncio.to_thread(Text.load, prepared.folder)
        database = await Database.open(mine.database)
        engine = LocalEngine(mine, prepared)
        try:
            await engine.start()
            rehearsal = Rehearsal(engine, tokenizer, mine, lambda: prepared.base)
            yield Private(mine, engine, tokenizer, database, prepared.base, rehearsal)
        finally:
            await engine.stop()
            await database.close()


def require_memory(prepared: Prepared, memory_mb: int) -> None:
    """Raises ConfigurationError unless an engine with that budget for cache and adapters fits beside what runs."""
    weights = sum(file.stat().st_size for file in prepared.folder.iterdir())
    wanted = 2 * weights + (memory_mb << 20) + _OVERHEAD
    if (available := available_memory()) < wanted:
        raise ConfigurationError(
            f"An engine of its own wants {wanted >> 20} MiB of memory, and {available >> 20} MiB are available:"
            " stop the service or other programs meanwhile."
        )


@contextmanager
def _ended_properly() -> Iterator[None]:
    """A SIGTERM ends the program as Ctrl-C does: the home goes, with the histories in it.

    One that came where Python lets nothing be raised, in a finalizer say, is obeyed at the end.
    """
    came: list[int] = []

    def end(number: int, _: object) -> None:
        came.append(number)
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    if came:
        sys.exit(128 + came[0])


def _adapted(settings: Settings, home: Path) -> Settings:
    engine = settings.engine
    changed = engine.model_copy(
        update={
            "memory_mb": min(engine.memory_mb, MEMORY_MB),
            "prefill_tokens": max(engine.prefill_tokens, SLICE_TOKENS),
        }
    )
    learning = settings.learning.model_copy(update={"slice_tokens": max(settings.learning.slice_tokens, SLICE_TOKENS)})
    return settings.model_copy(update={"home": home, "engine": changed, "learning": learning})
