"""How many events a second `Events.store` commits: batches of messages, facts, states and happenings, each once.

    python tests/bench/storing.py [--size 500] [--batches 20] [--users 1] [--kinds message,fact,state,meter]

Tokens are counted by length, so that the figure is the database's alone. Prints the rate, the first batch and the last
one (they differ where a batch costs more as the tables grow), and statements a batch.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from persona import event
from persona.domain import User
from storage.database import Database
from storage.events import Arrived, Events
from storage.users import Users

NOW = datetime(2026, 5, 1, tzinfo=UTC)


def arrived(number: int, user: User, kind: str) -> Arrived:
    body = {"id": number, "seq": number // 5, "source": f"s{number % 5}", "text": f"number {number} of many words"}
    body |= {"key": f"k{number % 2000}", "value": number}
    payload = json.dumps(body).encode()
    return Arrived(user.id, event.read(user.name, kind, payload, NOW, 65_536), user.name, payload)


async def measure(arguments: argparse.Namespace, folder: Path) -> str:
    db = await Database.open(folder / "persona.db")
    users = [await Users(db).add(f"user-{number}") for number in range(arguments.users)]
    events, kinds, size = Events(db), arguments.kinds.split(","), arguments.size
    statements: list[str] = []
    sa.event.listen(db._writer, "before_cursor_execute", lambda *call: statements.append(call[2]))
    seconds = []
    for first in range(0, arguments.batches * size, size):
        batch = [arrived(at, users[at % len(users)], kinds[at % len(kinds)]) for at in range(first, first + size)]
        began = time.perf_counter()
        await events.store(batch, count=len, now=NOW)
        seconds.append(time.perf_counter() - began)
    await db.close()
    rate = size * len(seconds) / sum(seconds)
    ends = f"first batch {seconds[0] * 1000:.0f} ms, last {seconds[-1] * 1000:.0f} ms"
    return f"{rate:.0f} events/s, {ends}, {len(statements) / len(seconds):.0f} statements a batch\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=500)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--users", type=int, default=1)
    parser.add_argument("--kinds", default="message,fact,state,meter")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(asyncio.run(measure(arguments, Path(folder))))


if __name__ == "__main__":
    main()
