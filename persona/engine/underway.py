"""Requests in the scheduler, waiting or computing: what each was asked for, and what whoever asked is sent."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import structlog

from persona.engine import protocol, reply, sampler, slices
from persona.engine.protocol import Piece, Reply, Scores, TokenLogprob
from persona.engine.refusals import failed, starved
from persona.engine.reply import Generation
from persona.engine.runner import Result
from persona.engine.sampler import Choose
from persona.engine.scheduler import Scheduler
from persona.engine.sequence import Sequence
from persona.errors import Busy, EngineDown, PersonaError, Unprocessable

NO_MEMORY = "The engine ran out of memory under this request; try a shorter one."
BROKEN = "The engine failed under this request; the log says how. Try again, or another request."
NOT_FINITE = "This version of the base or of the user's adapter computes values that are not finite."

log = structlog.get_logger("engine")


@dataclass(slots=True)
class Score:
    """Log-probabilities in the making."""

    sequence: Sequence
    told: bool  # with alternatives
    found: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class Ahead:
    """The beginning of a coming prompt in the making."""

    sequence: Sequence


Job = Generation | Score | Ahead


class Underway:
    """All of them, by the number of the request."""

    def __init__(
        self, scheduler: Scheduler, eos: frozenset[int], send: Callable[[Reply], None], choose: Choose
    ) -> None:
        """choose: how the next tokens are chosen among logits."""
        self._scheduler, self._eos, self._send, self._choose = scheduler, eos, send, choose
        self._jobs: dict[int, Job] = {}
        self.generated = 0  # tokens, so far

    def __contains__(self, job: int) -> bool:
        return job in self._jobs

    def add(self, job: Job) -> None:
        """One that the scheduler has."""
        self._jobs[job.sequence.id] = job

    def remove(self, job: int) -> Job:
        """Take it out, and out of the scheduler."""
        ended = self._jobs.pop(job)
        self._scheduler.remove(ended.sequence)
        return ended

    def refused(self, job: int, error: PersonaError) -> None:
        """The scheduler has let it go."""
        del self._jobs[job]
        self._send(failed(job, error))

    def finish(self, job: int, finish: str, error: str | None = None, kind: type[PersonaError] = EngineDown) -> None:
        """End one with its last answer. kind: of an error."""
        ended = self.remove(job)
        if isinstance(ended, Generation):
            self._send(Piece(job, ended.end(finish, error, kind)))
        else:
            self._send(failed(job, Busy(error or slices.ABORTED)))

    def broken(self, sequences: Collection[Sequence], error: Exception) -> None:
        """A step with these failed."""
        for job in {sequence.id for sequence in sequences} & self._jobs.keys():
            self.finish(job, "error", NO_MEMORY if starved(error) else BROKEN)

    def deliver(self, sequences: Collection[Sequence], result: Result) -> None:
        """What a step with these has found, each to its own."""
        for sequence in [one for one in sequences if one.silent and not one.prefilling]:
            self.remove(sequence.id)
            self._send(protocol.Done(sequence.id))
        for sequence, found in result.scores:
            self._collect(sequence, found)
        if result.next:
            self._draw(result)

    def _collect(self, sequence: Sequence, found: list[TokenLogprob]) -> None:
        job = self._jobs[sequence.id]
        assert isinstance(job, Score)
        job.found += found
        if not sequence.prefilling:
            self.remove(sequence.id)
            self._send(Scores(sequence.id, [one.logprob for one in job.found], job.found if job.told else []))

    def _draw(self, result: Result) -> None:
        """The next token of each reply."""
        jobs = [self._jobs[s.id] for s in result.next]
        samplers = [job.sampler for job in jobs if isinstance(job, Generation)]
        drawn = reply.drawn(result.logits, samplers, self._eos, self._choose)
        for sequence, (token, told) in zip(result.next, drawn, strict=True):
            if token == sampler.NOT_FINITE:
                self.finish(sequence.id, "error", NOT_FINITE, Unprocessable if sequence.adapter else EngineDown)
                continue
            try:
                self._extend(sequence.id, token, told)
            except ConnectionError:  # the service is gone
                raise
            except Exception as error:  # whatever it is, in a grammar, say: this reply ends, those beside it go on
                log.error("reply failed", kind=type(error).__name__)
                if sequence.id in self._jobs:
                    self.finish(sequence.id, "error", BROKEN)

    def _extend(self, job: int, token: int, told: TokenLogprob | None) -> None:
        generation = self._jobs[job]
        assert isinstance(generation, Generation)
        before = generation.generated
        chunk = generation.add(token, told, self._eos)
        self.generated += generation.generated - before
        if chunk is not None:
            if chunk.finish is not None:
                self.remove(job)
            self._send(Piece(job, chunk))
