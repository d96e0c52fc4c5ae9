"""What `persona prior train` does: several people's histories become one adapter."""

import asyncio
import secrets
from pathlib import Path

from rich.progress import Progress

from jobs import evaluate, people, plans
from jobs import prior as priors
from persona.app_private import private
from persona.cli_screen import progress
from persona.cli_serve import fetched
from persona.engine import adapter_file
from persona.settings import Settings
from storage.history import History
from storage.users import Users


async def train(
    configuration: Settings, some: list[people.Person], tokens: int, out: Path
) -> dict[str, str | int | float]:
    """Write the prior into `out`, and who made it. Returns what was learned from, and what it costs the assistant.

    drift: of the loss on the reference set · forgetting: of the base's own replies, nats per token · objection: why the
    gate of a service would refuse such a version, if it would.
    """
    prepared = await asyncio.to_thread(fetched, configuration)
    async with private(configuration, prepared) as parts:
        store = Users(parts.database), History(parts.database)
        enrolled = [
            await people.enrol(one, i, *store, lambda text: len(parts.tokenizer.encode(text)))
            for i, one in enumerate(some)
        ]
        histories = [entries for _, entries in enrolled]
        examples = priors.examples(histories, tokenizer=parts.tokenizer, settings=parts.settings, tokens=tokens)
        out.mkdir(parents=True, exist_ok=True)
        seconds = 0.0
        with progress(*Progress.get_default_columns()) as bar:
            task = bar.add_task("training")
            async for step in priors.train(parts.engine, parts.rehearsal, examples, parts.settings, out):
                bar.update(task, completed=step.step, total=step.steps)
                seconds = step.seconds
            priors.write_people(out, some, secrets.token_hex(8))
            bar.update(task, description="what it costs")
            made = plans.folder(out)
            await parts.engine.stage(made)
            cost = await evaluate.cost(parts.engine, parts.tokenizer, made, parts.rehearsal, parts.settings)
        size = (out / adapter_file.FILE).stat().st_size
        return {
            "people": len(some),
            "examples": len(examples),
            "seconds": seconds,
            "bytes": size,
            "drift": cost.drift,
            "forgetting": cost.forgetting,
            "objection": cost.objection(parts.settings) or "",
            "folder": str(out),
            "base": parts.base,
        }
