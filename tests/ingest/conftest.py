"""A real broker for each test, and the service connected to it."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from broker import Mosquitto, mosquitto
from live import Live, Start, connected
from served import Served

from persona.engine.scripted import ScriptedEngine


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Mosquitto]:
    async with mosquitto(tmp_path / "broker") as running:
        yield running


@pytest.fixture
async def served(tmp_path: Path, broker: Mosquitto) -> AsyncIterator[Served]:
    """The service in a process of its own; the test starts it."""
    service = Served(tmp_path, broker)
    yield service
    await service.kill()


@pytest.fixture
def begin(start: Start, broker: Mosquitto) -> Start:
    """`await begin(engine, …)`: like `start`, with user ann, and connected. `mqtt={…}` changes its section."""

    async def made(engine: ScriptedEngine | None = None, /, mqtt: dict[str, Any] | None = None, **more: Any) -> Live:
        live = await start(engine, mqtt=broker.settings(**(mqtt or {})), **more)
        await live.key("ann")
        return await connected(live)

    return made
