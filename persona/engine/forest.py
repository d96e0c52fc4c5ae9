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

    def seen(self) -> NDArray[np.bool_]:
        """[nodes, nodes]: True where the column is the row's node or stands before it."""
        mask = np.zeros((len(self), len(self)), np.bool_)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                mask[node] = mask[parent]
            mask[node, node] = True
        return mask


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
