"""The life of the engine: one loop. inbox → step → outbox → slices.

`handle` takes one request in, `work` runs one step and, when serving leaves time, one slice of training. Serving
comes first: beside running sequences, slices get a share of their time. Any answer goes out through `send`. All of
it is one thread; while that computes, others see to it that adapters come (tiers.py: `turn`), and do nothing else.
Nothing here waits for longer than a few milliseconds (compiling.py: `pause`), and what fails in one request or in
training reaches no other, but for a step that fails as a whole.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol

import structlog

from persona.engine import protocol, slices
from persona.engine.admission import Admission
from persona.engine.awaiting import Awaiting, Errand
from persona.engine.compiling import Coming, Compiling
from persona.engine.grammar import Grammars
from persona.engine.lora import Resident
from persona.engine.prefix import Owner
from persona.engine.protocol import (
    AdapterRef,
    Chunk,
    Health,
    Piece,
    Progress,
    Reply,
    Request,
    Scores,
)
from persona.engine.refusals import failed, fatal, trouble
from persona.engine.reply import Generation
from persona.engine.runner import Runner
from persona.engine.sampler import Sampler
from persona.engine.scheduler import Scheduler
from persona.engine.score_all import ByAdapter, Wanted
from persona.engine.sequence import Plan, Sequence
from persona.engine.shelf import Lease
from persona.engine.slices import Scoring, Slices
from persona.engine.stops import Stops
from persona.engine.text import Detokenizer, Text
from persona.engine.tiers import Tiers
from persona.engine.underway import BROKEN, Ahead, Job, Score, Underway
from persona.errors import Busy, EngineDown, PersonaError, TooLarge

Train = Callable[[protocol.TrainRequest], Iterator[Progress | None]]  # each item is one slice
ScoreSlices = Callable[[Wanted], slices.Scores]
NEVER_FITS = "Prompt, reply and the user's adapter together are larger than the engine's memory; ask for less."
log = structlog.get_logger("engine")


class Base(Protocol):
    """The unchanging part of Health."""

    def __call__(self) -> Health: ...


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
        patience: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """patience: seconds within which a request must be admitted, or it is refused."""
        self._scheduler, self._runner, self._tiers, self._clock = scheduler, runner, tiers, clock
        self._text, self._train, self._about, self._send = text, train, about, send
        self._underway = Underway(scheduler, eos, send, runner.choose)
        self._awaiting = Awaiting(tiers)
        self._compiling = Compiling(grammars)
        self._admission = Admission(scheduler, self._compiling, about, patience=patience, clock=clock)
        self._score_slices = score
        self._slices = Slices(send, self._aside)
        self._stalled = False
        self._steps = 0

    @property
    def idle(self) -> bool:
        """Nothing to do until the next message, or until a load has ended: what is in use would go on, and what waits
        for pages would have had those that are idle."""
        return (self._scheduler.idle or self._stalled) and not self._slices.waiting and not self._compiling

    def expect(self, request: Request) -> None:
        """A request that `handle` will get: what it needs is loaded meanwhile. From any thread, during a step, too."""
        if isinstance(request, protocol.Generate) and (adapter := request.request.adapter) is not None:
            # What goes wrong here goes wrong in `handle` again, which tells whoever asked.
            with self._tiers.turn, suppress(PersonaError, RuntimeError, MemoryError):
                self._scheduler.expect(adapter)

    def handle(self, request: Request) -> None:
        """Take one request in; answers go to `send`, now or later."""
        with self._tiers.turn:
            self._stalled = False
            self._guarded(request.id, lambda: self._dispatch(request))
            self._land()

    def work(self) -> None:
        """One step of serving, then a slice of training if serving leaves time for it."""
        with self._tiers.turn:
            self._work()

    def _work(self) -> None:
        self._land()
        if self._compiling:
            self._admit_compiled()
        plan = self._plan()
        if not plan and self._land():
            plan = self._plan()
        if plan:
            started = time.perf_counter()
            self._step(plan)
            self._slices.earn(time.perf_counter() - started)
        sliced = self._slices.work(beside=bool(plan))
        self._stalled = not plan and not sliced
        if self._land():
            self._stalled = False

    def check(self) -> None:
        """Assert that no page and no lease leaked, and that every user's requests are counted."""
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
            case protocol.Prefill():
                self._prefill(request.id, request.request)
            case protocol.Abort():
                self._abort(request.id)
            case protocol.Stage():
                self._awaiting.add(Errand(request.id, request.ref, partial(self._stage, request.id)))
            case protocol.Flip():
                self._awaiting.add(Errand(request.id, request.ref, partial(self._flip, request.id)))
            case protocol.Drop():
                self._tiers.drop(request.user_id)
                self._scheduler.forget(request.user_id, self._compiling)
                self._runner.forget()
                self._compiling.forget()
                self._send(protocol.Done(request.id))
            case protocol.Train():
                self._slices.train(request.id, partial(self._train, request.request))
            case protocol.Pause() | protocol.Resume():
                self._slices.paused = isinstance(request, protocol.Pause)
                self._send(protocol.Done(request.id))
            case protocol.Ping():
                self._send(protocol.Pong(request.id, self._health()))

    def _generate(self, job: int, request: protocol.GenerateRequest) -> None:
        sequence = self._admission.generation(job, request)
        if request.sampling.grammar:
            self._compiling.add(sequence, request)
            self._trim()
        else:
            self._admit(Coming(sequence, request))

    def _admit_compiled(self) -> None:
        """Let those in whose grammar is ready."""
        if self._scheduler.idle and not self._slices.waiting:
            self._compiling.pause()
        for coming in self._compiling.ready():
            self._guarded(coming.sequence.id, partial(self._admit, coming))

    def _admit(self, coming: Coming) -> None:
        """Raises Busy if its turn would come too late, RequestError for a grammar that cannot be followed."""
        sampling = coming.request.sampling
        grammar = coming.grammar.result() if coming.grammar is not None else None
        sampler = Sampler(sampling, coming.request.tokens, grammar)
        words, stops = Detokenizer(self._text), Stops(sampling.stop)
        self._enter(Generation(coming.sequence, sampler, words, stops))

    def _enter(self, job: Job) -> None:
        """Into the waiting room. Raises Busy if its turn would come too late."""
        self._admission.enter(job.sequence)
        self._underway.add(job)
        self._trim()

    def _trim(self) -> None:
        """After somebody came: who is too many leaves."""
        if (leaving := self._admission.surplus()) is not None:
            self._send_away([leaving])

    def _send_away(self, some: list[Sequence]) -> None:
        for sequence in some:
            if sequence.id in self._underway:
                self._underway.remove(sequence.id)
            else:
                self._compiling.abort(sequence.id)
        for sequence in some:
            self._fail(sequence.id, self._admission.refusal())

    def _score(self, job: int, request: protocol.ScoreRequest) -> None:
        if not request.targets:
            self._send(Scores(job, []))
            return
        self._enter(Score(self._admission.scoring(job, request), request.top is not None))

    def _prefill(self, job: int, request: protocol.PrefillRequest) -> None:
        self._enter(Ahead(self._admission.prefill(job, request)))

    def _score_all(self, job: int, requests: list[protocol.ScoreRequest]) -> None:
        for request in requests:
            if request.targets:
                self._admission.scoring(job, request)  # refuses what cannot be scored
        self._score_next(job, ByAdapter(requests))

    def _score_next(self, job: int, asked: ByAdapter) -> None:
        """What one adapter has to score. One after another, each is held only while it computes."""
        if (group := asked.next()) is None:
            self._send(protocol.AllScores(job, asked.found))
            return

        def start(lease: Lease[Resident] | None) -> None:
            def ended(values: list[list[float]]) -> None:
                asked.fill(group, values)
                self._score_next(job, asked)

            def stop() -> None:
                if lease is not None:
                    self._tiers.release(lease)

            wanted = asked.wanted(group, lease.value if lease is not None else None)
            self._slices.score(Scoring(job, self._score_slices(wanted), ended, stop))

        if group.adapter is None:
            start(None)
        else:
            self._awaiting.add(Errand(job, group.adapter, start, failed(job, Busy(slices.ABORTED))))

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """While something computes, others may look at what is where, and load."""
        self._tiers.turn.release()
        try:
            yield
        finally:
            self._tiers.turn.acquire()

    def _land(self) -> bool:
        """Loads that have ended: on with those who waited for them. Whether there was one."""
        some = False
        while True:
            for ref, error in self._tiers.landed():
                some = True
                if error is not None:
                    self._not_loaded(ref, error)
            for errand, lease in self._awaiting.served():
                self._guarded(errand.job, partial(errand.then, lease))
            if not self._tiers.arrived:
                return some

    def _not_loaded(self, ref: AdapterRef, error: Exception) -> None:
        for errand in self._awaiting.failed(ref):
            self._fail(errand.job, trouble(error))
        for sequence in [s for s in self._scheduler.sequences() if s.adapter == ref and not s.pages]:
            self._underway.remove(sequence.id)
            self._fail(sequence.id, trouble(error))

    def _guarded(self, job: int, work: Callable[[], None]) -> None:
        """Do a part of the request `job`; what goes wrong ends this request alone."""
        try:
            work()
        except PersonaError as error:
            self._fail(job, error)
        except ConnectionError:  # the service is gone
            raise
        except OSError as error:  # an adapter to go on from that cannot be read now
            self._fail(job, trouble(error))
        except (RuntimeError, MemoryError) as error:  # an adapter that does not fit
            log.error("request failed", kind=type(error).__name__)
            self._fail(job, Busy("There is no memory for this request; try again later.", retry_after=10))
        except Exception as error:  # whatever it is: this request ends, the engine goes on
            log.error("request failed", kind=type(error).__name__)
            self._fail(job, EngineDown(BROKEN))

    def _stage(self, job: int, lease: Lease[Resident]) -> None:
        self._tiers.release(lease)
        self._send(protocol.Done(job))

    def _flip(self, job: int, lease: Lease[Resident]) -> None:
        self._tiers.release(lease)
        self._tiers.flip(lease.ref)
        self._scheduler.prefix.forget(lambda owner: _is_older(owner, lease.ref))
        self._send(protocol.Done(job))

    def _abort(self, job: int) -> None:
        if job in self._underway:
            self._underway.finish(job, "abort")
        elif (errand := self._awaiting.abort(job)) is not None:
            if errand.aborted is not None:
                self._send(errand.aborted)
        elif self._compiling.abort(job):
            self._send(Piece(job, Chunk("", 0, "abort")))
        else:
            self._slices.abort(job)

    def _health(self) -> Health:
        residents = self._tiers.shelf.filled
        return protocol.replace(
            self._about(),
            running=self._scheduler.running,
            waiting=self._scheduler.waiting,
            resident=len(residents),
            resident_bytes=sum(one.nbytes() for one in residents),
            adapter_pages=sum(len(lease.pages) for lease in self._tiers.shelf.leases),
            host=self._tiers.host,
            host_bytes=self._tiers.host_nbytes,
            loads=self._tiers.loads,
            disk_loads=self._tiers.reads,
            loaded_bytes=self._tiers.loaded_bytes,
            free_pages=self._scheduler.pool.available,
            cached_pages=self._scheduler.prefix.idle_pages,
            prompt_tokens=self._scheduler.prompt_tokens,
            cached_tokens=self._scheduler.cached_tokens,
            pages=self._scheduler.pool.total,
            training=self._slices.training,
            steps=self._steps,
            slices=self._slices.done,
            generated=self._underway.generated,
        )

    # --- step

    def _plan(self) -> Plan:
        self._send_away(self._admission.late())
        plan = self._scheduler.plan(admit=not self._awaiting.closes())
        self._admission.left(plan.admitted)
        for sequence in plan.refused:
            self._underway.refused(sequence.id, TooLarge(NEVER_FITS, code="context_length_exceeded"))
        return plan

    def _step(self, plan: Plan) -> None:
        sequences = [*plan.decode, *(segment.sequence for segment in plan.prefill)]
        try:
            self._compute(plan, sequences)
        except ConnectionError:  # the service is gone
            raise
        except Exception as error:  # whatever it is: these end, the engine goes on
            if fatal(error):
                raise
            log.error("step failed", rows=len(sequences), kind=type(error).__name__)
            self._underway.broken(sequences, error)

    def _compute(self, plan: Plan, sequences: list[Sequence]) -> None:
        residents = {s.id: s.lease.value if s.lease is not None else None for s in sequences}
        with self._aside():
            result = self._runner.run(plan, residents)
        self._steps += 1
        self._scheduler.advanced(plan)
        self._underway.deliver(sequences, result)

    def _fail(self, job: int, error: PersonaError) -> None:
        self._send(failed(job, error))


def _is_older(owner: Owner, ref: AdapterRef) -> bool:
    """Whether `owner` is another version of the same user; what was computed on the bare base stays."""
    return owner.user_id == ref.user_id and owner.adapter is not None and owner.adapter != ref
