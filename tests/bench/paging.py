"""One memory for context and adapters against fixed splits of it, in phases that want the one or the other.

    .venv/bin/python tests/bench/paging.py [--pages 96] [--layers 2] [--rounds 2] [--threads 1]

The engine's own loop in this process, on the first layers of the embedded model. A fixed split is the same code with
two page pools over the one memory: a quarter or a half of it goes to adapters. In the adapter phase each of many users
asks twice, briefly; in the context phase a few ask at length, and then again with more behind it. All sides take turns
in every round. One JSON line for each side and phase, over all rounds:

    admitted    sequences that run at once: the most, and the mean over steps
    per_s       requests, and tokens of prompts and replies, whether computed or found in the cache
    loads       adapters brought to the device     cached  share of the prompts' tokens that needed no computing
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from persona.engine import adapter_file, decoder, lora, prepare, protocol, random_adapter, weights
from persona.engine.adapter_file import Adapter
from persona.engine.attention import KvCache
from persona.engine.decoder import Decoder
from persona.engine.grammar import Grammars
from persona.engine.kernels import native
from persona.engine.loop import EngineLoop
from persona.engine.memory import Memory
from persona.engine.pages import PagePool
from persona.engine.protocol import AdapterRef, GenerateRequest, Health, Piece, Reply, Sampling
from persona.engine.runner import Runner
from persona.engine.scheduler import Scheduler
from persona.engine.text import Text
from persona.engine.tiers import Tiers
from persona.settings import Settings

SIZE = 32  # tokens a page
RUNNING = 32
USERS, BRIEF, WORD = 40, 24, 8  # adapter phase: users, tokens of a prompt, of a reply
WRITERS, CHATS, LONG, REPLY, MORE = 4, 8, 320, 32, 64  # context phase: users, conversations; MORE the second time


def report(**figures: object) -> None:
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


def text(*seed: int, length: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(1000, 40000, length)]


@dataclass
class Phase:
    """What one side did in one kind of phase."""

    running: list[int] = field(default_factory=list)  # after each step
    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    loads: int = 0


class Side:
    """One engine. share: of the pages, for adapters alone; None: one memory for both."""

    def __init__(
        self, base: Decoder, prepared: prepare.Prepared, pages: int, share: float | None, grammars: Grammars
    ) -> None:
        memory = Memory(pages, KvCache.page_bytes(base.shape, SIZE, base.dtype), base.device)
        border = 0 if share is None else pages - round(pages * share)
        context = PagePool(border or pages, SIZE)
        self.bell, self._thread = threading.Event(), ThreadPoolExecutor(1, initializer=weights.on_one_core)
        tiers = Tiers(
            lambda ref: adapter_file.read(Path(ref.path), ref.sha256, prepared.base, base.shape),
            lambda adapter: memory.needed(lora.nbytes(adapter, base.shape, base.dtype)),
            lambda adapter, run: _expand(adapter, base, memory, [border + page for page in run]),
            pool=PagePool(pages - border, SIZE) if border else context,
            host_budget=1 << 28,
            submit=self._load,
        )
        cache = KvCache(memory, base.shape, SIZE, base.dtype)
        self.scheduler = Scheduler(context, tiers, max_running=RUNNING, max_waiting=1000, prefill_tokens=256)
        health = Health(prepared.base, "", "cpu", "int4", 4096, base.shape.vocab)
        self.said: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.loop = EngineLoop(
            scheduler=self.scheduler,
            runner=Runner(base, cache, native.steps(Settings().cache / "kernels", base, cache, 4096)),
            tiers=tiers,
            text=Text.load(prepared.folder),
            train=lambda request: iter(()),
            score=lambda wanted: _nothing(),
            about=lambda: health,
            eos=frozenset(),
            grammars=grammars,
            send=self._hear,
        )
        self._job = 0

    def health(self) -> Health:
        found: list[Health] = []
        self._pong = found.append
        self.loop.handle(protocol.Ping(0))
        return found[0]

    def ask(self, ref: AdapterRef, tokens: list[int], reply: int) -> None:
        self._job += 1
        request = GenerateRequest(tokens, Sampling(max_tokens=reply, ignore_eos=True), ref, ref.user_id)
        self.loop.handle(protocol.Generate(self._job, request))

    def run(self, phase: Phase, asked: list[tuple[AdapterRef, list[int], int]]) -> None:
        """All requests at once, until the last has its reply."""
        before, started = self.health(), time.perf_counter()
        self.ended.clear()
        for one in asked:
            self.ask(*one)
        while len(self.ended) < len(asked):
            self.bell.clear()
            self.loop.work()
            phase.running.append(self.scheduler.running)
            if self.loop.idle and len(self.ended) < len(asked):
                self.bell.wait(1)
        phase.seconds += time.perf_counter() - started
        after = self.health()
        phase.requests += len(asked)
        phase.tokens += sum(len(tokens) + reply for _, tokens, reply in asked)
        for name in ("prompt_tokens", "cached_tokens", "loads"):
            setattr(phase, name, getattr(phase, name) + getattr(after, name) - getattr(before, name))

    def _load(self, work: Callable[[], None]) -> None:
        self._thread.submit(lambda: (work(), self.bell.set()))

    def _hear(self, reply: Reply) -> None:
        if isinstance(reply, protocol.Pong):
            self._pong(reply.health)
        else:
            assert isinstance(reply, Piece), reply
            if reply.chunk.finish is not None:
                assert reply.chunk.finish == "length", reply
                self.ended.add(reply.id)


def _expand(adapter: Adapter, base: Decoder, memory: Memory, pages: list[int]) -> lora.Resident:
    return lora.expand(adapter, base.shape, base.dtype, memory.run(pages))


def _nothing():  # type: ignore[no-untyped-def]
    yield
    return []


def adapters(folder: Path, base: Decoder, name: str) -> list[AdapterRef]:
    found = []
    for user in range(1, USERS + 1):
        out = folder / str(user)
        out.mkdir()
        file = random_adapter.write(out, base.shape, name, protocol.Plan(), user)
        found.append(AdapterRef(user, 1, str(out), prepare.sha256(file)))
    return found


def play(side: Side, phases: dict[str, Phase], refs: list[AdapterRef], number: int) -> None:
    """The adapter phase, then the context phase, with other words in every round."""
    for wave in range(2):
        brief = [(ref, text(number, 1, wave, ref.user_id, length=BRIEF), WORD) for ref in refs]
        side.run(phases["adapters"], brief)
    long = [(refs[n % WRITERS], text(number, 2, n, length=LONG), REPLY) for n in range(CHATS)]
    side.run(phases["context"], long)
    further = [(ref, [*tokens, *text(number, 3, n, length=MORE)], REPLY) for n, (ref, tokens, _) in enumerate(long)]
    side.run(phases["context"], further)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prepared = prepare.fetch(prepare.EMBEDDED, Settings().cache, "int4", lambda _, __: None)
    whole = decoder.load(prepared.folder, "int4", "cpu")
    shape = replace(whole.shape, layers=options.layers)
    base = Decoder(shape, whole.layers[: options.layers], whole.embed, whole.norm, whole.head)
    shares = {"one memory": None, "a quarter for adapters": 0.25, "half for adapters": 0.5}
    with tempfile.TemporaryDirectory() as folder:
        refs = adapters(Path(folder), base, prepared.base)
        tokenizer = (prepared.folder / "tokenizer.json").read_text(encoding="utf-8")
        grammars = Grammars(tokenizer, shape.vocab, frozenset())
        sides = {name: Side(base, prepared, options.pages, share, grammars) for name, share in shares.items()}
        figures = {name: {"adapters": Phase(), "context": Phase()} for name in sides}
        for side in sides.values():  # once, uncounted: libraries compile kernels for new shapes
            side.run(Phase(), [(refs[0], text(0, length=LONG), REPLY)])
        for number in range(1, options.rounds + 1):
            for name, side in sides.items():
                play(side, figures[name], refs, number)
    for name, phases in figures.items():
        for kind, phase in phases.items():
            report(
                side=name,
                phase=kind,
                admitted={"most": max(phase.running), "mean": round(statistics.mean(phase.running), 1)},
                per_s={
                    "requests": round(phase.requests / phase.seconds, 2),
                    "tokens": round(phase.tokens / phase.seconds, 1),
                },
                loads=phase.loads,
                cached=round(phase.cached_tokens / phase.prompt_tokens, 3),
            )


if __name__ == "__main__":
    main()
