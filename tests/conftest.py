"""The whole service as a fixture: real HTTP on a free port, real SQLite in a temporary folder, a scripted engine."""

import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

# Several workers (`make test`): each has its share of the cores, and so have the processes that it starts.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) is not None:
    cores, number = sorted(os.sched_getaffinity(0)), int(worker.removeprefix("gw"))
    mine = cores[number :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, mine or cores)

import aiohttp
import pytest
import structlog
from live import Live, Start

from persona import app
from persona.domain import ChatTokenizer
from persona.engine.prepare import Prepared
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.settings import Settings

# Triton reads it when it is first imported, by whatever library: kernels run in its interpreter (tests/engine/kernels).
os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: the others have time to share the rest."""
    items.sort(key=lambda item: item.path.name != "test_story.py")


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A test that runs a command logs to a stream that closes with it: nobody after it does."""
    before, handlers = structlog.get_config(), logging.root.handlers[:]
    yield
    structlog.configure(**before)
    logging.root.handlers[:] = handlers


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Defaults, but for a home of its own and a free port."""
    return Settings.model_validate({"home": tmp_path / "home", "http": {"port": 0, "shutdown_seconds": 0.5}})


@pytest.fixture
async def start(settings: Settings) -> AsyncIterator[Start]:
    """Starts services: `await start(ScriptedEngine("Yes."), http={"max_body": 1024})`, settings by section."""
    async with AsyncExitStack() as stack:

        async def begin(
            given: Any = None,
            /,
            *,
            tokenizer: ChatTokenizer | None = None,
            prepared: Prepared | None = None,
            **sections: dict[str, Any],
        ) -> Live:
            engine = given or ScriptedEngine()
            changed = settings.model_dump()
            for name, values in sections.items():
                changed[name] = {**changed[name], **values}
            chosen = Settings.model_validate(changed)
            parts: dict[str, Any] = {"engine": engine, "tokenizer": tokenizer or ScriptedText(), "prepared": prepared}
            house = await stack.enter_async_context(app.build(chosen, **parts))
            connector = aiohttp.UnixConnector(path=str(chosen.admin_socket))
            admin = await stack.enter_async_context(aiohttp.ClientSession("http://persona", connector=connector))
            http = await stack.enter_async_context(aiohttp.ClientSession(house.url))
            return Live(house, engine, admin, http, stack)

        yield begin


@pytest.fixture
async def live(start: Start) -> Live:
    """A service with default settings whose engine says «Hello.»"""
    return await start()
