"""The service over a real engine process."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from live import Live, Start
from models import Models

from persona.engine.client import LocalEngine
from persona.engine.text import Text
from persona.settings import Settings


@pytest.fixture
async def tiny(start: Start, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Live]:
    """The service over a real engine process, whose tiny model says nothing sensible."""
    prepared = Models(tmp_path_factory.getbasetemp() / "models").prepared()
    sections: Any = {"model": {"device": "cpu"}, "engine": {"context": 1024, "memory_mb": 64, "threads": 1}}
    changed = {name: {**settings.model_dump()[name], **values} for name, values in sections.items()}
    engine = LocalEngine(Settings.model_validate({**settings.model_dump(), **changed}), prepared)
    await engine.start()
    try:
        yield await start(engine, tokenizer=Text.load(prepared.folder), prepared=prepared, **sections)
    finally:
        await engine.stop()
