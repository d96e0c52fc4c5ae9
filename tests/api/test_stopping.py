"""SIGTERM to a real process: streams end properly within the limit, the run is on record, and it exits with 0."""

import asyncio
import io
import json
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from persona import app
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.errors import ConfigurationError
from persona.settings import Settings

ROOT = Path(__file__).parent.parent.parent
PROGRAM = textwrap.dedent(
    """
    import asyncio, json, sys
    from pathlib import Path
    from persona import app
    from persona.engine.scripted import ScriptedEngine, ScriptedText
    from persona.settings import Settings

    async def ready(house):
        users = house.services.users
        user = await users.get("ann") or await users.add("ann")
        _, key = await users.add_key(user.id)
        Path(sys.argv[2]).write_text(json.dumps({"url": house.url, "key": key}))

    settings = Settings.model_validate({
        "home": sys.argv[1],
        "http": {"port": 0, "shutdown_seconds": float(sys.argv[3])},
        "log": {"json_lines": True},
    })
    engine = ScriptedEngine(" ".join(f"word{i}" for i in range(400)), delay=0.02, steps=1000)
    asyncio.run(app.serve(settings, ready=ready, engine=engine, tokenizer=ScriptedText()))
    """
)


@dataclass
class Process:
    """A service in a process of its own."""

    child: asyncio.subprocess.Process
    url: str
    key: str

    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    async def call(self, method: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.key}"}
        async with (
            aiohttp.ClientSession(self.url, headers=headers) as session,
            session.request(method, path, **options) as answer,
        ):
            return await answer.json()

    async def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, list[dict[str, Any]]]:
        """Its exit code and its log, after that signal."""
        self.child.send_signal(number)
        out, _ = await asyncio.wait_for(self.child.communicate(), 15)
        assert self.child.returncode is not None
        return self.child.returncode, [json.loads(line) for line in out.decode().splitlines()]


@asynccontextmanager
async def served(tmp_path: Path, shutdown_seconds: float = 0.3) -> AsyncIterator[Process]:
    told = tmp_path / "told.json"
    told.unlink(missing_ok=True)
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, str(tmp_path / "home"), str(told), str(shutdown_seconds)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        for _ in range(300):
            if told.exists() and told.read_text():
                break
            await asyncio.sleep(0.1)
        yield Process(child, **json.loads(told.read_text()))
    finally:
        if child.returncode is None:
            child.kill()
            await child.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_threat_26_a_stream_ends_properly_when_the_service_stops(tmp_path: Path, number: signal.Signals) -> None:
    async with served(tmp_path) as process:
        async with process.client() as client:
            messages: Any = [{"role": "user", "content": "talk"}]
            stream = await client.chat.completions.create(model="persona", messages=messages, stream=True)
            chunks = [await anext(stream) for _ in range(5)]
            ending = asyncio.create_task(process.end(number))
            chunks += [chunk async for chunk in stream]
        code, log = await ending
    assert code == 0
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].model_extra["persona"]["finish"] == "abort"
    assert log[-1]["event"] == "← stopped"
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert 5 < len(said.split()) < 400
    async with served(tmp_path) as again:
        user, reply = (await again.call("GET", "/v1/me/history"))["data"]
        assert (user["text"], reply["text"], reply["finish"]) == ("talk", said, "abort")
        assert (await again.end())[0] == 0


async def trained(process: Process) -> dict[str, Any]:
    """Wait until the newest run has trained a few steps."""
    while True:
        run: dict[str, Any] = (await process.call("GET", "/v1/me/runs"))["data"][0]
        assert run["state"] in ("queued", "running"), run
        if run["progress"] is not None and run["progress"]["step"] >= 3:
            return run
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_threat_26_a_run_under_way_goes_on_after_the_next_start(tmp_path: Path, number: signal.Signals) -> None:
    async with served(tmp_path) as process:
        content = (ROOT / "tests/data/eric.jsonl").read_bytes()
        await process.call("POST", "/v1/me/history", data=io.BytesIO(content))
        asked = await process.call("POST", "/v1/me/train")
        before = await trained(process)
        code, log = await process.end(number)
    if number == signal.SIGTERM:
        assert (code, log[-1]["event"]) == (0, "← stopped")
    async with served(tmp_path) as again:
        run = await trained(again)
        assert run["id"] == asked["id"]
        assert run["progress"]["resumed"] >= before["progress"]["step"]
        assert (await again.call("GET", "/v1/me/versions"))["data"] == []
        code, log = await again.end()
    assert code == 0
    told = [line for line in log if line["event"] == "runs after a stop"]
    assert [line["queued"] for line in told] == [1] * (number == signal.SIGKILL)
    assert any(line["event"] == "→ finetune after a stop" for line in log)


async def test_a_request_that_comes_while_the_service_stops_is_told_to_come_back(tmp_path: Path) -> None:
    async with served(tmp_path, shutdown_seconds=2) as process, process.client() as client:
        messages: Any = [{"role": "user", "content": "talk"}]
        stream = await client.chat.completions.create(model="persona", messages=messages, stream=True)
        await anext(stream)
        ending = asyncio.create_task(process.end())
        await asyncio.sleep(0.2)
        with pytest.raises(openai.APIConnectionError):
            async with process.client() as other:
                await other.models.list()
        async for _ in stream:
            pass
        assert (await ending)[0] == 0


async def test_threat_07_after_kill_9_the_next_start_works_and_keeps_what_was_committed(tmp_path: Path) -> None:
    async with served(tmp_path) as process:
        await process.call(
            "POST",
            "/v1/chat/completions",
            json={"model": "persona", "max_tokens": 3, "messages": [{"role": "user", "content": "keep this"}]},
        )
        process.child.kill()
        await process.child.communicate()
    async with served(tmp_path) as again:
        told = [entry["text"] for entry in (await again.call("GET", "/v1/me/history"))["data"]]
        assert told == ["keep this", "word0 word1 word2"]
        assert (await again.end())[0] == 0


async def test_threat_07_a_start_after_kill_9_says_what_it_repaired_and_one_after_an_orderly_stop_is_silent(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    async with served(tmp_path) as process:
        _, log = await process.end()
        assert "repaired" not in [line["event"] for line in log]
    async with served(tmp_path) as process:
        process.child.kill()
        out, _ = await process.child.communicate()
        assert "repaired" not in out.decode()
    (home / "run/export-abc").mkdir()
    (home / "persona-before-9-was-8.db.part").touch()
    (home / "restoring-abc").mkdir()
    (home / "adapters/tmp-abc").mkdir(parents=True)
    async with served(tmp_path) as again:
        _, log = await again.end()
    mended = "\n".join(line["what"] for line in log if line["event"] == "repaired")
    for named in ("restoring-abc", "export-abc", "persona-before-9-was-8.db.part", "socket", "tmp-abc"):
        assert named in mended, named
    assert mended.count("\n") == 4
    async with served(tmp_path) as process:
        _, log = await process.end()
        assert "repaired" not in [line["event"] for line in log]


async def test_threat_07_a_start_after_a_restore_that_was_cut_short_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "home/restoring-abc").mkdir(parents=True)
    settings = Settings.model_validate({"home": tmp_path / "home", "http": {"port": 0}})
    with pytest.raises(ConfigurationError, match="was cut short: run `persona restore` again"):
        async with app.build(settings, engine=ScriptedEngine(), tokenizer=ScriptedText()):
            pass
    assert not settings.database.exists()
