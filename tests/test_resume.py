"""The whole service over a real engine, stopped under a training: its version is that of one that never stopped."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from shutil import copy

from models import Models

from jobs import rehearsal
from persona import app
from persona.domain import RunState, User, Version
from persona.engine.client import LocalEngine
from persona.engine.prepare import Prepared
from persona.engine.text import Text
from persona.settings import Settings
from storage.history import ImportItem

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "runs", "away", "from", "rain", "today")
DAWN = datetime(2026, 1, 1, tzinfo=UTC)


@asynccontextmanager
async def served(home: Path, prepared: Prepared) -> AsyncIterator[app.House]:
    settings = Settings.model_validate(
        {
            "home": home,
            "http": {"port": 0},
            "model": {"device": "cpu"},
            "engine": {"context": 1024, "memory_mb": 64, "threads": 1},
            "learning": {"check_seconds": 3600.0, "min_aged_tokens": 50, "held_out_tokens": 50, "batch_tokens": 128},
        }
    )
    engine = LocalEngine(settings, prepared)
    await engine.start()
    try:
        async with app.build(settings, engine=engine, tokenizer=Text.load(prepared.folder), prepared=prepared) as house:
            yield house
    finally:
        await engine.stop()


async def ask(house: app.House) -> User:
    """Somebody with a history, whose run is asked for."""
    services, random = house.services, Random(0)
    user = await services.users.get("ann") or await services.users.add("ann")
    texts = [" ".join(random.sample(WORDS, 9)) for _ in range(100)]
    items = [ImportItem(text, DAWN + timedelta(minutes=i), f"i{i}", ()) for i, text in enumerate(texts)]
    await services.history.import_(user.id, items, count=len, now=DAWN)
    await services.runs.request(user.id, DAWN)
    services.schedule.wake()
    return user


async def steps(house: app.House, user: User, at_least: int) -> None:
    async with asyncio.timeout(60):
        while (at := house.services.finetune.progress.get(user.id)) is None or at.step < at_least:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def ended(house: app.House, user: User) -> tuple[str, Version]:
    """The reason of the one run, and its version, whatever the gate said of it."""
    run = await house.services.runs.last(user.id)
    assert run is not None
    async with asyncio.timeout(120):
        run = await house.services.schedule.wait(user.id, run.id)
    assert run.state in (RunState.KEPT, RunState.REJECTED), run.reason
    (version,) = await house.services.adapters.list(user.id)
    assert run.reason is not None
    return run.reason, version


async def test_threat_26_a_run_that_was_stopped_makes_the_same_version_to_the_last_bit(
    tmp_path: Path, tmp_path_factory
) -> None:
    prepared = Models(tmp_path_factory.getbasetemp() / "models").prepared()
    async with served(tmp_path / "straight", prepared) as house:
        _, wanted = await ended(house, await ask(house))
    # Both rehearse the same replies of the base: a random model's may hang on who was generated beside them.
    (tmp_path / "stopped").mkdir(mode=0o700)
    copy(tmp_path / "straight" / rehearsal.FILE, tmp_path / "stopped")
    for again in (False, True):
        async with served(tmp_path / "stopped", prepared) as house:
            user = await house.services.users.get("ann") if again else await ask(house)
            assert user is not None
            await steps(house, user, 20 if again else 3)
        assert [path.name for path in (tmp_path / "stopped/adapters").glob("*/run-*/*.safetensors")]
    async with served(tmp_path / "stopped", prepared) as house:
        reason, version = await ended(house, user)
    assert " It went on after step " in reason
    assert (version.sha256, version.watermark) == (wanted.sha256, wanted.watermark)
    assert not list((tmp_path / "stopped/adapters").glob("*/run-*"))
