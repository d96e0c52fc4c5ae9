"""Publishes and points one more version, then deletes an entry; the environment says where the process dies.

Arguments: database, adapter folder, user id, an entry of the user.
"""

import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path

from persona.domain import EntryId, Frame, RunState, UserId
from storage.adapters import Adapters
from storage.database import Database
from storage.runs import ExampleRow, Runs


async def main(database: str, root: str, user: str, entry: str) -> None:
    db = await Database.open(Path(database))
    adapters, runs, user_id = Adapters(db, Path(root)), Runs(db), UserId(int(user))
    for run in await runs.running():
        await runs.end(run.id, RunState.INTERRUPTED, "Killed.", datetime.now(UTC))
    run = await runs.start((await runs.request(user_id, datetime.now(UTC))).id, datetime.now(UTC))
    await runs.set_examples(run.id, [ExampleRow(EntryId(int(entry)), Frame.TURN, 3, 1.0)])
    folder = await adapters.workspace(user_id)
    (folder / "adapter.safetensors").write_bytes(b"new weights")
    version = await adapters.publish(
        user_id,
        folder,
        watermark=EntryId(int(entry)),
        parent=1,
        base="base",
        run_id=run.id,
        metrics={},
        plan={},
    )
    await adapters.point(user_id, version.number)
    await db.close()


asyncio.run(main(*sys.argv[1:]))
