"""The prior: an adapter of several people's words, from which each user starts in place of the bare base.

What people who write in a like way have in common is learned once, from those who agreed to it or from public text, and
a user's own adapter has only the rest to learn. It is an ordinary adapter of the plan's form: a run starts from its
values as it would from the user's last version.
"""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np

from jobs import dataset
from jobs.plans import plan
from jobs.rehearsal import Rehearsal
from persona.domain import ChatTokenizer, Entry
from persona.engine.faces import Training
from persona.engine.protocol import Example, Progress, TrainRequest
from persona.errors import RequestError
from persona.settings import Settings

SEED = 20_265


def examples(
    histories: Sequence[Sequence[Entry]], *, tokenizer: ChatTokenizer, settings: Settings, tokens: int
) -> list[Example]:
    """Of each history an equal share of `tokens` (context included), its newest words. Raises RequestError for none."""
    share = settings.learning.model_copy(update={"max_run_tokens": max(1000, tokens // max(1, len(histories)))})
    found = [
        sample.example
        for entries in histories
        for sample in dataset.everything(
            entries,
            tokenizer=tokenizer,
            settings=share,
            system=settings.prompt.system,
            longest=settings.engine.context,
        )
    ]
    if not found:
        raise RequestError("None of these histories holds words to learn from.")
    return [found[i] for i in np.random.default_rng(SEED).permutation(len(found))]


async def train(
    engine: Training, rehearsal: Rehearsal, some: list[Example], settings: Settings, out: Path
) -> AsyncIterator[Progress]:
    """Write adapter.safetensors into the folder `out`; the base's own replies are rehearsed as in a user's run."""
    rehearsed = await rehearsal.examples(some, SEED)
    wanted = plan(settings.learning.model_copy(update={"max_run_tokens": 0}), settings.learning.passes)
    async for progress in engine.train(TrainRequest([*some, *rehearsed], wanted, str(out))):
        yield progress
