"""The whole service over a real engine process that is killed under it: chat and training say so, and go on."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import openai
import pytest
from models import Models

from persona import app
from persona.engine.client import LocalEngine
from persona.engine.text import Text
from persona.settings import Settings

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "and",
    "runs",
    "away",
    "from",
    "rain",
    "of",
    "early",
    "morning",
    "today",
]


class Home:
    """A running service with one user, over a tiny model in a real engine process."""

    def __init__(self, house: app.House, engine: LocalEngine, client: openai.AsyncOpenAI, user_id: Any) -> None:
        self.house, self.engine, self.client, self.user_id = house, engine, client, user_id

    def ask(self, **options: Any) -> Any:
        messages = [{"role": "user", "content": "hello there, how are you?"}]
        return self.client.chat.completions.create(model="persona", messages=messages, **options)

    def kill(self) -> None:
        assert self.engine.pid is not None
        os.kill(self.engine.pid, signal.SIGKILL)

    async def back(self) -> None:
        """Wait until the engine answers again."""
        async with asyncio.timeout(60):
            while self.engine.state != "ready":  # noqa: ASYNC110
                await asyncio.sleep(0.1)


@pytest.fixture
async def home(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Home]:
    prepared = Models(tmp_path_factory.getbasetemp() / "models").prepared()
    settings = Settings.model_validate(
        {
            "home": tmp_path,
            "http": {"port": 0},
            "model": {"device": "cpu"},
            "engine": {"context": 1024, "memory_mb": 64, "threads": 1},
            "learning": {"check_seconds": 3600.0, "min_aged_tokens": 50, "held_out_tokens": 50},
        }
    )
    engine = LocalEngine(settings, prepared)
    await engine.start()
    try:
        async with app.build(settings, engine=engine, tokenizer=Text.load(prepared.folder), prepared=prepared) as house:
            user = await house.services.users.add("ann")
            _, key = await house.services.users.add_key(user.id)
            async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key=key, max_retries=0) as client:
                yield Home(house, engine, client, user.id)
    finally:
        await engine.stop()


async def test_threat_27_a_stream_over_a_killed_engine_ends_with_an_error_event_and_chat_goes_on(home: Home) -> None:
    stream = await home.ask(stream=True, max_tokens=900, temperature=1, seed=1)
    for _ in range(5):
        await anext(stream)
    home.kill()
    with pytest.raises(openai.APIError, match="restarted"):
        [chunk async for chunk in stream]
    await home.back()
    reply = await home.ask(max_tokens=4)
    assert reply.persona["finish"] in ("stop", "length")
    turns = await home.house.services.history.page(home.user_id)
    assert "error" in [turn.finish for turn in turns], "what was said before is on record with its finish"


async def test_threat_07_a_run_over_a_killed_engine_fails_with_a_reason_and_publishes_nothing(home: Home) -> None:
    services = home.house.services
    random = Random(0)
    items = [{"ts": f"2026-01-01T00:{i:02}:00Z", "text": " ".join(random.sample(WORDS, 9))} for i in range(60)]
    await home.client.post("/me/history", cast_to=object, body=items)
    run: Any = await home.client.post("/me/train", cast_to=object)
    async with asyncio.timeout(60):
        while home.user_id not in services.finetune.progress:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    home.kill()
    ended = await services.schedule.wait(home.user_id, run["id"])
    assert ended.state.value == "failed"
    assert ended.reason is not None
    assert "restarted" in ended.reason
    assert ended.metrics["again"] is True, "the text is not to blame: it is tried again by itself"
    assert await services.adapters.list(home.user_id) == []
    assert not list((services.settings.adapters / str(home.user_id)).glob("*/adapter.safetensors"))
    await home.back()
    assert (await home.ask(max_tokens=4)).persona["version"] is None
