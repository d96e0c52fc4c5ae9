"""The engine as the service sees it: a process of its own behind a socket, watched and restarted.

Every call has an id; answers find their call by it. When the process dies or stays silent, every open call ends with
EngineDown within seconds and a new process is started. The new one needs no state: requests name their versions.
"""

import asyncio
import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from itertools import count
from typing import Any, Literal

import msgspec
import structlog

from persona import errors
from persona.engine import device, protocol
from persona.engine.prepare import Prepared
from persona.engine.protocol import (
    AdapterRef,
    Chunk,
    Failed,
    GenerateRequest,
    Health,
    Piece,
    Pong,
    PrefillRequest,
    Progress,
    Reply,
    Request,
    ScoreRequest,
    Scores,
    Step,
    TokenLogprob,
    TrainRequest,
)
from persona.errors import EngineDown, ModelError, PersonaError
from persona.settings import Settings

State = Literal["starting", "ready", "restarting", "stopped"]
PING_SECONDS = 1.0
STOP_SECONDS = 5.0
MAX_BACKOFF = 30.0
# Turns that a thread of the engine waits for the others before it sleeps: with the default busy neighbours can stall
# a step for a second, with far fewer every step is slower (docs/DECISIONS.md).
SPINS = "10000"
log = structlog.get_logger("engine")


class LocalEngine:
    """Implements persona.engine.faces.Engine with one child process."""

    def __init__(self, settings: Settings, prepared: Prepared) -> None:
        self._settings, self._prepared = settings, prepared
        self._ids = count(1)
        self._calls: dict[int, asyncio.Queue[Reply | PersonaError]] = {}
        self._link: _Link | None = None
        self._ready = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self.state: State = "stopped"
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """Of the engine process."""
        return self._link.process.pid if self._link else None

    async def start(self) -> None:
        """Start the process and wait until the base is loaded. Raises ModelError if it cannot be."""
        self.state = "starting"
        self._keeper = asyncio.create_task(self._keep(), name="engine")
        ready = asyncio.create_task(self._ready.wait())
        await asyncio.wait({ready, self._keeper}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            self.state = "stopped"
            await self._keeper

    async def stop(self) -> None:
        """End the process; open calls end with EngineDown."""
        self.state = "stopped"
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError, PersonaError):
                await self._keeper

    # --- serving

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        async with contextlib.aclosing(self._call(lambda job: protocol.Generate(job, request))) as answers:
            async for answer in answers:
                if isinstance(answer, Piece):
                    yield answer.chunk
                    if answer.chunk.finish:
                        return

    async def score(self, request: ScoreRequest) -> list[float]:
        answer = await self._one(lambda job: protocol.Score(job, request))
        assert isinstance(answer, Scores)
        return answer.logprobs

    async def tell(self, request: ScoreRequest) -> list[TokenLogprob]:
        told = protocol.replace(request, top=request.top or 0)
        answer = await self._one(lambda job: protocol.Score(job, told))
        assert isinstance(answer, Scores)
        return answer.told

    async def score_all(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        answer = await self._one(lambda job: protocol.ScoreAll(job, list(requests)))
        assert isinstance(answer, protocol.AllScores)
        return answer.logprobs

    async def prefill(self, request: PrefillRequest) -> None:
        await self._one(lambda job: protocol.Prefill(job, request))

    async def health(self) -> Health:
        answer = await self._one(protocol.Ping)
        assert isinstance(answer, Pong)
        return answer.health

    # --- versions

    async def stage(self, ref: AdapterRef) -> None:
        await self._one(lambda job: protocol.Stage(job, ref))

    async def flip(self, ref: AdapterRef) -> None:
        await self._one(lambda job: protocol.Flip(job, ref))

    async def drop(self, user_id: int) -> None:
        await self._one(lambda job: protocol.Drop(job, user_id))

    # --- training

    async def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
        async with contextlib.aclosing(self._call(lambda job: protocol.Train(job, request))) as answers:
            async for answer in answers:
                if isinstance(answer, Step):
                    yield answer.progress
                    if answer.progress.done:
                        return

    async def pause(self) -> None:
        await self._one(protocol.Pause)

    async def resume(self) -> None:
        await self._one(protocol.Resume)

    # --- calls

    async def _one(self, make: Callable[[int], Request]) -> Reply:
        async with contextlib.aclosing(self._call(make)) as answers:
            return await anext(answers)

    async def _call(self, make: Callable[[int], Request]) -> AsyncGenerator[Reply]:
        """Send one request and yield its answers; leaving early aborts it. Raises what the engine answered."""
        if self._link is None or not self._ready.is_set():
            raise EngineDown("The language model is starting; try again in a few seconds.", retry_after=5)
        job, link = next(self._ids), self._link
        answers = self._calls[job] = asyncio.Queue()
        ended = False
        try:
            await link.send(make(job))
            while True:
                answer = await answers.get()
                ended = isinstance(answer, PersonaError | Failed) or _is_last(answer)
                if isinstance(answer, PersonaError):
                    raise answer
                if isinstance(answer, Failed):
                    raise _error(answer)
                yield answer
                if ended:
                    return
        finally:
            del self._calls[job]
            if not ended and link is self._link:
                link.send_soon(protocol.Abort(job))

    def _deliver(self, reply: Reply) -> None:
        if (answers := self._calls.get(reply.id)) is not None:
            answers.put_nowait(reply)

    # --- the process

    async def _keep(self) -> None:
        """Start the process, watch it, start it again; end only when cancelled or when the first start fails."""
        backoff = 0.5
        while True:
            started = time.monotonic()
            try:
                await self._live()
            except OSError as error:  # no process or no socket to be had: later, perhaps
                if self.state == "starting":
                    raise
                log.error("engine cannot be started", kind=type(error).__name__)
            if self.state == "starting":
                raise ModelError("The engine process ended while loading the model; its last lines say why.")
            self.state, self.restarts = "restarting", self.restarts + 1
            backoff = 0.5 if time.monotonic() - started > MAX_BACKOFF else min(2 * backoff, MAX_BACKOFF)
            log.error("engine lost, starting it again", restarts=self.restarts, after_s=backoff)
            await asyncio.sleep(backoff)

    async def _live(self) -> None:
        """One life of the process, from its start to its end."""
        self._link = link = await _Link.open(self._options())
        try:
            await self._watch(link)
        finally:
            self._lose()
            await link.close()

    async def _watch(self, link: "_Link") -> None:
        """Return when the process is gone or silent for too long."""
        reading = asyncio.create_task(link.read(self._deliver), name="engine answers")
        limit = self._settings.engine.start_seconds
        try:
            while not reading.done():
                pinged = asyncio.create_task(self._ping(link))
                await asyncio.wait({pinged, reading}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
                if not pinged.done():
                    pinged.cancel()
                    if not reading.done():
                        log.error("engine does not answer", silent_s=limit)
                        link.kill()  # it may be stopped, and would not see its socket close
                    return
                self._announce()
                limit = self._settings.engine.hang_seconds
                await asyncio.wait({reading}, timeout=PING_SECONDS)
        finally:
            reading.cancel()

    async def _ping(self, link: "_Link") -> None:
        job = next(self._ids)
        answers = self._calls[job] = asyncio.Queue()
        try:
            await link.send(protocol.Ping(job))
            await answers.get()
        finally:
            del self._calls[job]

    def _announce(self) -> None:
        if not self._ready.is_set():
            self.state = "ready"
            self._ready.set()
            log.info("engine ready", model=self._prepared.name, pid=self.pid)

    def _lose(self) -> None:
        """Every open call ends."""
        if self.state == "ready":
            self.state = "restarting"
        self._ready.clear()
        self._link = None
        for answers in self._calls.values():
            answers.put_nowait(EngineDown("The language model stopped and is being restarted.", retry_after=5))

    def _options(self) -> str:
        engine = self._settings.engine
        about: dict[str, Any] = {
            "folder": str(self._prepared.folder),
            "name": self._prepared.name,
            "base": self._prepared.base,
        }
        about |= {"weights": self._prepared.weights, "device": device.choose(self._settings.model).device}
        about |= {"kernels": str(self._settings.cache / "kernels"), "log": self._settings.log.model_dump()}
        numbers = engine.model_dump(exclude={"hang_seconds", "start_seconds"})
        return json.dumps({**about, **numbers})


class _Link:
    """One engine process and the socket to it."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process, self._reader, self._writer = process, reader, writer

    @classmethod
    async def open(cls, options: str) -> "_Link":
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "persona.engine.main", str(theirs.fileno()), options),
                pass_fds=(theirs.fileno(),),
                env={"GOMP_SPINCOUNT": SPINS, **os.environ, "PYTHONUNBUFFERED": "1"},
            )
        return cls(process, *await asyncio.open_connection(sock=ours, limit=protocol.MAX_FRAME))

    async def send(self, request: Request) -> None:
        self.send_soon(request)
        with contextlib.suppress(ConnectionError):  # the reader notices, and ends the call
            await self._writer.drain()

    def send_soon(self, request: Request) -> None:
        if not self._writer.is_closing():
            self._writer.write(protocol.pack(request))

    async def read(self, deliver: Callable[[Reply], None]) -> None:
        """Deliver answers until the process closes the socket."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            while True:
                size = int.from_bytes(await self._reader.readexactly(4), "big")
                deliver(protocol.replies.decode(await self._reader.readexactly(size)))

    async def close(self) -> None:
        """Close the socket, which ends the process; kill it if that does not."""
        self._writer.close()
        stopping = asyncio.ensure_future(self.process.wait())
        await asyncio.wait({stopping}, timeout=STOP_SECONDS)
        if not stopping.done():
            self.kill()
        await stopping

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
            self.process.kill()


def _is_last(answer: Reply) -> bool:
    match answer:
        case Piece():
            return answer.chunk.finish is not None
        case Step():
            return answer.progress.done
    return True


def _error(answer: Failed) -> PersonaError:
    """The engine's error as the class of persona.errors that it names."""
    kind = errors.named(answer.kind)
    more: dict[str, Any] = {"retry_after": answer.retry_after} if issubclass(kind, errors.Busy) else {}
    made: PersonaError = kind(answer.message, code=answer.code or None, **more)
    return made
