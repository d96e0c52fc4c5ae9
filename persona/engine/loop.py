"""The life of the engine: one thread, one loop. inbox → step → outbox → slices.

`handle` takes one request in, `work` runs one step and, when serving leaves time, one slice of training. Serving
comes first: beside running sequences, slices get a share of their time. Any answer goes out through `send`.
Nothing here blocks, and nothing that fails in one request or in training reaches another.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog
import torch

from persona.engine import logprobs, protocol, sampler
from persona.engine.grammar import Grammar, Grammars
from persona.engine.logprobs import Margin
from persona.engine.lora import Resident
from persona.engine.protocol import (
    AdapterRef,
    Chunk,
    Failed,
    Health,
    Piece,
    Progress,
    Reply,
    Request,
    Scores,
    TokenLogprob,
)
from persona.engine.runner import Result, Runner
from persona.engine.sampler import Sampler
from persona.engine.scheduler import Plan, Scheduler, Sequence
from persona.engine.stops import Stops
from persona.engine.text import Detokenizer, Text
from persona.engine.tiers import Tiers
from persona.errors import Busy, PersonaError, RequestError, StorageFull, TooLarge, TrainingFailed

SHARE = 0.09  # of busy time that training may take: gaps between tokens may grow by a tenth
PATIENCE = 0.005  # seconds that an idle loop waits for a grammar before it looks for messages
SCORING = 1.0  # the same for scoring, which is short: a new version waits for its gate

Train = Callable[[protocol.TrainRequest], Iterator[Progress | None]]  # each item is one slice
# Scores in slices: one item each, one list per (tokens, targets, adapter) at the end.
Wanted = list[tuple[list[int], list[int], Resident | None]]
ScoreSlices = Callable[[Wanted], Generator[None, None, list[list[float]]]]
log = structlog.get_logger("engine")


class Base(Protocol):
    """The unchanging part of Health."""

    def __call__(self) -> Health: ...


@dataclass(slots=True)
class _Generation:
    """A reply in the making."""

    sequence: Sequence
    adapter: Resident | None
    sampler: Sampler
    words: Detokenizer
    stops: Stops
    margin: Margin
    generated: int = 0


@dataclass(slots=True)
class _Scoring:
    """Log-probabilities in the making."""

    sequence: Sequence
    adapter: Resident | None
    found: list[TokenLogprob]
    told: bool  # with alternatives


class EngineLoop:
    """Everything between messages in and messages out."""

    def __init__(
        self,
        *,
        scheduler: Scheduler,
        runner: Runner,
        tiers: Tiers,
        text: Text,
        train: Train,
        score: ScoreSlices,
        about: Base,
        eos: frozenset[int],
        grammars: Grammars,
        send: Callable[[Reply], None],
    ) -> None:
        self._scheduler, self._runner, self._tiers = scheduler, runner, tiers
        self._text, self._train, self._about, self._eos, self._send = text, train, about, eos, send
        self._jobs: dict[int, _Generation | _Scoring] = {}
        self._grammars = grammars
        self._compiling: dict[int, tuple[futures.Future[Grammar], Sequence, protocol.GenerateRequest]] = {}
        self._training: tuple[int, Iterator[Progress | None]] | None = None
        self._score_slices = score
        self._scorings: deque[tuple[int, Generator[None, None, list[list[float]]]]] = deque()  # before any training
        self._paused = False
        self._steps = self._slices = self._tokens = 0
        self._credit = 0.0  # seconds of slices that serving has earned for training; below zero after a long one

    @property
    def idle(self) -> bool:
        """Nothing to do until the next message."""
        return self._scheduler.idle and not self._sliced and not self._compiling

    def handle(self, request: Request) -> None:
        """Take one request in; answers go to `send`, now or later."""
        self._guarded(request.id, lambda: self._dispatch(request))

    def _guarded(self, job: int, do: Callable[[], None]) -> None:
        """Whatever fails on the way in ends this request alone."""
        try:
            do()
        except PersonaError as error:
            self._fail(job, error)
        except (
            RuntimeError,
            MemoryError,
        ) as error:  # an adapter that does not fit: only this request ends
            log.error("request failed", kind=type(error).__name__)
            self._fail(job, Busy("There is no memory for this request; try again later.", retry_after=10))

    def work(self) -> None:
        """One step of serving, then a slice of training if serving leaves time for it."""
        if self._compiling:
            self._admit_compiled()
        plan = self._scheduler.plan()
        if plan:
            started = time.perf_counter()
            self._step(plan)
            share = SCORING if self._scorings else SHARE
            self._credit = min(0.0, self._credit + share * (time.perf_counter() - started))
        if self._sliced and (not plan or self._credit >= 0):
            started = time.perf_counter()
            self._slice()
            self._credit -= (time.perf_counter() - started) * bool(plan)

    @property
    def _sliced(self) -> bool:
        """Whether there is work in slices: scoring of many sequences, or training that is not paused."""
        return bool(self._scorings) or (self._training is not None and not self._paused)

    def check(self) -> None:
        """Assert that no page leaked."""
        self._scheduler.check()

    # --- inbox

    def _dispatch(self, request: Request) -> None:
        match request:
            case protocol.Generate():
                self._generate(request.id, request.request)
            case protocol.Score():
                self._score(request.id, request.request)
            case protocol.ScoreAll():
                self._score_all(request.id, request.requests)
            case protocol.Abort():
                self._abort(request.id)
            case protocol.Stage():
                self._tiers.get(request.ref, self._in_use())
                self._send(protocol.Done(request.id))
            case protocol.Flip():
                self._tiers.flip(request.ref, self._in_use())
                self._send(protocol.Done(request.id))
            case protocol.Drop():
                self._tiers.drop(request.user_id)
                self._runner.forget()
                self._send(protocol.Done(request.id))
            case protocol.Train():
                self._start_training(request.id, request.request)
            case protocol.Pause() | protocol.Resume():
                self._paused = isinstance(request, protocol.Pause)
                self._send(protocol.Done(request.id))
            case protocol.Ping():
                self._send(protocol.Pong(request.id, self._health()))

    def _generate(self, job: int, request: protocol.GenerateRequest) -> None:
        if self._scheduler.full():
            raise Busy("Too many requests are waiting; try again in a few seconds.", retry_after=5)
        limit = len(request.tokens) + request.sampling.max_tokens
        if any(not 0 <= token < self._about().vocab for token, _ in request.sampling.logit_bias):
            raise RequestError("logit_bias names a token that the model does not have.", param="logit_bias")
        sequence = self._sequence(job, request.tokens, limit, request.adapter)
        if not request.sampling.grammar:
            self._admit(sequence, request)
        else:
            self._compiling[job] = self._grammars.compile(request.sampling.grammar), sequence, request

    def _admit_compiled(self) -> None:
        """Let those in whose grammar is ready; with nothing else to do wait for one for a moment."""
        if self._scheduler.idle and not self._sliced:
            futures.wait([one for one, _, _ in self._compiling.values()], PATIENCE, futures.FIRST_COMPLETED)
        for job, (grammar, sequence, request) in list(self._compiling.items()):
            if grammar.done():
                del self._compiling[job]
                self._guarded(job, partial(self._admit_result, sequence, request, grammar))

    def _admit_result(
        self, sequence: Sequence, request: protocol.GenerateRequest, grammar: futures.Future[Grammar]
    ) -> None:
        self._admit(sequence, request, grammar.result())

    def _admit(self, sequence: Sequence, request: protocol.GenerateRequest, grammar: Grammar | None = None) -> None:
        self._jobs[sequence.id] = _Generation(
            sequence,
            self._resident(request.adapter),
            Sampler(request.sampling, request.tokens, grammar),
            Detokenizer(self._text),
            Stops(request.sampling.stop),
            Margin(),
        )
        self._scheduler.add(sequence)

    def _score(self, job: int, request: protocol.ScoreRequest) -> None:
        if not request.targets:
            self._send(Scores(job, []))
            return
        _check_targets(request)
        sequence = self._sequence(job, request.tokens, len(request.tokens), request.adapter)
        sequence.targets, sequence.background = tuple(request.targets), True
        sequence.top = request.top or 0
        self._jobs[job] = _Scoring(sequence, self._resident(request.adapter), [], request.top is not None)
        self._scheduler.add(sequence)

    def _score_all(self, job: int, requests: list[protocol.ScoreRequest]) -> None:
        wanted: Wanted = []
        for request in requests:
            if not request.targets:
                continue
            _check_targets(request)
            self._sequence(job, request.tokens, len(request.tokens), request.adapter)  # refuses what is too long
            wanted.append((request.tokens, request.targets, self._resident(request.adapter)))
        self._scorings.append((job, self._all_scores([bool(r.targets) for r in requests], wanted)))

    def _all_scores(self, asked: list[bool], wanted: Wanted) -> Generator[None, None, list[list[float]]]:
        found = iter((yield from self._score_slices(wanted)))
        return [next(found) if some else [] for some in asked]

    def _sequence(self, job: int, tokens: list[int], limit: int, adapter: AdapterRef | None) -> Sequence:
        about = self._about()
        if not tokens:
            raise RequestError("The prompt is empty.")
        if min(tokens) < 0 or max(tokens) >= about.vocab:  # one such row would end the whole step
            raise RequestError("The prompt holds a token that the model does not have.")
        if limit > about.context or not self._scheduler.fits(limit):
            raise TooLarge(
                f"Prompt and reply together are {limit} tokens; at most {about.context} fit.",
                code="context_length_exceeded",
            )
        return Sequence(job, list(tokens), len(tokens), limit, adapter)

    def _resident(self, ref: AdapterRef | None) -> Resident | None:
        return None if ref is None else self._tiers.get(ref, self._in_use())

    def _in_use(self) -> set[AdapterRef]:
        return {s.adapter for s in self._scheduler.sequences() if s.adapter is not None}

    def _abort(self, job: int) -> None:
        if job in self._jobs:
            self._finish(job, "abort")
        elif job in self._compiling:
            self._compiling.pop(job)[0].cancel()
            self._send(Piece(job, Chunk("", 0, "abort")))
        elif mine := [scoring for scoring in self._scorings if scoring[0] == job]:
            self._scorings.remove(mine[0])
            self._fail(job, Busy("The scoring was aborted."))
        elif self._training and self._training[0] == job:
            self._end_training()
            self._fail(job, TrainingFailed("The training was abandoned."))

    def _start_training(self, job: int, request: protocol.TrainRequest) -> None:
        if self._training:
            raise Busy("Another training is running; try again when it has ended.", retry_after=30)
        self._training = job, self._train(request)

    def _health(self) -> Health:
        return protocol.replace(
            self._about(),
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            resident=len(self._tiers),
            free_pages=self._scheduler.pool.free,
            pages=self._scheduler.pool.total,
            training=self._training is not None,
            steps=self._steps,
            slices=self._slices,
            generated=self._tokens,
        )

    # --- step

    def _step(self, plan: Plan) -> None:
        sequences = [*plan.decode, *(segment.sequence for segment in plan.prefill)]
        try:
            result = self._runner.run(plan, {s.id: self._jobs[s.id].adapter for s in sequences})
        except (RuntimeError, IndexError) as error:  # out of memory, mostly: these end, the engine goes on
            log.error("step failed", rows=len(sequences), kind=type(error).__name__)
            for job in {s.id for s in sequences}:
                self._finish(job, "error", "The engine ran out of memory under this request; try a shorter one.")
            return
        self._steps += 1
        self._deliver(result)

    def _deliver(self, result: Result) -> None:
        for sequence, found in result.scores:
            self._collect(sequence, found)
        if not result.next:
            return
        finite = result.logits.amax(-1).isfinite().tolist()
        jobs = [self._jobs[s.id] for s in result.next]
        drawn = _drawn(result.logits.nan_to_num(), [j.sampler for j in jobs if isinstance(j, _Generation)])
        for sequence, (token, told), sound in zip(result.next, drawn, finite, strict=True):
            if sound:
                self._extend(sequence.id, token, told)
            else:
                self._finish(sequence.id, "error", "The adapter of this request computes values that are not finite.")

    def _collect(self, sequence: Sequence, found: list[TokenLogprob]) -> None:
        job = self._jobs[sequence.id]
        assert isinstance(job, _Scoring)
        job.found += found
        if not sequence.prefilling:
            self._remove(sequence.id)
            self._send(Scores(sequence.id, [one.logprob for one in job.found], job.found if job.told else []))

    def _extend(self, job: int, token: int, told: TokenLogprob | None) -> None:
        generation = self._jobs[job]
        assert isinstance(generation, _Generation)
        grammar = generation.sampler.grammar
        if grammar is not None and grammar.lost:
            self._finish(job, "error", "The schema became too complex on the way; make it simpler.")
            return
        generation.generated += 1
        self._tokens += 1
        if token in self._eos:
            self._finish(job, "stop")
            return
        generation.sequence.tokens.append(token)
        written = generation.words.add(token)
        generation.margin.add(told, len(written))
        shown, stopped = generation.stops.feed(written)
        if stopped:
            self._finish(job, "stop", shown=shown, cut=True)
        elif grammar is not None and grammar.ended:
            self._finish(job, "stop", shown=shown)
        elif len(generation.sequence.tokens) >= generation.sequence.limit:
            self._finish(job, "length", shown=shown)
        elif shown:
            beside = generation.margin.show(len(shown))
            self._send(Piece(job, Chunk(shown, generation.generated, logprobs=beside)))

    def _finish(self, job: int, finish: str, error: str | None = None, shown: str = "", *, cut: bool = False) -> None:
        """End a job with its last answer. `shown`: the last text that is certain; a stop string has `cut` the rest."""
        ended = self._remove(job)
        if isinstance(ended, _Scoring):
            self._fail(job, Busy(error or "The scoring was aborted."))
            return
        text, stopped = shown, cut
        if not stopped:
            tail, stopped = ended.stops.feed(ended.words.flush())
            text += tail if stopped else tail + ended.stops.flush()
            finish = "stop" if stopped and finish == "length" else finish
        beside = ended.margin.show(len(text)) if stopped else ended.margin.rest()
        self._send(Piece(job, Chunk(text, ended.generated, finish, error, beside)))

    def _remove(self, job: int) -> _Generation | _Scoring:
        ended = self._jobs.pop(job)
        self._scheduler.remove(ended.sequence)
        return ended

    def _fail(self, job: int, error: PersonaError) -> None:
        retry = error.retry_after if isinstance(error, Busy) else 0
        self._send(Failed(job, type(error).__name__, error.message, error.code, retry))

    # --- slices

    def _slice(self) -> None:
        self._slices += 1
        if self._scorings:
            self._score_slice(*self._scorings[0])
        elif self._training:
            self._train_slice(*self._training)

    def _score_slice(self, job: int, slices: Generator[None, None, list[list[float]]]) -> None:
        try:
            next(slices)
        except StopIteration as ended:
            self._scorings.popleft()
            self._send(protocol.AllScores(job, ended.value))
        except (RuntimeError, MemoryError) as error:
            self._scorings.popleft()
            log.error("scoring failed", kind=type(error).__name__)
            self._fail(job, Busy("There is no memory to score this now; try again later.", retry_after=30))

    def _train_slice(self, job: int, slices: Iterator[Progress | None]) -> None:
        try:
            progress = next(slices)
        except PersonaError as error:
            self._end_training()
            self._fail(job, error)
        except OSError as error:
            self._end_training()
            self._fail(job, StorageFull(f"The adapter could not be written: {error.strerror}."))
        except Exception as error:  # whatever it is, serving goes on
            self._end_training()
            log.error("training failed", kind=type(error).__name__)
            self._fail(job, TrainingFailed(f"The training stopped on {type(error).__name__}: {_cause(error)}"))
        else:
            if progress is not None:
                if progress.done:
                    self._end_training()
                self._send(protocol.Step(job, progress))

    def _end_training(self) -> None:
        if self._training:
            close = getattr(self._training[1], "close", None)
            if close is not None:
                close()
        self._training = None


def _drawn(logits: torch.Tensor, samplers: list[Sampler]) -> list[tuple[int, TokenLogprob | None]]:
    """logits: [rows, vocab] → a token each and, where it was asked for, what is told of it."""
    rows = [row for row, one in enumerate(samplers) if one.sampling.logprobs is not None]
    plain = logits[rows] if rows else logits  # a copy: drawing changes logits
    tokens = sampler.draw(logits, samplers)
    told: dict[int, TokenLogprob] = {}
    if rows:
        tops = [samplers[row].sampling.logprobs or 0 for row in rows]
        told = dict(zip(rows, logprobs.of(plain, [tokens[row] for row in rows], tops), strict=True))
    return [(token, told.get(row)) for row, token in enumerate(tokens)]


def _check_targets(request: protocol.ScoreRequest) -> None:
    """Raise RequestError unless targets ascend and have a token before them."""
    wanted = sorted(set(request.targets))
    if request.targets != wanted or wanted[0] < 1 or wanted[-1] >= len(request.tokens):
        raise RequestError("Targets to score must ascend and lie inside the tokens, after the first.")


def _cause(error: BaseException) -> str:
    """The system's own words for a failure: never user text."""
    if isinstance(error, OSError):
        return f"{error.strerror}."
    return "out of memory, or a fault in the computation; serving goes on."
