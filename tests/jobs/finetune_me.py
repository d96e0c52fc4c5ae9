"""Carries out one run over a scripted engine; where the process dies is said by the environment, or as `step-N`.

Arguments: home, user id, place. At a place of a deletion, an entry of the run is deleted after the second step.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from histories import TEXT, learning
from world import Clock, improving

from jobs.finetune import Finetune
from persona.domain import EntryId, UserId
from persona.engine.protocol import Progress, TrainRequest
from persona.engine.scripted import ScriptedEngine
from persona.settings import Settings
from storage.adapters import Adapters
from storage.database import Database
from storage.failpoints import KILLED
from storage.history import History
from storage.runs import Runs
from storage.users import Users


class Deadly(ScriptedEngine):
    """Dies after a step, or has an entry deleted then."""

    def __init__(self, history: History, user_id: UserId, place: str) -> None:
        super().__init__(score=improving, steps=5)
        self._history, self._user_id, self._place = history, user_id, place

    async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
        async for progress in super().train(request):
            if self._place == f"step-{progress.step}":
                os._exit(KILLED)
            if self._place.startswith("delete") and progress.step == 2:
                await self._history.delete(self._user_id, EntryId(5))
            yield progress


async def main(home: str, user: str, place: str) -> None:
    db, clock, user_id = await Database.open(Path(home, "persona.db")), Clock(), UserId(int(user))
    settings = Settings.model_validate({"home": home, "learning": learning().model_dump()})
    users, history, adapters, runs = Users(db), History(db), Adapters(db, settings.adapters), Runs(db)
    engine = Deadly(history, user_id, place)
    finetune = Finetune(settings, users, history, adapters, runs, engine, TEXT, lambda: "base-hash", clock)
    await finetune.run(await runs.request(user_id, clock()))
    await db.close()


asyncio.run(main(*sys.argv[1:]))
