"""The engine as a process: killed, stopped, broken or orphaned, it never takes the service with it nor stays behind."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import adapters
import psutil
import pytest
from models import Models
from plain import some_tokens

from persona.engine.client import LocalEngine
from persona.engine.prepare import Prepared
from persona.engine.protocol import AdapterRef, Chunk, Example, GenerateRequest, Plan, Sampling, TrainRequest
from persona.engine.shape import Shape
from persona.errors import EngineDown, ModelError, TooLarge
from persona.settings import Settings

HANG_SECONDS = 2.0
SOON = 60.0  # for what has no promised time: the machine may be busy


def settings(home: Path) -> Settings:
    engine = {"context": 1024, "memory_mb": 64, "threads": 1, "page_tokens": 16, "hang_seconds": HANG_SECONDS}
    return Settings.model_validate({"home": home, "model": {"device": "cpu"}, "engine": engine})


@pytest.fixture
def prepared(models: Models) -> Prepared:
    return models.prepared()


@pytest.fixture
async def engine(prepared: Prepared, tmp_path: Path) -> AsyncIterator[LocalEngine]:
    one = LocalEngine(settings(tmp_path), prepared)
    await one.start()
    yield one
    await one.stop()


@pytest.fixture
def ref(prepared: Prepared, tmp_path: Path) -> AdapterRef:
    return adapters.sparse(tmp_path / "1-1", Shape.read(prepared.folder), prepared.base)


async def text(engine: LocalEngine, ref: AdapterRef | None, count: int = 12) -> str:
    request = GenerateRequest(some_tokens(10), Sampling(max_tokens=count), ref)
    return "".join([chunk.text async for chunk in engine.generate(request)])


async def until(true: Callable[[], bool], seconds: float = SOON) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 - it is another process that changes
            await asyncio.sleep(0.05)


async def back(engine: LocalEngine) -> None:
    await until(lambda: engine.state == "ready")


def running(engine: LocalEngine, ref: AdapterRef | None) -> AsyncIterator[Chunk]:
    return engine.generate(GenerateRequest(some_tokens(10), Sampling(max_tokens=1000), ref))


async def test_threat_27_a_killed_engine_ends_its_streams_and_comes_back_by_itself(
    engine: LocalEngine, ref: AdapterRef, tmp_path: Path
) -> None:
    wanted = await text(engine, ref)
    pid = engine.pid
    assert pid is not None
    training = engine.train(TrainRequest([_example()], Plan(passes=5000), str(tmp_path)))
    streams = [running(engine, ref), running(engine, None)]
    for stream in (training, *streams):
        await anext(stream)  # type: ignore[arg-type]
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        for stream in streams:
            with pytest.raises(EngineDown):
                async for _ in stream:
                    pass
        with pytest.raises(EngineDown, match="restarted"):
            async for _ in training:
                pass
    assert engine.state == "restarting"
    with pytest.raises(EngineDown) as refused:
        await engine.health()
    assert refused.value.retry_after > 0
    await back(engine)
    assert engine.pid != pid
    assert engine.restarts == 1
    assert await text(engine, ref) == wanted


def _example() -> Example:
    return Example(some_tokens(20), list(range(1, 20)))


async def test_threat_27_a_silent_engine_is_noticed_and_replaced(engine: LocalEngine) -> None:
    pid = engine.pid
    assert pid is not None
    stream = running(engine, None)
    await anext(stream)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(EngineDown):
        async for _ in stream:
            pass
    assert time.monotonic() - started < HANG_SECONDS + 2
    await back(engine)
    assert not psutil.pid_exists(pid)
    assert await text(engine, None)


async def test_a_process_that_dies_during_a_ping_is_replaced_too(engine: LocalEngine) -> None:
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await asyncio.sleep(1.2)  # a ping is under way
    os.kill(pid, signal.SIGKILL)
    await until(lambda: engine.restarts == 1)
    await back(engine)
    assert await text(engine, None)


async def test_stop_ends_open_streams_and_leaves_no_process(prepared: Prepared, tmp_path: Path) -> None:
    engine = LocalEngine(settings(tmp_path), prepared)
    await engine.start()
    pid, stream = engine.pid, running(engine, None)
    await anext(stream)
    await engine.stop()
    with pytest.raises(EngineDown):
        async for _ in stream:
            pass
    assert engine.state == "stopped"
    assert not psutil.pid_exists(pid)
    await engine.stop()  # twice is once


@pytest.mark.parametrize("spoil", ["missing", "cut"])
async def test_a_model_that_cannot_be_loaded_is_a_model_error(
    prepared: Prepared, tmp_path: Path, spoil: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    if spoil == "cut":
        for file in prepared.folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes()[:1000])
    others = set(psutil.Process().children())
    engine = LocalEngine(settings(tmp_path), replace(prepared, folder=folder))
    with pytest.raises(ModelError, match="loading the model"):
        await engine.start()
    assert engine.state == "stopped"
    await engine.stop()
    assert set(psutil.Process().children()) <= others


async def test_errors_cross_the_socket_with_their_code(engine: LocalEngine) -> None:
    with pytest.raises(TooLarge) as refused:
        await anext(engine.generate(GenerateRequest(some_tokens(1000), Sampling(max_tokens=1000))))
    assert refused.value.code == "context_length_exceeded"


async def test_an_engine_that_was_never_started_is_down(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(EngineDown):
        await LocalEngine(settings(tmp_path), prepared).health()


SERVICE = """
import asyncio, sys
from pathlib import Path
from persona.engine.client import LocalEngine
from persona.engine.prepare import Prepared
from persona.engine.protocol import GenerateRequest, Sampling
from persona.settings import Settings

async def main(folder, base, busy):
    settings = Settings.model_validate({"model": {"device": "cpu"}, "engine": {"memory_mb": 64, "threads": 1}})
    engine = LocalEngine(settings, Prepared(Path(folder), "tiny", "int4", base, "tiny"))
    await engine.start()
    if busy == "busy":
        stream = engine.generate(GenerateRequest([5, 6, 7], Sampling(max_tokens=900)))
        await anext(stream)
    sys.stdout.write(f"engine={engine.pid}\\n")
    sys.stdout.flush()
    await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("busy", ["idle", "busy"])
async def test_the_engine_ends_when_the_service_dies(prepared: Prepared, busy: str) -> None:
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVICE, str(prepared.folder), prepared.base, busy), stdout=asyncio.subprocess.PIPE
    )
    assert service.stdout is not None
    try:
        async with asyncio.timeout(SOON):
            while not (line := await service.stdout.readline()).startswith(b"engine="):
                assert line  # log lines come before it
        pid = int(line.removeprefix(b"engine="))
        assert psutil.pid_exists(pid)
    finally:
        service.kill()
        await service.wait()
    await until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
