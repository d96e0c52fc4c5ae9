"""Which sequences take part in the next step: pure Python over integers, no torch.

A sequence reserves pages for its prompt and its longest reply, and holds its adapter, when it is admitted, so a running
one never waits for memory; what an earlier one of the same user and version left behind is not computed again
(prefix.py). Chat goes before scoring; who is next among users says waiting.py. Every step decodes all running rows and
prefills at most `prefill_tokens` prompt tokens beside them; what is only computed for later waits for an idle step.

Where several users come, who has more than a like share leaves the last places and pages to others; and who has most of
what runs has short steps (their prompts and their replies in turn, a quarter of `prefill_tokens` for the prompts), and
while a prompt of another is computed one of 32 for their prompts, and every second one for their replies. So the others
begin soon.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol

from persona.engine.lengths import GENERATED, Lengths
from persona.engine.pages import PagePool
from persona.engine.prefix import Block, Owner, PrefixCache
from persona.engine.protocol import AdapterRef
from persona.engine.shelf import Absent, Lease, Shelf
from persona.engine.waiting import Shares, WaitingRoom

AHEAD = 64  # tokens of a silent sequence in one step
KEPT = 1 / 8  # of the running places and of the pages, the last ones: for users who have less than a like share
PROMPTS_REST = 32  # of so many steps beside prompts of others a heavy user's own prompts sit out all but one
HEAVY = 4  # sequences that a user runs, at least, who is to leave others room


@dataclass(eq=False, slots=True)
class Sequence:
    """One running request. `tokens` grows by one each decode step; `computed` of them are in the cache.

    The first `pages` are those of `blocks`, which other sequences of `owner` may use, too; without an owner there are
    none. `cached` tokens were computed by earlier sequences.
    """

    id: int
    tokens: list[int]
    prompt: int  # how many of `tokens` were given
    limit: int  # tokens it may grow to
    adapter: AdapterRef | None = None
    lease: Lease[Any] | None = None  # of the adapter, from admission on
    targets: tuple[int, ...] = ()  # positions to score; empty for chat
    top: int = 0  # alternatives that are told with each of them
    background: bool = False
    silent: bool = False  # nothing follows its prompt: it is computed for a later one, when nothing else is
    user_id: int = 0
    owner: Owner | None = None
    since: float = 0.0  # when it was asked for, by the loop's clock
    computed: int = 0
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    @property
    def prefilling(self) -> bool:
        return self.computed < self.prompt


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a prompt: tokens [start, end) of a sequence."""

    sequence: Sequence
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: these rows decode one token each, these segments are prefilled. `admitted` are new among them;
    `refused` are gone, as no memory is large enough for them and their adapters."""

    decode: list[Sequence]
    prefill: list[Segment]
    admitted: list[Sequence] = field(default_factory=list)
    refused: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Adapters(Protocol):
    """Where adapters come from: tiers.Tiers."""

    @property
    def shelf(self) -> Shelf[Any]: ...

    def hold(self, ref: AdapterRef) -> Lease[Any] | Absent: ...

    def release(self, lease: Lease[Any], *, used: bool = True) -> None: ...

    def fetch(self, ref: AdapterRef, spared: Collection[AdapterRef]) -> Absent: ...


class _Held:
    """What each user has of the running set."""

    def __init__(self, running: Collection[Sequence]) -> None:
        self.places, self.pages = Counter[int](), Counter[int]()
        for one in running:
            self.add(one)

    def add(self, one: Sequence) -> None:
        self.places[one.user_id] += 1
        self.pages[one.user_id] += len(one.pages)


class Scheduler:
    """Waiting room and running set."""

    def __init__(
        self,
        pool: PagePool,
        adapters: Adapters,
        *,
        max_running: int,
        max_waiting: int,
        prefill_tokens: int,
    ) -> None:
        self.pool, self.prefix, self._adapters = pool, PrefixCache(pool), adapters
        self.prompt_tokens = self.cached_tokens = 0  # of all that were admitted with an owner
        self._max_running, self._max_waiting, self._prefill_tokens = max_running, max_waiting, prefill_tokens
        self.shares, self._lengths = Shares(), Lengths()
        chats, background = (WaitingRoom[Sequence](shares, self._lengths) for shares in (self.shares, Shares()))
        self._waiting = chats, background
        self._running: list[Sequence] = []
        self._beside = 0  # steps in a row in which the heavy user stood beside prompts of others
        self._replied = False  # whether the heavy user's replies had the last step in which their prompts waited, too

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return sum(len(room) for room in self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    @property
    def chats(self) -> WaitingRoom[Sequence]:
        """Those that wait and are not in the background."""
        return self._waiting[0]

    def crowded(self, others: int = 0) -> bool:
        """Whether more wait than may, with `others` who wait elsewhere."""
        return len(self.chats) + others > self._max_waiting

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` can ever run on the bare base."""
        return self.pool.needed(tokens) <= self.pool.total

    def add(self, sequence: Sequence) -> None:
        if sequence.adapter is not None:
            self.expect(sequence.adapter, background=sequence.background)
        if not sequence.background:
            self.shares.come(sequence.user_id)
        self._waiting[sequence.background].add(sequence)

    def expect(self, adapter: AdapterRef, *, background: bool = False) -> None:
        """Somebody with this adapter comes: it is loaded beforehand, if their turn may be near."""
        if len(self._waiting[background]) < self._max_running:
            self._adapters.fetch(adapter, self.wanted())

    def before(self, sequence: Sequence) -> int:
        """How many of those that wait go before it."""
        return self._waiting[sequence.background].order().index(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, free its pages and let go of its adapter."""
        if sequence in self._running:
            self._running.remove(sequence)
            if not sequence.targets and not sequence.silent:
                bound, reply = (most - sequence.prompt for most in (sequence.limit, len(sequence.tokens)))
                self._lengths.ended(sequence.user_id, bound, reply)
        else:
            self._waiting[sequence.background].discard(sequence)
        if not sequence.background:
            self.shares.go(sequence.user_id)
        own = sequence.pages[len(sequence.blocks) :]
        self.prefix.release(sequence.blocks)
        self.pool.give(own)
        sequence.pages.clear()
        sequence.blocks.clear()
        if sequence.lease is not None:
            self._adapters.release(sequence.lease)
            sequence.lease = None

    def plan(self, *, admit: bool = True) -> Plan:
        """Admit who fits, then choose this step's rows. admit: or, while anything runs, leave room for what is not a
        sequence."""
        admitted, refused = list[Sequence](), list[Sequence]()
        self._adapters.shelf.expect(s.adapter for s in self._near() if s.adapter is not None)
        if (admit or not self._running) and self._admit(admitted, refused):
            self._prefetch()
        heavy = self._heavy()
        decode = [s for s in self._running if not s.prefilling]
        others = any(s.prefilling and s.user_id != heavy and not s.background for s in self._running)
        self._beside = self._beside + 1 if heavy is not None and others else 0
        segments = list(self._segments(self._prefill_tokens, heavy))
        if heavy is not None:
            prompts, replies = self._turn(heavy, decode, segments)
            segments = [one for one in segments if prompts or one.sequence.user_id != heavy]
            decode = [s for s in decode if replies or s.user_id != heavy]
        if not decode and not segments:
            segments = list(self._ahead())
        return Plan(decode, segments, admitted, refused)

    def advanced(self, plan: Plan) -> None:
        """The step of `plan` is done: pages that it filled become blocks."""
        for sequence in plan.decode:
            self._keep_blocks(sequence)
            self.shares.charge(sequence.user_id, GENERATED)
        for segment in plan.prefill:
            self._keep_blocks(segment.sequence)
            if not segment.sequence.background:
                self.shares.charge(segment.sequence.user_id, segment.end - segment.start)

    def forget(self, user_id: int, coming: Iterable[Sequence] = ()) -> None:
        """The user is dropped: nothing that was or is being computed for them, or for those that come, is found by a
        later request."""
        self.prefix.forget(lambda owner: owner.user_id == user_id)
        self._lengths.forget(user_id)
        for one in chain(self.sequences(), coming):
            if one.user_id == user_id:
                one.owner = None

    def sequences(self) -> Iterator[Sequence]:
        yield from self._running
        for room in self._waiting:
            yield from room

    def check(self) -> None:
        """Assert that no page and no lease leaked, and that every user's requests are counted."""
        everybody, shelf = list(self.sequences()), self._adapters.shelf
        for one in everybody:
            assert one.pages[: len(one.blocks)] == [block.page for block in one.blocks], "pages are not their blocks'"
        own = [one.pages[len(one.blocks) :] for one in everybody]
        self.prefix.check([one.blocks for one in everybody], [*own, *(lease.pages for lease in shelf.leases)])
        shelf.check([one.lease for one in everybody if one.lease is not None])
        self.shares.check(one.user_id for one in everybody if not one.background)

    def wanted(self) -> set[AdapterRef]:
        """The adapters of all running sequences and of those whose turn is near."""
        return {s.adapter for s in chain(self._running, self._near()) if s.adapter is not None}

    def _near(self) -> Iterator[Sequence]:
        """Those whose turn is near, in its order."""
        for room in self._waiting:
            yield from room.order(self._max_running)

    def _admit(self, admitted: list[Sequence], refused: list[Sequence]) -> bool:
        """In the order of the room. Whose adapter is still on its way is passed over; who needs more pages than are
        left, or whose adapter does, is not, or a large request would starve. Whether there was room for all."""
        held = _Held(self._running)
        for sequence in self._near():
            if len(self._running) == self._max_running:
                return True
            if self._has_enough(sequence, held):
                continue
            if sequence.adapter is not None:
                found = self._adapters.hold(sequence.adapter)
                if found is Absent.COMING:
                    continue
                if found is Absent.NO_ROOM:
                    return False
                sequence.lease = found
            if self._never_fits(sequence):
                self.remove(sequence)
                refused.append(sequence)
            elif self._reserve(sequence):
                self._waiting[sequence.background].discard(sequence)
                self._running.append(sequence)
                held.add(sequence)
                admitted.append(sequence)
            else:
                self._let_go(sequence)
                return False
        return True

    def _has_enough(self, sequence: Sequence, held: "_Held") -> bool:
        """Whether the places or pages that are left are for others than its user. A like share counts one more user
        than there are: who may come."""
        user, sharing, total = sequence.user_id, self.shares.active + 1, self.pool.total
        if not user or not held.places[user] or self.shares.alone(user):
            return False
        few = self._max_running - len(self._running) <= int(KEPT * self._max_running)
        if few and held.places[user] >= max(HEAVY, self._max_running / sharing):
            return True
        if held.pages[user] < total / sharing:
            return False
        return self.pool.available - self.pool.needed(sequence.limit) < KEPT * total

    def _heavy(self) -> int | None:
        """The user who has most of what runs, if others may want to begin."""
        users = Counter(s.user_id for s in self._running if s.user_id and not s.background)
        for user_id, count in users.most_common(1):
            if count >= HEAVY and 2 * count > len(self._running) and not self.shares.alone(user_id):
                return user_id
        return None

    def _turn(self, heavy: int, decode: list[Sequence], segments: list[Segment]) -> tuple[bool, bool]:
        """Whether prompts and replies of `heavy` have a part in this step, which has room for these. Who comes waits
        for the end of a step: so one that nobody else's prompt is in has either."""
        if self._beside:
            return self._beside % PROMPTS_REST == 0, self._beside % 2 == 0
        if not any(s.user_id == heavy for s in decode) or not any(one.sequence.user_id == heavy for one in segments):
            return True, True
        self._replied = not self._replied
        return not self._replied, self._replied

    def _prefetch(self) -> None:
        """Load the adapters of those whose turn is near, as far as there is room beside each other's."""
        wanted = self.wanted()
        for sequence in self._near():
            if sequence.adapter is not None and self._adapters.fetch(sequence.adapter, wanted) is Absent.NO_ROOM:
                return

    def _never_fits(self, sequence: Sequence) -> bool:
        own = len(sequence.lease.pages) if sequence.lease else 0
        return self.pool.needed(sequence.limit) + own > self.pool.total

    def _let_go(self, sequence: Sequence) -> None:
        if sequence.lease is not None:
            self._adapters.release(sequence.lease, used=False)
            sequence.lease = None

    def _reserve(self, sequence: Sequence) -> bool:
        """Pages for all that the sequence may become; False if there are not as many."""
        owner, prompt = sequence.owner, sequence.tokens[: sequence.prompt]
        blocks = self.prefix.match(owner, prompt) if owner else []
        pages = self.prefix.take(blocks, self.pool.needed(sequence.limit) - len(blocks))
        if pages is None:
            return False
        sequence.pages, sequence.blocks = [*(block.page for block in blocks), *pages], blocks
        sequence.computed = sequence.cached = len(blocks) * self.pool.size
        if owner:
            self.prompt_tokens += sequence.prompt
            self.cached_tokens += sequence.cached
        return True

    def _keep_blocks(self, sequence: Sequence) -> None:
        size = self.pool.size
        while sequence.owner and sequence.computed // size > (count := len(sequence.blocks)):
            before = sequence.blocks[-1] if sequence.blocks else None
            tokens = tuple(sequence.tokens[count * size : (count + 1) * size])
            block = self.prefix.keep(sequence.owner, before, tokens, sequence.pages[count])
            if block is None:  # somebody else was quicker: from here on the pages are this sequence's alone
                sequence.owner = None
            else:
                sequence.blocks.append(block)

    def _segments(self, budget: int, heavy: int | None) -> Iterator[Segment]:
        """Chat first, who has had least before others, then scoring; among equals in order of admission. The prompts of
        `heavy` have a part of the budget, which comes after other chats, but for the one step of PROMPTS_REST."""
        theirs, last = budget // 4, not self._beside or bool(self._beside % PROMPTS_REST)

        def turn(one: Sequence) -> tuple[bool, bool, float]:
            later = (one.user_id == heavy) is last
            return one.background, later, 0.0 if one.background else self.shares[one.user_id]

        for sequence in sorted((s for s in self._running if s.prefilling and not s.silent), key=turn):
            mine = heavy is not None and sequence.user_id == heavy
            if most := min(budget, theirs) if mine else budget:
                end = min(sequence.prompt, sequence.computed + most)
                budget -= end - sequence.computed
                theirs -= (end - sequence.computed) * mine
                yield Segment(sequence, sequence.computed, end)

    def _ahead(self) -> Iterator[Segment]:
        """A short piece of a prompt that nobody waits for: whoever comes meanwhile has to wait for it."""
        for sequence in self._running[:1]:
            end = sequence.computed + min(AHEAD, self._prefill_tokens)
            yield Segment(sequence, sequence.computed, min(sequence.prompt, end))
