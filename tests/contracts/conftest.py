"""Every implementation of the engine's faces, behind one fixture: a suite that names `house` runs on each of them."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from house import House, engine_settings, plain, rebased, sparse, swapped
from models import Models

from persona.engine.client import LocalEngine
from persona.engine.protocol import GenerateRequest
from persona.engine.scripted import ScriptedEngine


def counted(request: GenerateRequest) -> str:
    """Ten words, other ones for each version."""
    version = request.adapter.number if request.adapter else 0
    return " ".join(f"word-{count}-{version}" for count in range(10))


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=["scripted", "local"])
async def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """The engine under contract: shared by all tests, so that each also shows what the ones before it left behind."""
    home = tmp_path_factory.mktemp(request.param)
    if request.param == "scripted":
        engine = ScriptedEngine(counted, delay=0.01, steps=20)
        yield House(engine, home, plain, swapped, iter(range(1, 1000)))
        return
    prepared = Models(tmp_path_factory.getbasetemp() / "models").prepared()
    local = LocalEngine(engine_settings(home), prepared)
    await local.start()
    yield House(local, home, sparse(prepared, prepared.base), rebased(prepared), iter(range(1, 1000)))
    await local.stop()
