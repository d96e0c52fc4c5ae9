"""The engine process: loads the base once, then turns messages on one socket into steps and slices.

A composition root: the only file of the engine that names concrete parts. It ends when its socket closes, so it
never outlives the service; signals from the terminal are the service's business.
"""

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from jobs import leaner
from jobs.trainer import Trainer
from persona import logs
from persona.engine import adapter_file, branches, decoder, lora, protocol, slices, weights
from persona.engine.adapter_file import Adapter
from persona.engine.attention import KvCache
from persona.engine.buckets import Layout
from persona.engine.decoder import Decoder
from persona.engine.device import Form
from persona.engine.grammar import Grammars
from persona.engine.graphs import DecodeGraphs
from persona.engine.kernels import native
from persona.engine.kernels.choice import kernels
from persona.engine.kernels.native import NativeSteps
from persona.engine.loop import EngineLoop, Train
from persona.engine.lora import Resident
from persona.engine.memory import Memory, apart
from persona.engine.pages import PagePool
from persona.engine.protocol import AdapterRef, Health, Plan, Progress, TrainRequest
from persona.engine.refusals import trouble
from persona.engine.runner import Runner
from persona.engine.scheduler import Scheduler
from persona.engine.text import Text
from persona.engine.tiers import Submit, Tiers
from persona.engine.wires import Inbox, Loader, Outbox
from persona.settings import Log


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
    host_mb: int
    prefill_tokens: int
    patience_seconds: float
    threads: int
    native: bool
    kernels: str
    log: dict[str, Any]  # settings.Log


def build(options: Options, send: Outbox, loader: Submit) -> EngineLoop:
    """Load the base and put the engine together. Raises ModelError."""
    torch.set_num_threads(weights.threads(options.threads))
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and scores have all shapes
    folder = Path(options.folder)
    base = decoder.load(folder, options.weights, options.device)
    memory, cache = _storage(options, base)
    whole = _whole(options, base, cache)
    pool = PagePool(memory.pages - isinstance(whole, DecodeGraphs), options.page_tokens)
    health = Health(
        base=options.base,
        model=options.name,
        device=options.device,
        weights=options.weights,
        context=min(options.context, base.shape.context),
        vocab=base.shape.vocab,
        base_bytes=base.nbytes(),
    )

    def read(ref: AdapterRef) -> Adapter:
        return adapter_file.read(Path(ref.path), ref.sha256, options.base, base.shape)

    def fill(adapter: Adapter, pages: list[int]) -> Resident:
        with apart(base.device):
            return lora.expand(adapter, base.shape, base.dtype, memory.run(pages))

    tiers = Tiers(
        read,
        lambda adapter: memory.needed(lora.nbytes(adapter, base.shape, base.dtype)),
        fill,
        pool=pool,
        host_budget=options.host_mb << 20,
        submit=loader,
    )
    return EngineLoop(
        scheduler=Scheduler(
            pool,
            tiers,
            max_running=options.max_running,
            max_waiting=options.max_waiting,
            prefill_tokens=options.prefill_tokens,
        ),
        runner=Runner(base, cache, whole),
        tiers=tiers,
        text=Text.load(folder),
        train=_training(options, base, read),
        score=lambda wanted: slices.settled(branches.scores(base, wanted, options.prefill_tokens), _settle(base)),
        about=lambda: protocol.replace(health, memory=_memory_used(base.device)),
        eos=frozenset(base.shape.eos),
        grammars=Grammars(
            (folder / "tokenizer.json").read_text(encoding="utf-8"), base.shape.vocab, frozenset(base.shape.eos)
        ),
        send=send,
        patience=options.patience_seconds,
    )


def _training(options: Options, base: Decoder, read: Callable[[AdapterRef], Adapter]) -> Train:
    """What trains, in slices: the first reads what it goes on from."""

    def train(request: TrainRequest) -> Iterator[Progress | None]:
        def under(plan: Plan) -> Iterator[Progress | None]:
            try:
                start = read(request.start) if request.start is not None else None
            except OSError as error:
                raise trouble(error) from None
            yield None
            yield from Trainer(base, options.base, protocol.replace(request, plan=plan), start).slices()

        return slices.settled(leaner.slices(under, request.plan), _settle(base))

    return train


def _settle(base: Decoder) -> Callable[[], None]:
    """Waits for all that the device was given."""
    return torch.cuda.synchronize if base.device.type == "cuda" else lambda: None


def _storage(options: Options, base: Decoder) -> tuple[Memory, KvCache]:
    """The device memory and its view as cache."""
    page_bytes = KvCache.page_bytes(base.shape, options.page_tokens, base.dtype)
    memory = Memory((options.memory_mb << 20) // page_bytes, page_bytes, base.device)
    return memory, KvCache(memory, base.shape, options.page_tokens, base.dtype)


def _whole(options: Options, base: Decoder, cache: KvCache) -> DecodeGraphs | NativeSteps | None:
    """What computes rows in one piece: on the CPU compiled code; where there are kernels recordings of decode steps,
    which have the last page of memory as their scratch page."""
    quick, context = kernels(base.device.type), min(options.context, base.shape.context)
    if quick is None:
        compiled = native.steps(Path(options.kernels), base, cache, context) if options.native else None
        if compiled is None and base.device.type == "cpu":
            base.widen()
        return compiled
    last = cache.memory.pages - 1
    layout = Layout(options.page_tokens, cache.stride, -(-context // options.page_tokens), scratch=last)
    graphs = DecodeGraphs(base, cache, layout, quick)
    graphs.prepare(options.max_running)
    return graphs


def _memory_used(device: torch.device) -> int:
    """Bytes: the process's resident set, or what torch holds on the GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


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
    logs.configure(Log.model_validate(options.log), sys.stderr)  # stdout may be a report of whoever started this
    loader = Loader()
    loop = build(options, Outbox(connection), loader)
    serve(loop, Inbox(connection, loader.bell, loop.expect))


if __name__ == "__main__":
    main()
