"""Which sequences take part in the next step: pure Python over integers, no torch.

A sequence reserves pages for its prompt and its longest reply, and holds its adapter, when it is admitted, so a running
one never waits for memory; what an earlier one of the same user and version left behind is not computed again
(prefix.py). Chat goes before scoring; who is next among users says waiting.py. Every step decodes all running rows and
prefills at most `prefill_tokens` prompt tokens beside them, but for those of a user who has most of what runs
(turns.py); what is only computed for later waits for an idle step.
"""

from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Any, Protocol

from persona.engine.lengths import GENERATED, Lengths
from persona.engine.pages import PagePool
from persona.engine.prefix import PrefixCache
from persona.engine.protocol import AdapterRef
from persona.engine.sequence import Plan, Segment, Sequence
from persona.engine.shelf import Absent, Lease, Shelf
from persona.engine.turns import Held, Turns
from persona.engine.waiting import Shares, WaitingRoom

AHEAD = 64  # tokens of a silent sequence in one step


class Adapters(Protocol):
    """Where adapters come from: tiers.Tiers."""

    @property
    def shelf(self) -> Shelf[Any]: ...

    def hold(self, ref: AdapterRef) -> Lease[Any] | Absent: ...

    def release(self, lease: Lease[Any], *, used: bool = True) -> None: ...

    def fetch(self, ref: AdapterRef, spared: Collection[AdapterRef]) -> Absent: ...


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
        self._turns = Turns(self.shares, prefill_tokens)

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
        own = list(sequence.pages[len(sequence.blocks) :])
        self.prefix.release(sequence.blocks)
        self.pool.give(own)
        sequence.pages = ()
        sequence.blocks.clear()
        if sequence.lease is not None:
            self._adapters.release(sequence.lease)
            sequence.lease = None

    def plan(self, *, admit: bool = True) -> Plan:
        """Admit who fits, then choose this step's rows. admit: or, while anything runs, leave room for what is not a
        sequence."""
        admitted, refused = list[Sequence](), list[Sequence]()
        self._adapters.shelf.expect(s.adapter for s in self._near() if s.adapter is not None)
        if self.waiting and (admit or not self._running) and self._admit(admitted, refused):
            self._prefetch()
        decode, segments = self._turns.next(self._running)
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
            assert one.pages[: len(one.blocks)] == tuple(block.page for block in one.blocks), (
                "pages are not their blocks'"
            )
        own = [list(one.pages[len(one.blocks) :]) for one in everybody]
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
        held = Held(self._running, self.shares, self._max_running, self.pool)
        for sequence in self._near():
            if len(self._running) == self._max_running:
                return True
            if held.enough(sequence):
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
        sequence.pages, sequence.blocks = (*(block.page for block in blocks), *pages), blocks
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

    def _ahead(self) -> Iterator[Segment]:
        """A short piece of a prompt that nobody waits for: whoever comes meanwhile has to wait for it."""
        for sequence in self._running[:1]:
            end = sequence.computed + min(AHEAD, self._prefill_tokens)
            yield Segment(sequence, sequence.computed, min(sequence.prompt, end))
