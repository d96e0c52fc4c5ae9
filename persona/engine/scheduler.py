"""Which sequences take part in the next step: pure Python over integers, no torch.

A sequence reserves pages for its prompt and its longest reply when it is admitted, so a running one never waits for
memory; what an earlier one of the same user and version left behind is not computed again (prefix.py). Chat goes
before scoring; who is next among users says waiting.py. Every step decodes all running rows and prefills at most
`prefill_tokens` prompt tokens beside them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from persona.engine.pages import PagePool
from persona.engine.prefix import Block, Owner, PrefixCache
from persona.engine.protocol import AdapterRef
from persona.engine.waiting import GENERATED, Shares, WaitingRoom


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
    targets: tuple[int, ...] = ()  # positions to score; empty for chat
    top: int = 0  # alternatives that are told with each of them
    background: bool = False
    user_id: int = 0
    owner: Owner | None = None
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
    """One step: these rows decode one token each, these segments are prefilled. `admitted` are new among them."""

    decode: list[Sequence]
    prefill: list[Segment]
    admitted: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Scheduler:
    """Waiting room and running set."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_running: int,
        max_waiting: int,
        prefill_tokens: int,
        ready: Callable[[AdapterRef], bool] = lambda ref: True,
    ) -> None:
        """ready: whether the adapter is on the device; if not, it is on its way from then on."""
        self._ready = ready
        self.pool, self.prefix = pool, PrefixCache(pool)
        self.prompt_tokens = self.cached_tokens = 0  # of all that were admitted with an owner
        self._max_running, self._max_waiting, self._prefill_tokens = max_running, max_waiting, prefill_tokens
        self.shares = Shares()
        self._waiting = WaitingRoom[Sequence](self.shares), WaitingRoom[Sequence](Shares())  # chat, background
        self._running: list[Sequence] = []

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return sum(len(room) for room in self._waiting)

    @property
    def idle(self) -> bool:
        return not self.running and not self.waiting

    def full(self) -> bool:
        return len(self._waiting[0]) >= self._max_waiting

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of `tokens` can ever run."""
        return self.pool.needed(tokens) <= self.pool.total

    def add(self, sequence: Sequence) -> None:
        room = self._waiting[sequence.background]
        room.add(sequence)
        if not sequence.background:
            self.shares.come(sequence.user_id)
        if sequence.adapter is not None and len(room) <= self._max_running:
            self._ready(sequence.adapter)

    def give_way(self, user_id: int) -> Sequence | None:
        """Who should leave a full waiting room for a request of this user; None: nobody, it is fairly full."""
        return self._waiting[0].last_of_the_greediest(user_id)

    def before(self, sequence: Sequence) -> int:
        """How many of those that wait go before it."""
        return self._waiting[sequence.background].order().index(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting[sequence.background].discard(sequence)
        if not sequence.background:
            self.shares.go(sequence.user_id)
        own = sequence.pages[len(sequence.blocks) :]
        self.prefix.release(sequence.blocks)
        self.pool.give(own)
        sequence.pages.clear()
        sequence.blocks.clear()

    def plan(self) -> Plan:
        """Admit who fits, then choose this step's rows."""
        admitted = list(self._admit())
        decode = [s for s in self._running if not s.prefilling]
        return Plan(decode, list(self._segments(self._prefill_tokens)), admitted)

    def advanced(self, plan: Plan) -> None:
        """The step of `plan` is done: pages that it filled become blocks."""
        for sequence in plan.decode:
            self._keep_blocks(sequence)
            self.shares.charge(sequence.user_id, GENERATED)
        for segment in plan.prefill:
            self._keep_blocks(segment.sequence)
            if not segment.sequence.background:
                self.shares.charge(segment.sequence.user_id, segment.end - segment.start)

    def sequences(self) -> Iterator[Sequence]:
        yield from self._running
        for room in self._waiting:
            yield from room

    def check(self) -> None:
        """Assert that no page leaked."""
        everybody = list(self.sequences())
        for one in everybody:
            assert one.pages[: len(one.blocks)] == [block.page for block in one.blocks], "pages are not their blocks'"
        self.prefix.check([one.blocks for one in everybody], [one.pages[len(one.blocks) :] for one in everybody])

    def wanted(self) -> set[AdapterRef]:
        """The adapters of all running sequences and of those whose turn is near."""
        near = (sequence for room in self._waiting for sequence in room.order(self._max_running))
        return {s.adapter for s in chain(self._running, near) if s.adapter is not None}

    def _admit(self) -> Iterator[Sequence]:
        """In the order of the room. Whose adapter is still on its way is passed over; who needs more pages than are
        left is not, or a large request would starve."""
        for room in self._waiting:
            for sequence in room.order(self._max_running):
                if sequence.adapter is not None and not self._ready(sequence.adapter):
                    continue
                if len(self._running) == self._max_running or not self._reserve(sequence):
                    return
                room.discard(sequence)
                self._running.append(sequence)
                yield sequence

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

    def _segments(self, budget: int) -> Iterator[Segment]:
        """Chat first, who has had least before others, then scoring; among equals in order of admission."""
        waiting = [sequence for sequence in self._running if sequence.prefilling]
        for sequence in sorted(waiting, key=lambda s: (s.background, 0.0 if s.background else self.shares[s.user_id])):
            if budget:
                end = min(sequence.prompt, sequence.computed + budget)
                budget -= end - sequence.computed
                yield Segment(sequence, sequence.computed, end)
