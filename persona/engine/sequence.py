"""What a step consists of: sequences, pieces of their prompts, and the plan that says which of them take part.

Plain integers: no torch.
"""

from dataclasses import dataclass, field
from typing import Any

from persona.engine.prefix import Block, Owner
from persona.engine.protocol import AdapterRef
from persona.engine.shelf import Lease


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
    pages: tuple[int, ...] = ()  # all that it may need, from admission on: never others
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
