"""Forgets a user; the environment says where the process dies. Arguments: database, adapter folder, user id."""

import asyncio
import sys
from pathlib import Path

from persona.domain import UserId
from storage.adapters import Adapters
from storage.database import Database
from storage.users import Users


async def main(database: str, root: str, user: str) -> None:
    db = await Database.open(Path(database))
    Adapters(db, Path(root))  # who removes the files of whoever is forgotten
    await Users(db).forget(UserId(int(user)))
    await db.close()


asyncio.run(main(*sys.argv[1:]))
