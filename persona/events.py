"""What happens to a batch of messages: read, matched to users, kept within their share, stored or refused.

Whatever is wrong with a message, it becomes a dead letter and the others of its batch are stored. Only a full or busy
disk raises: then nothing of the batch has happened, and it may be brought again.
"""

import asyncio
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import structlog

from persona import event
from persona.domain import ChatTokenizer, User, UserId
from persona.errors import Busy, NotFound, PersonaError, RequestError
from persona.event import Event, Happening, Rating, Reason, Refused, Words
from persona.settings import Mqtt
from storage.events import Arrived, Events, Letter, Outcome
from storage.users import Users

log = structlog.get_logger()

# What may be stored later, when its cause is mended. Of the rest the payload says nothing that the reason does not.
_REPLAYABLE = frozenset(Reason) - {Reason.RETAINED, Reason.RATE, Reason.TOO_LARGE, Reason.NOT_RECORDED}
_STRANGERS = 1024  # names that were looked up in vain and are not looked up again for a while
_STRANGE_SECONDS = 60.0
_BUCKETS = 4096  # users whose share is remembered
MOST_REPLAYED = 1000  # dead letters in one replay


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it arrived for the user whom its topic names, under the kind of event that it names.

    again: the broker may have delivered it before · mark: recognises it then · size: of the payload as it was sent.
    """

    user: str
    kind: str
    payload: bytes
    retained: bool = False
    again: bool = False
    mark: bytes | None = None
    size: int = 0

    @property
    def digest(self) -> bytes | None:
        """Equal for this message and its repetition."""
        if self.mark is None:
            return None
        return hashlib.sha256(b"\0".join((self.mark, self.user.encode(), self.kind.encode(), self.payload))).digest()


class Share:
    """How many events each user may still send: a bucket of `burst` that fills at `rate` a second, for any thread."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._now = rate, burst, now
        self._buckets: dict[str, tuple[float, float]] = {}  # what is left, and when that was
        self._lock = threading.Lock()

    def take(self, user: str) -> bool:
        """One event; False if the user has used the share up."""
        with self._lock:
            left = self._fill(user, 0)
            if left >= 1:
                self._fill(user, -1)
            return left >= 1

    def give_back(self, users: Iterable[str]) -> None:
        """For each event that was taken and then could not be stored."""
        with self._lock:
            for user in users:
                self._fill(user, 1)

    def _fill(self, user: str, more: int) -> float:
        now = self._now()
        left, then = self._buckets.pop(user, (float(self._burst), now))
        while len(self._buckets) >= _BUCKETS:
            del self._buckets[next(iter(self._buckets))]  # who was longest silent, and so has most of it back
        left = min(self._burst, left + max(0.0, now - then) * self._rate + more)
        self._buckets[user] = left, now
        return left


class Intake:
    """Takes events in, from any surface. `counts` says what became of them since the start, by outcome and reason."""

    def __init__(
        self, settings: Mqtt, users: Users, events: Events, tokenizer: ChatTokenizer, clock: Callable[[], datetime]
    ) -> None:
        self._settings = settings
        self._users = users
        self._events = events
        self._tokenizer = tokenizer
        self._clock = clock
        self._share = Share(settings.events_per_second, settings.burst)
        self._strangers: dict[str, tuple[Reason, float]] = {}
        self._half: frozenset[bytes] = frozenset()  # deliveries of a batch that was stored in part
        self.counts: Counter[str] = Counter()

    def outcomes(self) -> dict[str, int]:
        """Messages since the start by what became of them."""
        return {outcome: self.counts[outcome] for outcome in Outcome}

    def reasons(self) -> dict[str, int]:
        """Refused messages since the start by reason."""
        return {reason: self.counts[reason] for reason in Reason}

    async def removed(self, user_id: UserId, numbers: Sequence[int] | None) -> None:
        """Somebody may have been forgotten: from now on their name means that."""
        self._strangers.clear()

    async def accept(self, deliveries: Sequence[Delivery]) -> list[Outcome]:
        """Store a batch in its order; what became of each. Raises StorageFull or Busy: bring it again."""
        now = self._clock()
        people = await self._people(deliveries)
        again = deliveries
        if self._half:
            again = [replace(one, again=one.again or one.digest in self._half) for one in deliveries]
        arrived = await asyncio.to_thread(lambda: [self._arrived(one, people, now) for one in again])
        try:
            outcomes = await self._store(arrived, now)
        except PersonaError:
            self._share.give_back(one.user for one in arrived if _shared(one))
            raise
        except Exception as error:
            log.error("batch of events failed", events=len(arrived), kind=type(error).__name__)
            outcomes = await self._one_by_one(arrived, now)
        if self._half:  # of another batch, perhaps, which is still to come again
            self._half -= {one.delivery for one in arrived if one.delivery}
        self._count(arrived, outcomes)
        return outcomes

    async def _one_by_one(self, arrived: Sequence[Arrived], now: datetime) -> list[Outcome]:
        """Of a batch that failed for no known reason: one message at a time, so that the others get through. What was
        stored before it ends with StorageFull or Busy is known when the batch is brought again."""
        outcomes: list[Outcome] = []
        try:
            for one in arrived:
                outcomes += [await self._alone(one, now)]
        except PersonaError:
            self._half |= {one.delivery for one in arrived[: len(outcomes)] if one.delivery}
            self._share.give_back(one.user for one in arrived[len(outcomes) :] if _shared(one))
            raise
        return outcomes

    async def shed(self, dropped: Counter[str]) -> None:
        """Note messages of QoS 0, by user, that found no room to wait."""
        if not dropped:
            return
        now = self._clock()
        people = await self._found(dropped)
        letters = [await self._shed(name, count, people.get(name), now) for name, count in dropped.items()]
        await self._store([Arrived(letter.user_id, letter) for letter in letters], now)
        self.counts["dead"] += dropped.total()
        self.counts[Reason.OVERFLOW] += dropped.total()

    async def _shed(self, name: str, count: int, user: User | None, now: datetime) -> Letter:
        if user is None and name and await self.stranger(name) is Reason.FORGOTTEN:
            return replace(Letter.anonymous(Reason.FORGOTTEN, now), count=count)
        sentence = "More messages of QoS 0 were waiting than mqtt.qos0_waiting allows."
        return Letter(user.id if user else None, name, "", "", Reason.OVERFLOW, sentence, None, now, count)

    async def send(self, user: User, kind: str, payload: bytes, *, learn: bool) -> Outcome:
        """One event of a user who is known, as over HTTP. Raises RequestError or Busy in place of a dead letter.

        learn: whether what they say becomes history.
        """
        if not self._share.take(user.name):
            sentence = "This user sends more events than mqtt.events_per_second allows; try again in a moment."
            raise Busy(sentence, status=429, code="rate_limited")
        now = self._clock()
        try:
            one = self._event(user, kind, payload, now, learn=learn)
        except Refused as refusal:
            raise RequestError(refusal.detail, code=refusal.reason) from None
        arrived = [Arrived(user.id, one, user.name, payload)]
        try:
            outcome = (await self._events.store(arrived, count=self._tokens, now=now, kept=None))[0]
        except PersonaError:
            self._share.give_back([user.name])
            raise
        self._count(arrived, [outcome])
        if outcome is Outcome.DEAD and not isinstance(one.body, Rating):
            raise RequestError("The text is empty.", code=Reason.BAD_PAYLOAD)
        if outcome is Outcome.DEAD:
            raise NotFound("There is no such reply of this user.", code=Reason.UNKNOWN_TURN)
        return outcome

    async def replay(self, letters: Sequence[Letter]) -> Counter[str]:
        """Try dead letters again: what is stored now, or known already, leaves the dead. Counts by outcome.

        Letters without a payload stay: there is nothing to replay.
        """
        whole = [letter for letter in letters if letter.payload is not None][:MOST_REPLAYED]
        now = self._clock()
        people = await self._found({letter.name for letter in whole})
        results: Counter[str] = Counter()
        done = []
        for letter in whole:
            outcome = await self._again(letter, people.get(letter.name), now)
            results[outcome] += 1
            if outcome is not Outcome.DEAD:
                done.append(letter.id)
        if done:
            await self._events.drop_letters(done)
        results["without_payload"] = sum(letter.payload is None for letter in letters)
        return results

    async def _again(self, letter: Letter, user: User | None, now: datetime) -> Outcome:
        assert letter.payload is not None
        if user is None:
            return Outcome.DEAD
        try:
            one = self._event(user, letter.kind, letter.payload, letter.first or now, learn=user.learn)
        except Refused:
            return Outcome.DEAD
        once = hashlib.sha256(b"letter\0%d" % letter.id).digest()  # ids of letters are never given twice
        mine = Arrived(user.id, one, user.name, letter.payload, delivery=once, again=True)
        return (await self._events.store([mine], count=self._tokens, now=now, kept=None))[0]

    async def _people(self, deliveries: Sequence[Delivery]) -> dict[str, User | Reason]:
        """Who each name is, or why it is nobody."""
        names = {one.user for one in deliveries}
        found: dict[str, User | Reason] = {**await self._found(names)}
        for name in names - found.keys():
            found[name] = await self.stranger(name)
        return found

    async def stranger(self, name: str) -> Reason:
        """Why nobody has this name; ask only if nobody does. Looking is slow on purpose: the answer holds a minute."""
        reason, until = self._strangers.get(name, (Reason.UNKNOWN_USER, 0.0))
        if until < time.monotonic():
            reason = Reason.FORGOTTEN if await self._users.forgotten(name) else Reason.UNKNOWN_USER
            if len(self._strangers) >= _STRANGERS:
                self._strangers.clear()
            self._strangers[name] = reason, time.monotonic() + _STRANGE_SECONDS
        return reason

    async def forgotten(self, name: str) -> bool:
        """Whether whoever had this name was forgotten, and nobody has it now."""
        return not await self._found([name]) and await self.stranger(name) is Reason.FORGOTTEN

    async def _found(self, names: Iterable[str]) -> dict[str, User]:
        return {user.name: user for user in await self._users.named(names)}

    def _arrived(self, one: Delivery, people: dict[str, User | Reason], now: datetime) -> Arrived:
        who = people[one.user]
        user = who if isinstance(who, User) else None
        try:
            return Arrived(
                user.id if user else None, self._judged(one, who, now), one.user, one.payload, one.digest, one.again
            )
        except Refused as refusal:
            if refusal.reason is Reason.FORGOTTEN:
                return Arrived(None, Letter.anonymous(Reason.FORGOTTEN, now))
            payload = one.payload if refusal.reason in _REPLAYABLE else None
            user_id = user.id if user else None
            letter = Letter(user_id, one.user, one.kind, "", refusal.reason, refusal.detail, payload, now)
            return Arrived(user_id, letter, one.user, delivery=one.digest, again=one.again)

    def _judged(self, one: Delivery, who: User | Reason, now: datetime) -> Event:
        if who is Reason.FORGOTTEN:  # before anything else: whatever arrives, their name is not written down
            raise Refused(Reason.FORGOTTEN, "")
        if one.retained:
            raise Refused(Reason.RETAINED, "A stored copy that the broker replays is no news; do not publish retained.")
        if not isinstance(who, User):
            raise Refused(Reason.UNKNOWN_USER, "There is no user of this name; `persona users add NAME` makes one.")
        if not self._share.take(who.name):
            raise Refused(Reason.RATE, "More events than mqtt.events_per_second and mqtt.burst allow.")
        if one.size > len(one.payload):
            raise Refused(Reason.TOO_LARGE, f"The payload has more than {self._settings.max_payload} bytes.")
        return self._event(who, one.kind, one.payload, now, learn=who.learn)

    def _event(self, user: User, kind: str, payload: bytes, received: datetime, *, learn: bool) -> Event:
        try:
            one = event.read(user.name, kind, payload, received, self._settings.max_payload)
        except Refused:
            raise
        except Exception as error:  # or the broker would bring it again and again, and nothing after it
            log.error("event cannot be read", user=user.name, kind=type(error).__name__)
            raise Refused(Reason.INTERNAL, f"Reading it failed with {type(error).__name__}.") from None
        if isinstance(one.body, Words | Happening | Rating) and not learn:
            raise Refused(Reason.NOT_RECORDED, "This user does not learn: only facts and states are taken.")
        return one

    async def _store(self, arrived: Sequence[Arrived], now: datetime) -> list[Outcome]:
        kept = self._settings.kept_payloads
        return await self._events.store(arrived, count=self._tokens, now=now, kept=kept)

    async def _alone(self, one: Arrived, now: datetime) -> Outcome:
        try:
            return (await self._store([one], now))[0]
        except PersonaError:
            raise
        except Exception as error:
            kind = one.content.kind
            sentence = f"Storing it failed with {type(error).__name__}."
            letter = Letter(one.user_id, one.user, kind, "", Reason.INTERNAL, sentence, one.payload, now)
            told = Arrived(one.user_id, letter, one.user, delivery=one.delivery, again=one.again)
            return (await self._store([told], now))[0]

    def _count(self, arrived: Sequence[Arrived], outcomes: Sequence[Outcome]) -> None:
        for one, outcome in zip(arrived, outcomes, strict=True):
            self.counts[outcome] += 1
            if isinstance(one.content, Letter):
                self.counts[one.content.reason] += 1

    def _tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text))


def _shared(one: Arrived) -> bool:
    """Whether it was taken from its user's share."""
    free = (Reason.RETAINED, Reason.RATE)
    return one.user_id is not None and not (isinstance(one.content, Letter) and one.content.reason in free)
