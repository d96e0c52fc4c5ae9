"""The service in a process of its own with a scripted engine and a real broker: to be killed and started again."""

import asyncio
import json
import os
import sys
import textwrap
from contextlib import closing
from pathlib import Path
from sqlite3 import connect
from typing import Any

import aiohttp
from broker import PASSWORD, ROOT, Mosquitto

PROGRAM = textwrap.dedent(
    """
    import asyncio, json, sys
    from pathlib import Path
    from persona import app
    from persona.engine.scripted import ScriptedEngine, ScriptedText
    from persona.settings import Settings

    async def ready(house):
        for name in ("ann", "bob"):
            if await house.services.users.get(name) is None:
                await house.services.users.add(name)
        Path(sys.argv[2]).write_text(house.url)

    settings = Settings.model_validate(json.loads(sys.argv[1]))
    engine = ScriptedEngine("Yes, of course.", delay=0.01)
    asyncio.run(app.serve(settings, ready=ready, engine=engine, tokenizer=ScriptedText()))
    """
)


class Served:
    """A service that reaches `broker`, and its database as it lies on the disk."""

    def __init__(self, folder: Path, broker: Mosquitto) -> None:
        self.home = folder / "home"
        self._told = folder / "url"
        self._options: dict[str, Any] = {
            "home": str(self.home),
            "http": {"port": 0, "shutdown_seconds": 1},
            "mqtt": broker.settings(),
            "log": {"level": "error", "json_lines": True},
        }
        self.child: asyncio.subprocess.Process | None = None

    def change(self, **mqtt: Any) -> None:
        """Settings of its section [mqtt], before it starts."""
        self._options["mqtt"] |= mqtt

    async def start(self) -> None:
        self._told.unlink(missing_ok=True)
        self.child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PROGRAM, json.dumps(self._options), str(self._told)),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(30):
            while not (self._told.exists() and self._told.read_text()):
                assert self.child.returncode is None, "the service ended"
                await asyncio.sleep(0.05)

    @property
    def url(self) -> str:
        return self._told.read_text()

    async def kill(self) -> None:
        if self.child is not None and self.child.returncode is None:
            self.child.kill()
            await self.child.wait()

    async def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self.child is not None
        self.child.terminate()
        return await asyncio.wait_for(self.child.wait(), 30)

    def memory(self) -> int:
        """Its resident set in bytes."""
        assert self.child is not None
        pages = int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def rows(self, query: str, *values: Any) -> list[Any]:
        """What the database holds; readable while the service runs."""
        with closing(connect(f"file:{self.home / 'persona.db'}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(query, values).fetchall()

    def count(self, query: str, *values: Any) -> int:
        return int(self.rows(query, *values)[0][0] or 0)

    async def until(self, query: str, wanted: int, seconds: float = 60.0) -> None:
        """Wait until the query gives that number."""
        async with asyncio.timeout(seconds):
            while self.count(query) < wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.1)

    async def settled(self) -> None:
        """Wait until there is a broker and nothing has arrived for a second: it delivers in order."""
        async with asyncio.timeout(60):
            before, now = None, await self._arrived()
            while now is None or now != before:
                await asyncio.sleep(1.0)
                before, now = now, await self._arrived()

    async def _arrived(self) -> list[str] | None:
        """What the metrics count of events; None without a broker."""
        async with aiohttp.ClientSession(self.url) as session, session.get("/metrics") as answer:
            lines = (await answer.text()).splitlines()
        counted = [line for line in lines if line.startswith("persona_events_total")]
        return counted if "persona_mqtt_up 1.0" in lines else None


async def flood(broker: Mosquitto, user: str, count: int, *options: str) -> asyncio.subprocess.Process:
    """Begin to publish so many messages as that user."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "tests/flood.py"), str(broker.port), user, PASSWORD.format(user), str(count)),
        *options,
        stdout=asyncio.subprocess.PIPE,
    )


async def acknowledged(publisher: asyncio.subprocess.Process) -> int:
    """How many messages the broker has acknowledged, when the publisher has ended."""
    out, _ = await publisher.communicate()
    return int(out)
