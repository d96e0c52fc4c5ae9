"""Forgetting and clients that come and go: what has begun ends, and a download leaves nothing behind."""

import asyncio
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from string import ascii_letters
from typing import Any

import pytest
from live import Live, Start

from persona.domain import UserId
from persona.engine.scripted import ScriptedEngine

DATA = Path(__file__).parent.parent / "data"
CANARY = "xylophonquartz"


class Gate:
    """Holds a deletion where its rows are gone and its files are not."""

    def __init__(self, live: Live) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()
        live.services.database.on_removed(self._hold)

    async def _hold(self, user_id: UserId, numbers: Sequence[int] | None) -> None:
        self.reached.set()
        await self.opened.wait()


async def leave_at(gate: Gate, live: Live, method: str, path: str, body: dict[str, Any]) -> None:
    """Ask, and cut the connection when the gate is reached; the service knows of it before the gate opens."""
    content = json.dumps(body).encode()
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {await live.key()}",
        f"Content-Length: {len(content)}",
    ]
    _, writer = await asyncio.open_connection("127.0.0.1", live.port)
    writer.write("\r\n".join([*lines, "", ""]).encode() + content)
    await asyncio.wait_for(gate.reached.wait(), 5)
    writer.transport.abort()
    await asyncio.sleep(0.1)
    gate.opened.set()


async def dropped(live: Live, times: int) -> None:
    """Wait until the engine has dropped the user that often: the last step of either deletion."""
    async with asyncio.timeout(5):
        while len(live.engine.dropped) < times:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_threat_32_a_download_under_way_leaves_no_word_in_the_folder_of_whoever_is_forgotten(live: Live) -> None:
    random = Random(0)
    texts = ["".join(random.choices(ascii_letters, k=60_000)) for _ in range(130)]  # more than any socket holds
    items = [{"ts": at, "text": f"{CANARY} {text}"} for at, text in enumerate(texts)]
    lines = b"".join(json.dumps(item).encode() + b"\n" for item in items)
    await live.call("POST", "/v1/me/history", data=io.BytesIO(lines))
    headers = {"Authorization": f"Bearer {await live.key()}"}
    async with live.http.get("/v1/me/export", headers=headers) as answer:
        assert answer.status == 200
        await live.call("POST", "/v1/me/forget", json={"confirm": "ann"})
        run_dir = live.services.settings.run_dir
        assert list(run_dir.glob("export-*")) == []
        assert holding(live) == []
        archive = zipfile.ZipFile(io.BytesIO(await answer.read()))
    assert archive.read("history.jsonl").count(CANARY.encode()) == len(texts)


def holding(live: Live) -> list[str]:
    """Files of the state folder that hold the canary."""
    files = [path for path in live.services.settings.home.rglob("*") if path.is_file()]
    return [path.name for path in files if CANARY.encode() in path.read_bytes()]


async def test_threat_32_who_leaves_while_being_forgotten_is_forgotten_to_the_last_byte(live: Live) -> None:
    await live.say(f"{CANARY} in a message")
    await live.publish(content=CANARY.encode())
    user = await live.user()
    copy = live.services.settings.home / "persona-before-0099-was-0003.db"
    copy.write_bytes(CANARY.encode())
    await leave_at(Gate(live), live, "POST", "/v1/me/forget", {"confirm": "ann"})
    await dropped(live, 2)
    assert live.engine.dropped == [user.id, user.id], "once before the rows go, and once after"
    assert holding(live) == []
    assert not copy.exists()
    assert await live.services.users.get("ann") is None


@pytest.mark.parametrize("learn", [True, False], ids=["learns anew", "does not learn"])
async def test_who_leaves_while_an_entry_is_deleted_has_it_deleted_and_the_rest_learned_anew(
    start: Start, learn: bool
) -> None:
    live = await start(ScriptedEngine(score=lambda request: [-0.9 if request.adapter else -1.0] * len(request.targets)))
    told = [json.loads(line) for line in (DATA / "eric.jsonl").read_bytes().splitlines()]
    await live.call("POST", "/v1/me/history", json=told)
    run = await live.call("POST", "/v1/me/train?wait=30")
    absorbed = (await live.call("POST", "/v1/me/why", json={"run": run["id"]}))["examples"][0]["entry"]
    assert run["state"] == "kept"
    if not learn:
        await live.call("POST", "/v1/me/pause")
    before = len(live.engine.dropped)
    await leave_at(Gate(live), live, "DELETE", f"/v1/me/history/{absorbed}", {})
    await dropped(live, before + 1)
    async with asyncio.timeout(5):
        while len((await live.call("GET", "/v1/me/runs"))["data"]) < 1 + learn:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert await live.services.adapters.active((await live.user()).id) is None
