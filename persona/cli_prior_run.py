"""What `persona prior train` does: several people's histories become one adapter."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from rich.progress import Progress

from jobs import people
from jobs import prior as priors
from persona.app_private import Private, private
from persona.cli_screen import progress
from persona.cli_serve import fetched
from persona.domain import Entry, EntryId
from persona.engine import adapter_file
from persona.settings import Settings
from storage.history import History
from storage.users import Users


async def train(
    configuration: Settings, some: list[people.Person], tokens: int, out: Path
) -> dict[str, str | int | float]:
    prepared = await asyncio.to_thread(fetched, configuration)
    async with private(configuration, prepared) as parts:
        histories = [await _history(parts, number, person) for number, person in enumerate(some)]
        examples = priors.examples(histories, tokenizer=parts.tokenizer, settings=parts.settings, tokens=tokens)
        out.mkdir(parents=True, exist_ok=True)
        seconds = 0.0
        with progress(*Progress.get_default_columns()) as bar:
            task = bar.add_task("training")
            async for step in priors.train(parts.engine, examples, parts.settings, out):
                bar.update(task, completed=step.step, total=step.steps)
                seconds = step.seconds
        size = (out / adapter_file.FILE).stat().st_size
        about = {"people": len(some), "examples": len(examples), "seconds": seconds, "bytes": size}
        return {**about, "folder": str(out), "base": parts.base}


async def _history(parts: Private, number: int, person: people.Person) -> list[Entry]:
    """The person's entries, as the service would store them."""
    history = History(parts.database)
    user = await Users(parts.database).add(f"p{number}")

    def count(text: str) -> int:
        return len(parts.tokenizer.encode(text))

    await history.import_(user.id, person.items, count=count, now=datetime.now(UTC))
    return await history.recent(user.id, EntryId(0), exclude=(), limit=len(person.items))
