"""Stores numbered turns until it is killed, and says on stdout how many are committed. Arguments: database, user id."""

import asyncio
import itertools
import sys
from datetime import UTC, datetime
from pathlib import Path

from persona.domain import Message, Role, UserId
from storage.database import Database
from storage.history import History


async def main(database: str, user: str) -> None:
    history = History(await Database.open(Path(database)))
    for number in itertools.count():
        messages = [Message(Role.USER, f"message {number}")]
        await history.place(UserId(int(user)), messages, conversation_id=None, now=datetime.now(UTC), count=len)
        sys.stdout.write(f"{number + 1}\n")
        sys.stdout.flush()


asyncio.run(main(*sys.argv[1:]))
