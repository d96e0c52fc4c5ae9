"""Stores one batch of two events of a user; the environment says where the process dies.

Arguments: database, user name.
"""

import asyncio
import sys
from pathlib import Path

from arriving import store, told

from storage.database import Database
from storage.events import Events
from storage.users import Users


async def main(database: str, name: str) -> None:
    db = await Database.open(Path(database))
    user = await Users(db).get(name)
    assert user is not None
    await store(Events(db), told(user, text="hello", id=1), told(user, "fact", key="town", value="Ghent", id=2))
    await db.close()


asyncio.run(main(*sys.argv[1:]))
