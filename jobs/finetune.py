"""The recipe: new history → examples → candidate → gate → live conversations → pointer → flip.

Whatever fails, the run ends with one recorded sentence and the version that served goes on serving. A candidate is
durable before it is judged and serves only after the gate kept it; one that is not kept loses its files. A run looks at
history up to one entry, so that after a stop it finds the same examples and its training goes on from its checkpoint.
"""

import asyncio
import math
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import msgspec
import structlog

from jobs import dataset, evaluate, live, plans, recovery, retention
from jobs.candidates import Candidates, reject
from jobs.rehearsal import Rehearsal
from persona.domain import ChatTokenizer, EntryId, Run, RunState, User, UserId, Version, VersionState
from persona.engine.faces import Engine
from persona.engine.protocol import AdapterRef, Progress, TrainRequest, ref
from persona.errors import AdapterError, Busy, EngineDown, NotFound, PersonaError, TooLarge, TrainingFailed
from persona.settings import Settings
from storage.adapters import Adapters
from storage.history import History
from storage.runs import ExampleRow, Runs
from storage.users import Users
from storage.whole import whole

log = structlog.get_logger()

WARM_SECONDS = 10.0  # that a version which was kept waits for idle time before it serves
ENTRIES = 20_000  # newest ones that a run looks at; max_run_tokens reaches far less far back


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a run will end. A `candidate` with state KEPT has still to be put into service."""

    state: RunState
    reason: str
    candidate: Version | None = None
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Made:
    """What a training wrote, and what is to be known of any version that is made of it."""

    whole_way: Path
    half_way: Path
    watermark: EntryId
    parent: int | None
    metrics: dict[str, Any]
    plan: dict[str, Any]


class Finetune:
    """Runs one training run at a time. `progress` tells of those under way, by user."""

    def __init__(
        self,
        settings: Settings,
        users: Users,
        history: History,
        adapters: Adapters,
        runs: Runs,
        engine: Engine,
        tokenizer: ChatTokenizer,
        base_hash: Callable[[], str],
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._users = users
        self._history = history
        self._adapters = adapters
        self._runs = runs
        self._engine = engine
        self._tokenizer = tokenizer
        self.base_hash = base_hash
        self.clock = clock
        self.rehearsal = Rehearsal(engine, tokenizer, settings, base_hash)
        self._prior = plans.prior(settings.learning)  # before a first version
        self.progress: dict[UserId, Progress] = {}
        self.warm: Callable[[User, Version], Awaitable[None]] = _nothing  # what happens before a version serves
        self._about_to_serve: dict[UserId, Version] = {}
        self._leaving = False

    def leave(self) -> None:
        """The service stops: a run that is cancelled from now on waits for the next start."""
        self._leaving = True

    async def run(self, run: Run) -> Run:
        """Carry out a queued run; returns it as it ended. Cancelled, it ends as interrupted and says so, or waits.

        Raises NotFound if the user was forgotten meanwhile.
        """
        try:
            return await self._carry_out(run)
        finally:
            self.progress.pop(run.user_id, None)
            self._about_to_serve.pop(run.user_id, None)

    async def _carry_out(self, run: Run) -> Run:
        try:
            last = await self._history.last_id(run.user_id)
            run = await whole(self._runs.start(run.id, self.clock(), last))
            outcome = await self._attempt(run)
        except asyncio.CancelledError:
            await whole(self._cut(run))
            raise
        return await whole(self._close(run, outcome))

    async def _cut(self, run: Run) -> Run:
        if not self._leaving:
            if (candidate := self._about_to_serve.pop(run.user_id, None)) is not None:
                await reject(self._adapters, candidate)
            stopped = "The run was stopped; the serving version is unchanged."
            return await self._close(run, _Outcome(RunState.INTERRUPTED, stopped))
        log.info("← finetune until the next start", run=run.id)
        return await self._runs.requeue(run.id, recovery.WAITS)

    async def _attempt(self, run: Run) -> _Outcome:
        try:
            return await self._learn(run)
        except (TrainingFailed, TooLarge) as error:
            return _Outcome(RunState.FAILED, error.message)
        except NotFound:
            sentence = "The history or the version changed while this run was training."
            return _Outcome(RunState.FAILED, sentence, metrics={"again": True})
        except Busy as error:
            state = RunState.FAILED if isinstance(error, EngineDown) else RunState.DEFERRED
            return _Outcome(state, error.message, metrics={"again": True})
        except PersonaError as error:  # the disk is full, a file is damaged: nothing is wrong with the text
            return _Outcome(RunState.FAILED, error.message, metrics={"again": True})
        except Exception as error:  # the worker goes on, whatever one user's run meets
            log.error("run failed unexpectedly", run=run.id, error=type(error).__name__, at=_place(error))
            return _Outcome(RunState.FAILED, f"An unexpected {type(error).__name__} ended the run.")

    async def _learn(self, run: Run) -> _Outcome:
        user = await self._user(run.user_id)
        if obstacle := self._obstacle(user):
            return _Outcome(RunState.DEFERRED, obstacle, metrics={"again": True})
        serving = await self._serving(user)
        start = serving if serving is not None and self._continues(serving) else None
        kept = await self._adapters.checkpoint(user.id, run.id)  # before the look: who deletes an entry takes it away
        data = await self._dataset(user, start, _through(run))
        if isinstance(data, dataset.Deferred):
            return _Outcome(RunState.DEFERRED, data.reason)
        log.info("→ finetune", user=user.name, run=run.id, examples=len(data.examples), new_tokens=data.new_tokens)
        async with self._workspace(user.id) as whole_way, self._workspace(user.id) as half_way:
            made = await self._train(run, kept, start, serving, data, (whole_way, half_way))
            candidate, verdict = await self._judge(run, made, serving, data)
        metrics = {**verdict.metrics(), "examples": len(data.examples), "new_tokens": data.new_tokens}
        state = RunState.KEPT if verdict.keep else RunState.REJECTED
        return _Outcome(state, verdict.reason, candidate, metrics)

    async def _user(self, user_id: UserId) -> User:
        user = await self._users.by_id(user_id)
        if user is None:
            raise NotFound("There is no such user.")
        return user

    def _obstacle(self, user: User) -> str | None:
        if not self._settings.learning.enabled:
            return "Learning is switched off; the setting is learning.enabled."
        return None if user.learn and not user.paused else "Learning is paused or off for this user."

    async def _serving(self, user: User) -> Version | None:
        """The version that answers; one of another base sleeps, and the bare base answers."""
        active = await self._adapters.active(user.id)
        return active if active is not None and active.base == self.base_hash() else None

    def _continues(self, version: Version) -> bool:
        """Whether training may go on from `version`: only one of the same shape, trained here on its user's words."""
        return version.metrics.get("shape") == plans.shape(plans.plan(self._settings.learning, 1))

    async def _dataset(self, user: User, start: Version | None, through: EntryId) -> dataset.Dataset | dataset.Deferred:
        entries = await self._history.recent(user.id, EntryId(0), exclude=(), limit=ENTRIES, through=through)
        watermark = start.watermark if start else EntryId(0)
        return await asyncio.to_thread(
            dataset.build,
            [entry for entry in entries if entry.id > watermark],
            replay=[entry for entry in entries if entry.id <= watermark],
            seen=await self._seen(user),
            tokenizer=self._tokenizer,
            settings=self._settings.learning,
            system=self._settings.prompt.system,
            longest=await self._context(),
        )

    async def _context(self) -> int:
        """Tokens that one sequence may have."""
        return min(self._settings.engine.context, (await self._engine.health()).context)

    async def _seen(self, user: User) -> EntryId:
        """The last entry that any version which may serve on this base has absorbed."""
        versions = await self._adapters.list(user.id)
        mine = [v for v in versions if v.state is VersionState.PUBLISHED and v.base == self.base_hash()]
        return max((version.watermark for version in mine), default=EntryId(0))

    async def _train(
        self,
        run: Run,
        kept: Path,
        start: Version | None,
        serving: Version | None,
        data: dataset.Dataset,
        out: tuple[Path, Path],
    ) -> "_Made":
        """What was trained, in two workspaces. Its examples are on record first: who deletes one finds this run."""
        rows = [
            ExampleRow(sample.entry_id, sample.frame, len(sample.example.tokens), sample.example.weight)
            for sample in data.examples
        ]
        await self._runs.set_examples(run.id, rows)
        first = ref(start) if start else self._prior
        own = [sample.example for sample in data.examples]
        wanted = plans.plan(self._settings.learning, data.passes, first, own)
        rehearsed = await self.rehearsal.examples(own, data.watermark)
        whole_way, half_way = map(str, out)
        request = TrainRequest([*own, *rehearsed], wanted, whole_way, first, str(kept), half_way)
        try:
            last = await self._follow(run, request)
        except AdapterError:
            if start is not None:  # the next run starts from the version before
                await self._adapters.quarantine(start.user_id, start.number, "The engine refused its file.")
                log.error("version is corrupt and quarantined", run=run.id, version=start.number)
            raise
        metrics = {
            "shape": plans.shape(wanted),
            "steps": last.steps,
            "skipped": last.skipped,
            "training_loss": last.loss,
            **_compared(run, serving),
        }
        return _Made(*out, data.watermark, start.number if start else None, metrics, msgspec.to_builtins(wanted))

    @asynccontextmanager
    async def _workspace(self, user_id: UserId) -> AsyncIterator[Path]:
        """A folder to write a candidate into; whatever is not published from it is given up."""
        folder = await self._adapters.workspace(user_id)
        try:
            yield folder
        finally:
            await asyncio.shield(self._adapters.discard(folder))

    async def _follow(self, run: Run, request: TrainRequest) -> Progress:
        """Train to the end; returns the last progress."""
        steps = cast(AsyncGenerator[Progress], self._engine.train(request))
        async with aclosing(steps):
            async for progress in steps:
                if run.user_id not in self.progress and run.reason is not None:
                    log.info("→ finetune after a stop", run=run.id, from_step=progress.resumed, steps=progress.steps)
                self.progress[run.user_id] = progress
                if progress.done:
                    return _finite(progress)
        raise TrainingFailed("The engine ended the training without a result.")

    async def _judge(
        self, run: Run, made: "_Made", serving: Version | None, data: dataset.Dataset
    ) -> tuple[Version, evaluate.Verdict]:
        """The best of the candidates, and the gate's verdict on it. Whatever is not kept loses its files."""
        gate = evaluate.Gate(
            self._engine,
            self._tokenizer,
            serving=serving,
            held_out=data.held_out,
            recent=data.recent,
            rehearsal=self.rehearsal,
            settings=self._settings,
            context=await self._context(),
        )
        async with Candidates(self._adapters, self._engine, gate) as candidates:
            if not (await candidates.judge(await self._publish(run, made), "What was trained")).keep:
                await candidates.judge(await self._publish(run, made, half=True), "Half of it")
            if made.parent is None and self._prior is not None and not _is(serving, self._prior):
                await candidates.judge(await self._adopted(run, self._prior, serving), "The prior")
            best, verdict = candidates.best()
            if verdict.keep:
                await self._warmed(best)
            await self._still_wanted(best, serving)
            if verdict.keep:
                candidates.spare(best)
                self._about_to_serve[run.user_id] = best
        return best, verdict

    async def _publish(self, run: Run, made: "_Made", *, half: bool = False) -> Version:
        """A durable candidate."""
        return await self._adapters.publish(
            run.user_id,
            made.half_way if half else made.whole_way,
            watermark=made.watermark,
            parent=made.parent,
            base=self.base_hash(),
            run_id=run.id,
            metrics={**made.metrics, "half": half},
            plan=made.plan,
        )

    async def _adopted(self, run: Run, prior: AdapterRef, serving: Version | None) -> Version:
        """The prior as a candidate of its own, which has absorbed nothing: training must not make it worse."""
        async with self._workspace(run.user_id) as folder:
            await asyncio.to_thread(plans.copy, prior, folder)
            return await self._adapters.publish(
                run.user_id,
                folder,
                watermark=EntryId(0),
                parent=None,
                base=self.base_hash(),
                run_id=None,
                metrics={"prior": True, **_compared(run, serving)},
                plan={},
            )

    async def _warmed(self, candidate: Version) -> None:
        """Give the engine time to read live conversations under the candidate, before it serves: idle time only."""
        user = await self._user(candidate.user_id)
        try:
            async with asyncio.timeout(WARM_SECONDS):
                await self.warm(user, candidate)
        except (TimeoutError, PersonaError) as error:  # their next replies begin a little later
            log.info("live conversations are not all read", user=user.name, kind=type(error).__name__)

    async def _still_wanted(self, candidate: Version, serving: Version | None) -> None:
        """Raises TrainingFailed if the user paused, rolled back or was given another base while the run went on."""
        user = await self._user(candidate.user_id)
        if obstacle := self._obstacle(user):
            raise TrainingFailed(obstacle)
        now = await self._serving(user)
        if (now.number if now else None) != (serving.number if serving else None) or candidate.base != self.base_hash():
            raise TrainingFailed("Another version began to serve while this run was training.")

    async def _close(self, run: Run, outcome: _Outcome) -> Run:
        """Record the end of a run; then nobody goes on from its state any more."""
        try:
            ended = await self._end(run, outcome)
        except NotFound:  # nobody is there any more who learned it
            await self._adapters.drop_checkpoint(run.user_id, run.id)
            raise
        await self._adapters.drop_checkpoint(run.user_id, run.id)
        return ended

    async def _end(self, run: Run, outcome: _Outcome) -> Run:
        if outcome.state is RunState.KEPT and outcome.candidate is not None:
            outcome = await self._swap(outcome, outcome.candidate)
        number = outcome.candidate.number if outcome.candidate else None
        metrics = {**outcome.metrics, "through": _through(run), "base": self.base_hash()}
        reason = outcome.reason + _after_stop(run, self.progress.get(run.user_id))
        ended = await self._runs.end(run.id, outcome.state, reason, self.clock(), version=number, metrics=metrics)
        log.info("← finetune", run=run.id, state=ended.state.value, version=ended.version, reason=ended.reason)
        return ended

    async def _swap(self, outcome: _Outcome, candidate: Version) -> _Outcome:
        """Commit the pointer, then tell the engine. An engine that misses the flip loads the version by need."""
        user = await self._user(candidate.user_id)
        try:
            await self._adapters.point(user.id, candidate.number, after=candidate.metrics[live.BEFORE])
        except PersonaError as error:
            await reject(self._adapters, candidate)
            sentence = f"The version could not be put into service: {error.message}"
            # Whoever went back meanwhile does not want the same run once more.
            return _Outcome(RunState.FAILED, sentence, metrics={"again": not isinstance(error, TrainingFailed)})
        try:
            await self._engine.flip(ref(candidate))
        except PersonaError as error:
            log.warning("flip failed", user=user.name, version=candidate.number, error=type(error).__name__)
        await retention.prune(self._adapters, user, self._settings.learning.keep_versions)
        return outcome


async def _nothing(user: User, version: Version) -> None:
    pass


def _is(version: Version | None, prior: AdapterRef) -> bool:
    return version is not None and version.sha256 == prior.sha256


def _compared(run: Run, serving: Version | None) -> dict[str, int]:
    """What the live check has to know of a version: what it has not seen, and what served before it."""
    return {live.THROUGH: _through(run), live.BEFORE: serving.number if serving else 0}


def _through(run: Run) -> EntryId:
    """The last entry that a run may see: enough text has to come after it before the next verdict."""
    return EntryId(run.metrics.get("through", 0))


def _after_stop(run: Run, progress: Progress | None) -> str:
    """What became of what a run had learned when a stop cut it off, as the end of its reason."""
    if run.reason is None:
        return ""
    if progress is None:
        return " What it had learned before the service stopped was discarded."
    return f" It went on after step {progress.resumed}." if progress.resumed else " It began anew after a stop."


def _place(error: Exception) -> str:
    """Where it was raised. No message and no traceback goes to the log: they may hold user text."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"


def _finite(last: Progress) -> Progress:
    if not math.isfinite(last.loss):
        raise TrainingFailed("The training loss was not finite; nothing was published.")
    return last
