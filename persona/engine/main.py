"""The engine process: loads the base once, then turns messages on one socket into steps and slices.

A composition root: the only file of the engine that names concrete parts. It ends when its socket closes, so it
never outlives the service; signals from the terminal are the service's business.
"""

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch

from jobs.trainer import Trainer
from persona.engine import adapter_file, branches, decoder, lora, protocol, weights
from persona.engine.attention import KvCache
from persona.engine.decoder import Decoder
from persona.engine.device import Form
from persona.engine.grammar import Grammars
from persona.engine.loop import EngineLoop
from persona.engine.pages import PagePool
from persona.engine.protocol import Health, Progress, TrainRequest
from persona.engine.runner import Runner
from persona.engine.scheduler import Scheduler
from persona.engine.text import Text
from persona.engine.tiers import Tiers

ADAPTER_SHARE = 4  # adapters get one part in so many of the memory budget; the cache has the rest


class Options(msgspec.Struct, frozen=True):
    """What the service tells the engine when it starts it."""

    folder: str
    name: str
    weights: Form
    device: str
    base: str
    context: int
    max_running: int
    max_waiting: int
    page_tokens: int
    memory_mb: int
    prefill_tokens: int
    threads: int


def build(options: Options, send: "Outbox") -> EngineLoop:
    """Load the base and put the engine together. Raises ModelError."""
    torch.set_num_threads(weights.threads(options.threads))
    folder = Path(options.folder)
    base = decoder.load(folder, options.weights, options.device)
    pages, tiers = _memory(options, base)
    pool = PagePool(pages, options.page_tokens)
    cache = KvCache(base.shape, pages, options.page_tokens, base.dtype, base.device)
    health = Health(
        base=options.base,
        model=options.name,
        device=options.device,
        weights=options.weights,
        context=min(options.context, base.shape.context),
        vocab=base.shape.vocab,
        base_bytes=base.nbytes(),
    )

    def train(request: TrainRequest) -> Iterator[Progress | None]:
        start = None
        if request.start is not None:
            start = adapter_file.read(Path(request.start.path), request.start.sha256, options.base, base.shape)
        return Trainer(base, options.base, request, start).slices()

    return EngineLoop(
        scheduler=Scheduler(
            pool,
            max_running=options.max_running,
            max_waiting=options.max_waiting,
            prefill_tokens=options.prefill_tokens,
        ),
        runner=Runner(base, cache),
        tiers=tiers,
        text=Text.load(folder),
        train=train,
        score=lambda wanted: branches.scores(base, wanted, options.prefill_tokens),
        about=lambda: protocol.replace(health, memory=_memory_used(base.device)),
        eos=frozenset(base.shape.eos),
        grammars=Grammars(
            (folder / "tokenizer.json").read_text(encoding="utf-8"), base.shape.vocab, frozenset(base.shape.eos)
        ),
        send=send,
    )


def _memory(options: Options, base: Decoder) -> tuple[int, Tiers]:
    """Split the budget: pages for the cache, the rest for adapters."""
    budget = options.memory_mb << 20
    adapters = budget // ADAPTER_SHARE
    pages = (budget - adapters) // KvCache.page_bytes(base.shape, options.page_tokens, base.dtype)
    tiers = Tiers(
        base.shape,
        options.base,
        adapters,
        lambda adapter: lora.promote(adapter, base.shape, base.dtype, base.device),
    )
    return int(pages), tiers


def _memory_used(device: torch.device) -> int:
    """Bytes: the process's resident set, or what torch holds on the GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Outbox:
    """Answers to the service."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def __call__(self, reply: protocol.Reply) -> None:
        self._connection.sendall(protocol.pack(reply))


class Inbox:
    """Requests from the service."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()

    def read(self, *, wait: bool) -> list[protocol.Request]:
        """What has arrived; with `wait`, at least one. Raises EOFError when the service is gone."""
        if wait or select.select([self._connection], [], [], 0)[0]:
            received = self._connection.recv(1 << 20)
            if not received:
                raise EOFError
            self._buffer += received
        return list(self._complete())

    def _complete(self) -> Iterator[protocol.Request]:
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "big")
            if len(self._buffer) < 4 + size:
                return
            body = bytes(self._buffer[4 : 4 + size])
            del self._buffer[: 4 + size]
            yield protocol.requests.decode(body)


def serve(loop: EngineLoop, inbox: Inbox) -> None:
    """The loop of the engine, until the service is gone."""
    while True:
        try:
            for request in inbox.read(wait=loop.idle):
                loop.handle(request)
            loop.work()
        except (EOFError, ConnectionError):
            return


def main() -> None:
    """Run on the socket whose descriptor is the first argument, with the options that are the second."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    connection = socket.socket(fileno=int(sys.argv[1]))
    options = msgspec.convert(json.loads(sys.argv[2]), Options)
    serve(build(options, Outbox(connection)), Inbox(connection))


if __name__ == "__main__":
    main()
