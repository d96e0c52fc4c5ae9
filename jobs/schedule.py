"""When whom to train: finds users who are due, carries out one run after another, and has live checks made beside them.

The scheduler's job only enqueues; the queue is the runs table. A jump of the clock, a missed hour or a hundred wishes
at once lead to one run a user at most: a user has at most one open run, and what a run has judged is not new any more.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta

import structlog
from apscheduler.jobstores.memory import MemoryJobStore
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from jobs import recovery
from jobs.finetune import Finetune
from jobs.live import LiveCheck
from persona.domain import EntryId, Run, RunState, User, UserId, VersionState
from persona.errors import Busy, NotFound, PersonaError, StorageFull
from persona.settings import Settings
from storage.adapters import Adapters
from storage.history import History
from storage.runs import Runs
from storage.users import Users

log = structlog.get_logger()

AGAIN = timedelta(minutes=15)  # before a run that failed for no fault of the text is tried again; then twice that
LONGEST_PAUSE = timedelta(days=1)
DOUBLINGS = 7  # until it is reached
MIND_SECONDS = 60.0  # between two looks at the clock
SLACK = timedelta(seconds=1)
PAUSE_SECONDS = 5.0  # of the worker after the database refused it


class Schedule:
    """Owns the timer and the worker; `start` and `stop` them once."""

    def __init__(
        self,
        settings: Settings,
        users: Users,
        history: History,
        adapters: Adapters,
        runs: Runs,
        finetune: Finetune,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        hourly: Callable[[], Awaitable[None]] | None = None,
        live: LiveCheck | None = None,
    ) -> None:
        self._hourly = hourly
        self._live = live
        self._watcher: asyncio.Task[None] | None = None
        self._minder: asyncio.Task[None] | None = None
        self._learning = settings.learning
        self._users = users
        self._history = history
        self._adapters = adapters
        self._runs = runs
        self._finetune = finetune
        self._clock = clock
        self._timer: AsyncIOScheduler | None = None
        self._worker: asyncio.Task[None] | None = None
        self._current: tuple[UserId, asyncio.Task[Run]] | None = None
        self._waiting = asyncio.Event()  # a run may be in the queue
        self._ended = asyncio.Event()  # replaced whenever a run ends
        self._stopped = False
        self._checking = asyncio.Lock()

    async def start(self) -> None:
        """Call after the database was repaired; what a hard stop left of a run goes on or has ended.

        Where that cannot be stored, on a full disk say, it comes before the first run: chat does not wait for it.
        """
        recovered = await self._recovered()
        self._worker = asyncio.create_task(self._work(recovered), name="runs")
        self._waiting.set()
        if self._live is not None:
            self._watcher = asyncio.create_task(self._watch(self._live), name="live checks")
        self._timer = AsyncIOScheduler(jobstores={"default": MemoryJobStore()}, timezone=UTC)
        # However many checks were missed, in a suspend or by a jump of the clock: one makes up for all.
        self._timer.add_job(
            self.check,
            "interval",
            seconds=self._learning.check_seconds,
            next_run_time=datetime.now(UTC),
            coalesce=True,
            misfire_grace_time=None,
            max_instances=1,
        )
        if self._hourly is not None:
            often = {"hours": 1, "next_run_time": datetime.now(UTC)}
            self._timer.add_job(self._tidy, "interval", coalesce=True, misfire_grace_time=None, **often)
        self._timer.start()
        self._minder = asyncio.create_task(self._mind(self._timer), name="clock")

    async def stop(self) -> None:
        """Stop the timer, then the run under way: it goes on from its last kept step after the next start."""
        self._finetune.leave()
        if self._timer is not None:
            self._timer.pause()
            async with self._checking:  # the timer would cancel a check under way, and log it as an error
                self._timer.shutdown(wait=False)
        for task in (self._minder, self._watcher, self._worker):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self._stopped = True
        self._announce()

    def wake(self) -> None:
        """A run was requested."""
        self._waiting.set()

    async def wait(self, user_id: UserId, run_id: int) -> Run:
        """The run once it has ended. Raises NotFound, or Busy when the service stops first."""
        while True:
            ended = self._ended  # taken before the look, so that no end is missed
            run = await self._runs.get(user_id, run_id)
            if run is None:
                raise NotFound("There is no such run.")
            if run.state.ended:
                return run
            if self._stopped:
                raise Busy("The service is stopping; the run is taken up again after the next start.", retry_after=10)
            await ended.wait()

    async def cancel(self, user_id: UserId) -> None:
        """End the user's run and live check under way, if there are any, and wait until they let go of everything."""
        if self._live is not None:
            await self._live.cancel(user_id)
        await self.cancel_run(user_id)

    async def cancel_run(self, user_id: UserId) -> bool:
        """End the user's run under way, and wait until it let go of everything. Whether there was one."""
        if self._current is None or self._current[0] != user_id:
            return False
        task = self._current[1]
        task.cancel()
        await asyncio.wait([task])
        return True

    async def check(self) -> None:
        """Enqueue a run for each user who is due."""
        async with self._checking:
            await self._enqueue_due()

    async def _tidy(self) -> None:
        """What has to be done now and then. The next hour is another chance."""
        assert self._hourly is not None
        async with self._checking:
            try:
                await self._hourly()
            except Exception as error:
                log.warning("the hourly work failed", error=type(error).__name__)

    async def _enqueue_due(self) -> None:
        if not self._learning.enabled or self._stopped:
            return
        try:
            everybody = await self._users.all()
        except Exception as error:  # the next check comes by itself
            log.warning("check for due users failed", error=type(error).__name__)
            return
        for user in everybody:
            try:
                if await self.due(user):
                    await self._runs.request(user.id, self._clock())
                    self.wake()
            except Exception as error:  # one user's trouble is nobody else's
                log.warning("check of a user failed", user=user.name, error=type(error).__name__)

    async def due(self, user: User) -> bool:
        """Enough new own text; or less, a long time after the last run; or a version that cannot serve any more."""
        if not user.learn or user.paused:
            return False
        last = await self._runs.last(user.id)
        if last is not None and not last.state.ended:
            return False
        settled = last
        if last is not None and not _settled(last):
            runs = await self._runs.list(user.id)
            settled = next((run for run in runs if _settled(run)), None)  # after it its text was not new any more
            if not await self._ripe(user, runs[: runs.index(settled)] if settled else runs):
                return False
        return await self._enough(user, settled) or await self._lost(user, settled)

    async def _ripe(self, user: User, tried: Sequence[Run]) -> bool:
        """Whether to try again after runs without a verdict, newest first: after more text, or, where the last had bad
        luck, after a pause that grows from run to run. An end that lies ahead was before the clock was set back."""
        last, base = tried[0], self._finetune.base_hash()
        if last.state is not RunState.DEFERRED or last.metrics.get("again"):
            unlucky = sum(bool(run.metrics.get("again")) for run in tried)
            pause, age = AGAIN * 2 ** min(max(0, unlucky - 1), DOUBLINGS), self._age(last.ended)
            return not timedelta(0) <= age < min(pause, LONGEST_PAUSE)
        if last.metrics.get("base", base) != base:  # all of the history is new to this one
            return True
        more = await self._history.own_tokens(user.id, EntryId(last.metrics.get("through", 0)))
        return more >= max(1, self._learning.min_aged_tokens // 2)

    async def _enough(self, user: User, last: Run | None) -> bool:
        """Whether enough has come since the run `last`."""
        through = EntryId(last.metrics.get("through", 0)) if last else EntryId(0)
        tokens = await self._history.own_tokens(user.id, through)
        if tokens >= self._learning.min_new_tokens:
            return True
        since = (last.ended if last else None) or user.created
        old = self._age(since) >= timedelta(hours=self._learning.max_age_hours)
        return old and tokens >= self._learning.min_aged_tokens

    async def _lost(self, user: User, last: Run | None) -> bool:
        """Whether the version that `last` made cannot serve: it was deleted with an entry, or is of another base."""
        if await self._asleep(user, last):
            return True
        if last is None or last.state is not RunState.KEPT or last.version is None:
            return False
        version = await self._adapters.get(user.id, last.version)
        if version is None:
            return False
        return version.state is VersionState.DELETED or version.base != self._finetune.base_hash()

    async def _asleep(self, user: User, last: Run | None) -> bool:
        """Whether the user's version is of another base, and no run came to a verdict on this one yet."""
        active, base = await self._adapters.active(user.id), self._finetune.base_hash()
        return active is not None and active.base != base and (last is None or last.metrics.get("base") != base)

    def _age(self, moment: datetime | None) -> timedelta:
        """Since `moment`; negative after the clock was set back, which makes no text old."""
        return self._clock() - moment if moment else timedelta(0)

    async def _mind(self, timer: AsyncIOScheduler) -> None:
        """After the clock was set back, the timer would wait until it has come to where it was."""
        while True:
            await asyncio.sleep(min(MIND_SECONDS, self._learning.check_seconds))
            now = datetime.now(UTC)
            for job in timer.get_jobs():
                if job.next_run_time is not None and job.next_run_time - now > job.trigger.interval + SLACK:
                    job.modify(next_run_time=now)

    async def _watch(self, live: LiveCheck) -> None:
        """Rounds of the live check, beside the runs: a task of its own, so that neither waits for the other."""
        while True:
            try:
                await live.round(self.cancel_run)
            except Exception as error:  # the next round comes by itself
                log.warning("live checks failed", error=type(error).__name__)
            await asyncio.sleep(self._learning.check_seconds)

    async def _recovered(self) -> bool:
        try:
            await recovery.recover(self._runs, self._adapters, self._clock())
        except (StorageFull, Busy) as error:
            log.warning("what a stop left of runs waits", error=type(error).__name__)
            return False
        return True

    async def _work(self, recovered: bool) -> None:
        if not recovered:
            await self._mend(stopped=True)
        while True:
            try:
                if not await self._next():
                    await self._waiting.wait()
            except Exception as error:  # one run or one full disk must not end all learning
                log.warning("worker stumbled", error=type(error).__name__)
                await self._mend(stopped=not isinstance(error, PersonaError))

    async def _mend(self, *, stopped: bool) -> None:
        """Put right the run whose end was not stored, once that can be: here is the only worker."""
        while True:
            await asyncio.sleep(PAUSE_SECONDS)
            try:
                await recovery.recover(self._runs, self._adapters, self._clock(), stopped=stopped)
                return self._announce()
            except PersonaError:  # still full or busy
                continue
            except Exception as error:  # the next start is another chance, and others want to learn
                log.error("a run was left unfinished", error=type(error).__name__)
                return None

    async def _next(self) -> bool:
        """Carry out the oldest queued run; False if there is none."""
        self._waiting.clear()
        run = await self._runs.next()
        if run is None:
            return False
        task = asyncio.create_task(self._finetune.run(run), name=f"run {run.id}")
        self._current = (run.user_id, task)
        try:
            await self._finished(task)
        finally:
            self._current = None
            self._announce()
        return True

    @staticmethod
    async def _finished(task: "asyncio.Task[Run]") -> None:
        """Wait for `task`; its own cancellation is the end of one run, ours the end of the worker."""
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, NotFound):
            raise error

    def _announce(self) -> None:
        self._ended.set()
        self._ended = asyncio.Event()


def _settled(run: Run) -> bool:
    """Whether it came to a verdict on its text: not deferred, not stopped, not failed by the service's own fault."""
    judged = run.state in (RunState.KEPT, RunState.REJECTED, RunState.FAILED)
    return judged and not run.metrics.get("again")
