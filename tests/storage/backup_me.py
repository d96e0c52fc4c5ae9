"""Makes a backup; the environment says where the process dies. Arguments: database, adapter folder, target."""

import asyncio
import sys
from pathlib import Path

from storage.adapters import Adapters
from storage.backup import Backups
from storage.database import Database


async def main(database: str, root: str, target: str) -> None:
    db = await Database.open(Path(database))
    await Backups(db, Adapters(db, Path(root))).make(Path(target))
    await db.close()


asyncio.run(main(*sys.argv[1:]))
