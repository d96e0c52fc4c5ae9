"""The live check: does the version that serves predict its user better than the one before it?

Each new message that came after all that training and gate could see is scored once under both, each with the prompt
that serving would have built for it, as the gate does. A version is rolled back only when the upper end of its gain is
below zero, which may be looked at after every message (confidence.py). Serving comes first: a round is short, a busy
engine means later, and what a stop leaves unscored is scored after the next start.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby

import structlog

from jobs import dataset, evaluate, rollback
from jobs.figures import Figures, Word, figures, reason
from persona.domain import ChatTokenizer, Entry, EntryId, Role, User, UserId, Version
from persona.engine.faces import Engine
from persona.errors import AdapterError, Busy, NotFound, StorageFull, TooLarge
from persona.settings import Settings
from storage.adapters import Adapters, Leaving
from storage.history import History
from storage.live import Checked, LiveChecks
from storage.users import Users
from storage.whole import whole

log = structlog.get_logger()

# Among a version's metrics, for who looks at it while it serves:
THROUGH = "through"  # the last entry that its run could see: what judges it comes later
BEFORE = "before"  # the version that served before it, 0: the bare base

MESSAGES = 8  # scored in one round, each under two versions: at 2 ms a token half a minute at most
BESIDE_TRAINING = 1  # the same, while a run trains: it would wait for them
MOST = 500  # messages that judge one version; then the figures stand
LOOKED_AT = 2000  # of the user's messages after THROUGH

Interrupt = Callable[[UserId], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class _Case:
    """A version that serves, and the one to which it would be rolled back (None: the bare base)."""

    user: User
    version: Version
    before: Version | None

    @property
    def against(self) -> int | None:
        return self.before.number if self.before else None


class LiveCheck:
    """Looks at one user after another. `counts` says how many messages were scored and versions rolled back."""

    def __init__(
        self,
        settings: Settings,
        users: Users,
        history: History,
        adapters: Adapters,
        checks: LiveChecks,
        engine: Engine,
        tokenizer: ChatTokenizer,
        base_hash: Callable[[], str],
        clock: Callable[[], datetime],
    ) -> None:
        self._settings = settings
        self._users = users
        self._history = history
        self._adapters = adapters
        self._checks = checks
        self._engine = engine
        self._tokenizer = tokenizer
        self._base_hash = base_hash
        self._clock = clock
        self._last = UserId(0)  # whose turn came last
        self._left = 0  # messages that this round may still score
        self._done: dict[UserId, tuple[int, EntryId]] = {}  # version and entry up to which nothing waits
        self._current: tuple[UserId, asyncio.Task[None]] | None = None
        self.counts: Counter[str] = Counter(messages=0, rollbacks=0)

    async def round(self, interrupt: Interrupt) -> None:
        """Score a few new messages and draw the conclusions; the next round goes on with the next user.

        interrupt: ends a user's run under way, which trains from what is about to be left.
        """
        learning = self._settings.learning
        if not (learning.enabled and learning.live_check):
            return
        try:
            self._left = BESIDE_TRAINING if (await self._engine.health()).training else MESSAGES
            for user in await self._in_turn():
                await self._turn_of(user.id, interrupt)
                if not self._left:
                    return
        except (Busy, StorageFull):  # what is not on record is scored in another round
            return

    async def cancel(self, user_id: UserId) -> None:
        """Leave this user alone for this round, and wait until nothing of theirs is being scored."""
        if self._current is not None and self._current[0] == user_id:
            task = self._current[1]
            task.cancel()
            await asyncio.wait([task])

    async def figures(self, user_id: UserId) -> dict[int, Figures]:
        """By version, for all that were checked."""
        rows = await self._checks.list(user_id)
        found = (figures(list(mine)) for _, mine in groupby(rows, key=lambda row: row.version))
        return {one.version: one for one in found if one is not None}

    async def _in_turn(self) -> list[User]:
        """Those who have a version, beginning after the one whose turn came last."""
        having = sorted((user for user in await self._users.all() if user.active), key=lambda user: user.id)
        return [u for u in having if u.id > self._last] + [u for u in having if u.id <= self._last]

    async def _turn_of(self, user_id: UserId, interrupt: Interrupt) -> None:
        """One user's trouble is not the next one's."""
        self._last = user_id
        task = asyncio.create_task(self._check(user_id, interrupt), name="live check")
        self._current = (user_id, task)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise
        finally:
            self._current = None
        _answer_for(user_id, task)

    async def _check(self, user_id: UserId, interrupt: Interrupt) -> None:
        case = await self._case(user_id)
        if case is None:
            return
        rows = await self._checks.list(user_id, case.version.number)
        worse = await self._conclude(case, rows, interrupt)  # a stop may have come before
        waiting = [] if worse else await self._waiting(case, rows)
        for entry in waiting[: self._left]:
            self._left -= 1
            rows.append(await self._score(case, entry))
            if await self._conclude(case, rows, interrupt):
                return

    async def _case(self, user_id: UserId) -> _Case | None:
        """What there is to judge. None too for who paused, does not learn, or chose the version by hand."""
        user = await self._users.by_id(user_id)
        if user is None or user.paused or not user.learn:
            return None
        versions = {version.number: version for version in await self._adapters.list(user_id)}
        serving = versions.get(user.active or 0)
        if serving is None or THROUGH not in serving.metrics or not self._judged(serving):
            return None
        if any(number > serving.number and self._judged(other) for number, other in versions.items()):
            return None  # its user went back to it
        before = versions.get(serving.metrics.get(BEFORE, 0))
        return _Case(user, serving, before if before is not None and self._judged(before) else None)

    def _judged(self, version: Version) -> bool:
        """Whether it may serve, and was not found worse."""
        return rollback.can_serve(version, self._base_hash()) and not version.rolled_back

    async def _waiting(self, case: _Case, rows: Sequence[Checked]) -> list[Entry]:
        """The messages that are still to be scored, oldest first: in this order none is left out."""
        if sum(row.tokens > 0 for row in rows) >= MOST:
            return []
        through = EntryId(case.version.metrics[THROUGH])
        last = rows[-1].entry_id if rows else through
        said = await self._history.since(case.user.id, through, limit=LOOKED_AT, roles=[Role.USER])
        newest = (case.version.number, said[-1].id if said else last)
        if newest[1] <= last or newest == self._done.get(case.user.id):
            return []
        learning = self._settings.learning
        may = await asyncio.to_thread(dataset.judging, said, tokenizer=self._tokenizer, settings=learning)
        waiting = [entry for entry in said if entry.id > last and entry.id in may]
        if not waiting:
            self._done[case.user.id] = newest
        return waiting

    async def _score(self, case: _Case, entry: Entry) -> Checked:
        """Score one message under both and put it on record."""
        try:
            scorer = await self._scorer(entry)
            serving, before = [await self._loss(scorer, version) for version in (case.version, case.before)]
        except TooLarge:
            serving = before = evaluate.Loss(0.0, 0)
        tokens = serving.tokens if serving.tokens == before.tokens else 0  # cut to fit, but not alike
        checked = Checked(case.version.number, case.against, entry.id, tokens, serving.nats, before.nats)
        if not await self._checks.add(case.user.id, checked, self._clock()):
            raise NotFound("The message or the version is gone.")
        self.counts["messages"] += 1
        return checked

    async def _scorer(self, entry: Entry) -> evaluate.Scorer:
        """For this message alone, as the gate would score it."""
        through, settings = EntryId(entry.id - 1), self._settings
        said = await self._history.recent(
            entry.user_id, EntryId(0), exclude=(), limit=dataset.LOOKBACK, through=through
        )
        message, recent = await asyncio.to_thread(
            dataset.message, entry, said, tokenizer=self._tokenizer, settings=settings.learning
        )
        context = min(settings.engine.context, (await self._engine.health()).context)
        return evaluate.Scorer(self._engine, self._tokenizer, [message], recent, settings, context)

    async def _loss(self, scorer: evaluate.Scorer, version: Version | None) -> evaluate.Loss:
        """Under a version; one whose file the engine refuses is quarantined, and the error goes on."""
        try:
            (loss,) = await scorer.messages(evaluate.side(version))
        except AdapterError:
            if version is not None:
                await self._adapters.quarantine(version.user_id, version.number, "The engine refused its file.")
            raise
        return loss

    async def _conclude(self, case: _Case, rows: Sequence[Checked], interrupt: Interrupt) -> bool:
        """Roll back if the figures say so; whether they do."""
        found = figures([row for row in rows if row.against == case.against])
        if found is None or found.word is not Word.WORSE:
            return False
        await whole(self._roll_back(case, found, interrupt))
        return True

    async def _roll_back(self, case: _Case, found: Figures, interrupt: Interrupt) -> None:
        await interrupt(case.user.id)
        leaving = Leaving(case.version.number, reason(found))
        await rollback.go_back(self._engine, self._adapters, case.user.id, case.before, leaving=leaving)
        self.counts["rollbacks"] += 1
        log.warning(
            "version rolled back by the live check",
            user=case.user.name,
            version=case.version.number,
            to=case.against or 0,
            messages=found.messages,
            gain=round(found.gain.mean, 3),
            at_most=round(found.gain.upper, 3),
        )


def _answer_for(user_id: UserId, task: "asyncio.Task[None]") -> None:
    """Log what went wrong with one user; raises what concerns every user."""
    error = None if task.cancelled() else task.exception()
    if isinstance(error, Busy | StorageFull):
        raise error
    if error is not None and not isinstance(error, NotFound):  # what was deleted meanwhile is no trouble
        log.warning("live check failed", user_id=user_id, error=type(error).__name__)
