"""What the service itself costs a chat request, without a model: `.venv/bin/python tests/bench/service.py [--json]`.

A scripted engine answers at once, behind the embedded model's tokenizer; one user with a history of a hundred turns
talks on over HTTP, from a process of their own. Told are the milliseconds from a request's key being looked up to the
engine's being asked (the median), and the time of the processor that the service takes for a request and for each
streamed token, all threads together.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from persona import app, logs
from persona.engine import prepare
from persona.engine.protocol import Chunk, GenerateRequest
from persona.engine.scripted import ScriptedEngine
from persona.engine.text import Text
from persona.settings import Log, Settings

TURNS, REQUESTS, TOKENS = 100, 60, 200
WORDS = "tea lamp house green where the and who is old"

CLIENT = f"""
import asyncio, random, sys, aiohttp

async def ask(session, url, key, talk, tokens):
    body = {{"model": "persona", "stream": True, "max_tokens": tokens, "ignore_eos": True, "messages": talk}}
    async with session.post(url, json=body, headers={{"Authorization": "Bearer " + key}}) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()

async def talks(session, url, tokens, requests, key, seed):
    draw, talk = random.Random(seed), []
    for number in range(requests):
        text = " ".join(draw.choices("{WORDS}".split(), k=40))
        talk = [*talk[-6:], {{"role": "user", "content": text}}]
        await ask(session, url, key, talk, tokens)
        talk = [*talk, {{"role": "assistant", "content": "tea" * tokens}}]

async def main(url, tokens, requests, key, seed):
    async with aiohttp.ClientSession() as session:
        await talks(session, url, int(tokens), int(requests), key, seed)

asyncio.run(main(*sys.argv[1:]))
"""


class Engine(ScriptedEngine):
    """Notes when it is asked."""

    def __init__(self) -> None:
        super().__init__("tea", delay=0.0)
        self.asked: list[float] = []

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        self.asked.append(time.perf_counter())
        async for chunk in super().generate(request):
            yield chunk


async def main(*, as_json: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.model_validate({"home": Path(folder) / "home", "http": {"port": 0}})
        logs.configure(Log(level="warning"))
        model = prepare.fetch(prepare.EMBEDDED, settings.cache, "int4", lambda what, share: None)
        engine = Engine()
        async with app.build(settings, engine=engine, tokenizer=Text.load(model.folder), prepared=None) as house:
            key = await _user(settings)
            await _talk(house, key, tokens=2, requests=TURNS // 2)  # the history, and everything is warm
            few, waits = await _measured(house, engine, key, tokens=2, requests=REQUESTS)
            many, _ = await _measured(house, engine, key, tokens=TOKENS, requests=REQUESTS // 4)
        figures: dict[str, Any] = {
            "to_engine_ms": round(1000 * statistics.median(waits), 1),
            "cpu_ms_per_request": round(1000 * few, 1),
            "cpu_us_per_token": round(1e6 * (many - few) / (TOKENS - 2), 1),
        }
        sys.stdout.write((json.dumps(figures) if as_json else str(figures)) + "\n")


async def _measured(
    house: app.House, engine: Engine, key: str, *, tokens: int, requests: int
) -> tuple[float, list[float]]:
    """Seconds of processor a request, and of each request the seconds until the engine is asked."""
    arrived: list[float] = []
    users, engine.asked = house.services.users, []
    authenticate = users.authenticate

    async def noted(secret: str) -> Any:
        arrived.append(time.perf_counter())
        return await authenticate(secret)

    users.authenticate = noted  # type: ignore[method-assign]
    computed = time.process_time()
    await _talk(house, key, tokens=tokens, requests=requests)
    spent = time.process_time() - computed
    users.authenticate = authenticate  # type: ignore[method-assign]
    return spent / requests, [asked - came for came, asked in zip(arrived, engine.asked, strict=True)]


async def _talk(house: app.House, key: str, *, tokens: int, requests: int) -> None:
    """A conversation that nobody has had before: every turn of it is stored."""
    before = await _turns(house)
    url, seed = f"{house.url}/v1/chat/completions", str(before)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLIENT, url, str(tokens), str(requests), key, seed)
    )
    assert await process.wait() == 0
    assert await _turns(house) == before + 2 * requests


async def _turns(house: app.House) -> int:
    (user,) = await house.services.users.all()
    return len(await house.services.history.page(user.id, limit=100_000))


async def _user(settings: Settings) -> str:
    connector = aiohttp.UnixConnector(path=str(settings.admin_socket))
    async with aiohttp.ClientSession("http://persona", connector=connector) as admin:
        answer = await admin.post("/admin/users", json={"name": "ann"})
        return str((await answer.json())["key"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    asyncio.run(main(as_json=parser.parse_args().json))
