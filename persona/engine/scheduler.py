"""Which sequences take part in the next step: pure Python over integers, no torch.

A sequence reserves pages for its prompt and its longest reply when it is admitted, so a running one never waits for
memory. Chat goes before scoring; among equals the first come goes first. Every step decodes all running rows and
prefills at most `prefill_tokens` prompt tokens beside them.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from persona.engine.pages import PagePool
from persona.engine.protocol import AdapterRef


@dataclass(eq=False, slots=True)
class Sequence:
    """One running request. `tokens` grows by one each decode step; `computed` of them are in the cache."""

    id: int
    tokens: list[int]
    prompt: int  # how many of `tokens` were given
    limit: int  # tokens it may grow to
    adapter: AdapterRef | None = None
    targets: tuple[int, ...] = ()  # positions to score; empty for chat
    top: int = 0  # alternatives that are told with each of them
    background: bool = False
    computed: int = 0
    pages: list[int] = field(default_factory=list)

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
    """One step: these rows decode one token each, these segments are prefilled."""

    decode: list[Sequence]
    prefill: list[Segment]

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Scheduler:
    """Waiting room and running set."""

    def __init__(self, pool: PagePool, *, max_running: int, max_waiting: int, prefill_tokens: int) -> None:
        self.pool = pool
        self._max_running, self._max_waiting, self._prefill_tokens = max_running, max_waiting, prefill_tokens
        self._waiting: tuple[deque[Sequence], deque[Sequence]] = (deque(), deque())  # chat, background
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
        self._waiting[sequence.background].append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting[sequence.background]:
            self._waiting[sequence.background].remove(sequence)
        self.pool.give(sequence.pages)

    def plan(self) -> Plan:
        """Admit who fits, then choose this step's rows."""
        self._admit()
        decode = [s for s in self._running if not s.prefilling]
        return Plan(decode, list(self._segments(self._prefill_tokens)))

    def sequences(self) -> Iterator[Sequence]:
        yield from self._running
        for room in self._waiting:
            yield from room

    def check(self) -> None:
        """Assert that no page leaked; when idle, that all are free."""
        self.pool.check(s.pages for s in self.sequences())

    def _admit(self) -> None:
        for room in self._waiting:
            while room and len(self._running) < self._max_running:
                pages = self.pool.take(self.pool.needed(room[0].limit))
                if pages is None:
                    return  # nobody overtakes: a large request would starve
                sequence = room.popleft()
                sequence.pages = pages
                self._running.append(sequence)

    def _segments(self, budget: int) -> Iterator[Segment]:
        """Chat first, then scoring, each in order of admission."""
        for background in (False, True):
            for sequence in self._running:
                if budget and sequence.background == background and sequence.prefilling:
                    end = min(sequence.prompt, sequence.computed + budget)
                    budget -= end - sequence.computed
                    yield Segment(sequence, sequence.computed, end)
