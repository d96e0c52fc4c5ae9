"""A disk that is really full: the whole service in a file system of its own, small enough to fill."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parts import program
from structlog.testing import capture_logs

from persona import app
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.errors import Busy, StorageFull
from persona.settings import Settings
from storage.adapters import Adapters
from storage.backup import Backups

ROOT = Path(__file__).parent.parent.parent
COMMON = """
import asyncio, json, os, sys
from datetime import UTC, datetime
from pathlib import Path
import aiohttp
from jobs import schedule
from persona import app
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.settings import Settings
from storage.database import Database
from storage.runs import Runs
from storage.users import Users

disk = Path(sys.argv[1])
settings = Settings.model_validate({"home": disk / "home", "http": {"port": 0}, "log": {"level": "error"}})


def fill():
    with open(disk / "filling", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
"""
CHAT = """
async def main() -> None:
    async with app.build(settings, engine=ScriptedEngine(), tokenizer=ScriptedText()) as house:
        user = await house.services.users.add("ann")
        _, key = await house.services.users.add_key(user.id)
        connector = aiohttp.UnixConnector(path=str(settings.admin_socket))
        async with (
            aiohttp.ClientSession(house.url, headers={"Authorization": f"Bearer {key}"}) as http,
            aiohttp.ClientSession("http://persona", connector=connector) as admin,
        ):
            print(json.dumps(await story(http, admin)))


async def story(http, admin):
    async def chat(text):
        body = {"model": "persona", "messages": [{"role": "user", "content": text}]}
        async with http.post("/v1/chat/completions", json=body) as answer:
            return answer.status, answer.headers["x-persona-recorded"]

    async def ready():
        async with http.get("/ready") as answer:
            return answer.status, (await answer.json())["degraded"]

    async def backup():
        async with admin.post("/admin/backup", json={"folder": str(disk / "copy")}) as answer:
            return answer.status, sorted(path.name for path in disk.iterdir())

    async def export():
        async with http.get("/v1/me/export") as answer:
            left = [path.name for path in settings.run_dir.glob("export-*")]
            return answer.status, len(await answer.read()) > 100, left

    told = {"before": [await chat("hello"), await ready()]}
    fill()
    said = [await chat(f"{number} " + "x" * 3000) for number in range(60)]
    told["full"] = [said[-1], await ready(), await backup(), await export()]
    os.unlink(disk / "filling")
    told["after"] = [await ready(), await chat("again"), await backup(), await export()]
    return told


asyncio.run(main())
"""


START = """
class Filling(ScriptedEngine):
    filled = False

    async def health(self):  # first asked when the database is open and repaired, before the runs are put right
        if not self.filled:
            self.filled = True
            fill()
        return await super().health()


async def killed():
    database = await Database.open(settings.database)
    user = await Users(database).add("ann")
    runs = Runs(database)
    await runs.start((await runs.request(user.id, datetime.now(UTC))).id, datetime.now(UTC))
    await database.close()


async def main():
    settings.home.mkdir()
    await killed()
    schedule.PAUSE_SECONDS = 0.1
    async with app.build(settings, engine=Filling(), tokenizer=ScriptedText()) as house:
        async with aiohttp.ClientSession(house.url) as http, http.get("/health") as answer:
            told = [answer.status, len(await house.services.runs.running())]
        os.unlink(disk / "filling")
        ended = await house.services.schedule.wait(1, 1)
        print(json.dumps([*told, ended.state.value]))


asyncio.run(main())
"""


def test_threat_23_a_full_disk_is_told_chat_goes_on_and_space_that_returns_is_noticed(tmp_path: Path) -> None:
    told = on_a_small_disk(tmp_path, CHAT)
    assert told["before"] == [[200, "true"], [200, []]]
    chat, ready, backup, export = told["full"]
    assert (chat, ready) == ([200, "false"], [200, ["disk"]])
    assert backup == [503, ["filling", "home"]], "a backup that does not fit leaves nothing"
    assert export == [503, True, []], "nor does an archive"
    ready, chat, backup, export = told["after"]
    assert (ready, chat) == ([200, []], [200, "true"])
    assert backup == [201, ["copy", "home"]]
    assert export == [200, True, []]


def test_threat_23_a_restart_on_a_full_disk_serves_and_takes_the_run_up_when_there_is_space(tmp_path: Path) -> None:
    assert on_a_small_disk(tmp_path, START) == [200, 1, "deferred"]


async def test_threat_23_a_repair_that_finds_no_space_does_not_stop_the_start(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(adapters: Adapters) -> list[str]:
        raise StorageFull("The disk is full: nothing was written.")

    async def locked(backups: Backups) -> list[str]:
        raise Busy("Another program holds the database; try again in a moment.")

    monkeypatch.setattr(Adapters, "repair", full)
    monkeypatch.setattr(Backups, "repair", locked)
    with capture_logs() as logs:
        async with app.build(settings, engine=ScriptedEngine(), tokenizer=ScriptedText()):
            pass
    assert [line["error"] for line in logs if "repairs wait" in line["event"]] == ["StorageFull", "Busy"]


def on_a_small_disk(tmp_path: Path, program_: str) -> Any:
    """What the program tells in one line of JSON; it has its file system for itself."""
    own = [program("unshare"), "--user", "--map-root-user", "--mount"]
    refused = subprocess.run([*own, "true"], capture_output=True, text=True)
    if refused.returncode:  # with CI=true as well: no package opens what a container's host has closed
        pytest.skip(f"no user namespace with a file system of its own on this machine: {refused.stderr.strip()}")
    mount = 'mount -t tmpfs -o size=80m tmpfs "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        [*own, "sh", "-c", mount, "sh", str(tmp_path), sys.executable, COMMON + program_],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith(("{", "["))))
