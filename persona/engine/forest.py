"""Token sequences as a forest: what several of them have in common at their beginning is computed once.

Integers alone, no torch. A node is one token after all that stands before it in its tree; sequences that begin alike
share nodes. Prompts of one user share a long beginning (system text, quoted history), so a forest of their messages has
far fewer nodes than the sequences have tokens.

    a b c d      a ─ b ─ c ─ d
    a b x            └── x
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

ROOT = -1


@dataclass(slots=True)
class Forest:
    """Nodes in an order in which a parent stands before its children. `positions` counts from 0 in each tree."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # ROOT for a first token
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def missing(self, sequence: Sequence[int]) -> int:
        """Nodes that `add` would make."""
        node = ROOT
        for depth, token in enumerate(sequence):
            if (node := self._children.get((node, token), ROOT)) == ROOT:
                return len(sequence) - depth
        return 0

    def add(self, sequence: Sequence[int]) -> list[int]:
        """The nodes of `sequence`, one per token."""
        path, node = [], ROOT
        for position, token in enumerate(sequence):
            parent, node = node, self._children.setdefault((node, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.positions.append(position)
                self.parents.append(parent)
            path.append(node)
        return path

    def chunks(self, size: int) -> "Iterator[Chunk]":
        """All nodes in pieces of at most `size`, in order.

        What a later piece has to look back to stays in sight from piece to piece. Where sequences were added in sorted
        order, that is one sequence at most, however many nodes there are.
        """
        reach = list(range(len(self)))  # the last node below each
        for node in range(len(self) - 1, -1, -1):
            if (parent := self.parents[node]) != ROOT:
                reach[parent] = max(reach[parent], reach[node])
        before: list[int] = []
        sight = np.zeros((0, 0), np.bool_)  # among the nodes before
        for start in range(0, len(self), size):
            end = min(start + size, len(self))
            places = {node: place for place, node in enumerate([*before, *range(start, end)])}
            seen = np.zeros((len(places), len(places)), np.bool_)
            seen[: len(before), : len(before)] = sight
            for node in range(start, end):
                if self.parents[node] != ROOT:
                    seen[places[node]] = seen[places[self.parents[node]]]
                seen[places[node], places[node]] = True
            keep = [place for node, place in places.items() if reach[node] >= end]
            yield Chunk(self.tokens[start:end], self.positions[start:end], start, seen[len(before) :], keep)
            before, sight = [node for node in places if reach[node] >= end], seen[np.ix_(keep, keep)]

    def whole(self) -> "Chunk":
        """All nodes in one piece; there must be some."""
        return next(self.chunks(len(self)))


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring nodes of a forest, the first of them node `start`.

    seen: [nodes, before + nodes], True where the column is the row's node or stands before it; `before` are the kept
    nodes of earlier chunks · keep: those columns that later chunks look back to.
    """

    tokens: list[int]
    positions: list[int]
    start: int
    seen: NDArray[np.bool_]
    keep: list[int]

    def __len__(self) -> int:
        return len(self.tokens)


def packed(sequences: Sequence[Sequence[int]], size: int) -> Iterator[tuple[Forest, list[tuple[int, list[int]]]]]:
    """Forests of at most `size` nodes, each with its (index of a sequence, its nodes), in order.

    A sequence that is longer than `size` stands alone.
    """
    forest, members = Forest(), list[tuple[int, list[int]]]()
    for index, sequence in enumerate(sequences):
        if members and len(forest) + forest.missing(sequence) > size:
            yield forest, members
            forest, members = Forest(), []
        members.append((index, forest.add(sequence)))
    if members:
        yield forest, members
