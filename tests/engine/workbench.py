"""The engine's loop in this process, on a tiny model: requests in, answers in lists, steps by hand."""

import math
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from models import Models

from jobs import leaner
from jobs.trainer import Trainer
from persona.engine import adapter_file, branches, lora, protocol
from persona.engine.adapter_file import Adapter
from persona.engine.attention import KvCache
from persona.engine.buckets import Layout
from persona.engine.grammar import Grammars
from persona.engine.graphs import DecodeGraphs, Work
from persona.engine.kernels import native
from persona.engine.kernels.choice import Kernels
from persona.engine.loop import EngineLoop
from persona.engine.memory import Memory
from persona.engine.pages import PagePool
from persona.engine.protocol import (
    AdapterRef,
    Failed,
    GenerateRequest,
    Health,
    Piece,
    Plan,
    Progress,
    Reply,
    Sampling,
    Scores,
    TrainRequest,
)
from persona.engine.runner import Runner
from persona.engine.scheduler import Scheduler
from persona.engine.text import Text
from persona.engine.tiers import Submit, Tiers
from persona.engine.weights import Projection

PAGE = 8
ADAPTER = 13  # pages of PAGE tokens that an adapter of rank 8 on every layer of a tiny model takes


class Bench:
    """An EngineLoop and everything that it said, by job."""

    def __init__(
        self,
        models: Models,
        kind: str = "llama",
        weights: str = "int4",
        *,
        pages: int = 400,
        running: int = 32,
        waiting: int = 64,
        prefill: int = 64,
        context: int = 512,
        host: int = 1 << 26,
        submit: Submit = lambda load: load(),
        patience: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        page: int = PAGE,
        eos: frozenset[int] = frozenset(),
        dtype: torch.dtype | None = None,
        kernels: Kernels | None = None,
        compiled: bool = True,
    ) -> None:
        """kernels: with recordings of decode steps, which are replayed by computing again · compiled: else, where there
        is a compiler, decode rows are computed by code for this CPU."""
        self.prepared = models.prepared(kind, weights)
        self.decoder = models.decoder(kind, weights)
        self.decoder.dtype = dtype or self.decoder.dtype
        self.shape = self.decoder.shape
        self.answers: dict[int, list[Reply]] = {}
        scratch = 0 if kernels is None else 1
        page_bytes = KvCache.page_bytes(self.shape, page, self.decoder.dtype)
        self.memory = Memory(pages + scratch, page_bytes, self.decoder.device)
        dtype, pool = self.decoder.dtype, PagePool(pages, page)
        self.cache = KvCache(self.memory, self.shape, page, dtype)
        layout = Layout(page, self.cache.stride, -(-context // page), scratch=pages)
        self.graphs = None if kernels is None else DecodeGraphs(self.decoder, self.cache, layout, kernels, again)
        folder = models.root / "kernels"
        plain = None if not compiled else native.steps(folder, self.decoder, self.cache, self.shape.context)
        self.tiers = Tiers(
            self._read,
            lambda found: self.memory.needed(lora.nbytes(found, self.shape, dtype)),
            lambda found, into: lora.expand(found, self.shape, dtype, self.memory.run(into)),
            pool=pool,
            host_budget=host,
            submit=submit,
        )
        self.scheduler = Scheduler(
            pool,
            self.tiers,
            max_running=running,
            max_waiting=waiting,
            prefill_tokens=prefill,
        )
        health = Health(self.prepared.base, "tiny", "cpu", weights, context, self.shape.vocab)
        self.loop = EngineLoop(
            scheduler=self.scheduler,
            runner=Runner(self.decoder, self.cache, self.graphs or plain),
            tiers=self.tiers,
            text=Text.load(self.prepared.folder),
            train=self._train,
            score=lambda wanted: branches.scores(self.decoder, wanted, prefill),
            about=lambda: health,
            eos=eos,
            grammars=grammars(self.prepared.folder, self.shape.vocab),
            patience=patience,
            clock=clock,
            send=lambda reply: self.answers.setdefault(reply.id, []).append(reply),
        )
        self._job = 0

    def _read(self, ref: AdapterRef) -> Adapter:
        return adapter_file.read(Path(ref.path), ref.sha256, self.prepared.base, self.shape)

    def _train(self, request: TrainRequest) -> Iterator[Progress | None]:
        start = self._read(request.start) if request.start is not None else None

        def under(plan: Plan) -> Iterator[Progress | None]:
            return Trainer(self.decoder, self.prepared.base, protocol.replace(request, plan=plan), start).slices()

        return leaner.slices(under, request.plan)

    # --- requests: each returns its job

    def ask(self, make: Callable[[int], protocol.Request]) -> int:
        self._job += 1
        self.loop.handle(make(self._job))
        return self._job

    def generate(
        self, tokens: list[int], adapter: AdapterRef | None = None, count: int = 12, user: int = 0, **options: Any
    ) -> int:
        """user: whose beginnings are kept and found; 0: nobody's."""
        request = GenerateRequest(tokens, Sampling(max_tokens=count, **options), adapter, user)
        return self.ask(lambda job: protocol.Generate(job, request))

    def score(self, tokens: list[int], adapter: AdapterRef | None = None, targets: list[int] | None = None) -> int:
        wanted = list(range(1, len(tokens))) if targets is None else targets
        return self.ask(lambda job: protocol.Score(job, protocol.ScoreRequest(tokens, wanted, adapter)))

    def tell(self, tokens: list[int], top: int, adapter: AdapterRef | None = None) -> int:
        request = protocol.ScoreRequest(tokens, list(range(1, len(tokens))), adapter, top)
        return self.ask(lambda job: protocol.Score(job, request))

    def score_all(self, requests: list[protocol.ScoreRequest]) -> int:
        return self.ask(lambda job: protocol.ScoreAll(job, requests))

    def train(self, request: TrainRequest) -> int:
        return self.ask(lambda job: protocol.Train(job, request))

    def abort(self, job: int) -> None:
        self.ask(lambda _: protocol.Abort(job))

    def health(self) -> Health:
        answer = self.answers[self.ask(protocol.Ping)][0]
        assert isinstance(answer, protocol.Pong)
        return answer.health

    # --- work and answers

    def work(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.loop.work()
            self.loop.check()

    def finish(self) -> None:
        """Work until there is nothing left."""
        for _ in range(5000):
            if self.loop.idle:
                filling = sum(len(lease.pages) for lease in self.tiers.shelf.leases if lease.value is None)
                assert self.scheduler.pool.available + filling == self.scheduler.pool.total
                return
            self.work()
        raise AssertionError("the engine never became idle")

    def text(self, job: int) -> str:
        return "".join(a.chunk.text for a in self.answers[job] if isinstance(a, Piece))

    def end(self, job: int) -> str | None:
        """How the reply ended; None while it runs."""
        last = self.answers.get(job, [None])[-1]
        return last.chunk.finish if isinstance(last, Piece) else None

    def scores(self, job: int) -> list[float]:
        (answer,) = self.answers[job]
        assert isinstance(answer, Scores), answer
        return answer.logprobs

    def failure(self, job: int) -> Failed:
        answer = self.answers[job][-1]
        assert isinstance(answer, Failed), answer
        return answer

    def alone(self, tokens: list[int], adapter: AdapterRef | None = None, count: int = 12, **options: Any) -> str:
        """The greedy reply with nobody else there."""
        job = self.generate(tokens, adapter, count, **options)
        self.finish()
        return self.text(job)


def plain_tiers(pool: PagePool) -> Tiers:
    """Adapters without tensors, one page each, loaded at once."""

    class Value:
        def nbytes(self) -> int:
            return 1

    made: Any = Value()
    return Tiers(
        lambda ref: made,
        lambda adapter: 1,
        lambda adapter, pages: made,
        pool=pool,
        host_budget=100,
        submit=lambda load: load(),
    )


def again(work: Work) -> tuple[Callable[[], None], torch.Tensor]:
    """A recording for the CPU: its replay computes the same work from the same memory."""
    result = work()

    def replay() -> None:
        result.copy_(work())

    return replay, result


@lru_cache
def grammars(folder: Path, vocab: int) -> Grammars:
    return Grammars((folder / "tokenizer.json").read_text(encoding="utf-8"), vocab, frozenset({0}))


def projections(bench: Bench) -> list[Projection]:
    return [p for layer in bench.decoder.layers for p in layer.projections.values()]
