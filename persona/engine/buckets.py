"""Decode steps of a few fixed sizes, as integers: what a recorded step reads. Knows nothing of tensors.

    a line a row     │ token │ position │ slot │ length │ page │ page │ … │   width = 4 + most pages of a sequence
    rows 0 … n       │ the sequences of the step                          │
    rows n … bucket  │ write to the scratch page and read it: nobody else does, and what comes of them is not looked at

Of a sequence all pages stand there, then the scratch page; what lies behind its length is not looked at.
The scratch page lies behind the last page that the page pool knows of, so it can never be given to a sequence.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
HEAD = 4  # columns before the pages


class Row(NamedTuple):
    """One sequence's next token."""

    token: int
    position: int
    pages: Sequence[int]


def bucket(rows: int) -> int | None:
    """The smallest size that holds so many rows; None if none does, or for no rows."""
    return next((size for size in BUCKETS if 0 < rows <= size), None)


def up_to(rows: int) -> tuple[int, ...]:
    """The sizes for steps of 1 … `rows` rows, as far as there are any."""
    return BUCKETS[: bisect_left(BUCKETS, rows) + 1]


class Layout(NamedTuple):
    """size: tokens of a page · stride: slots from page to page · most: pages of a sequence at most ·
    scratch: the number of the scratch page."""

    size: int
    stride: int
    most: int
    scratch: int

    @property
    def width(self) -> int:
        return HEAD + self.most

    def fits(self, rows: Sequence[Row]) -> bool:
        return all(row.position < self.size * self.most for row in rows)

    def slot(self, row: Row) -> int:
        """Where the row's keys and values go."""
        page, place = divmod(row.position, self.size)
        return row.pages[page] * self.stride + place


class Table:
    """The lines of one size, kept from step to step: the pages of a row are written when they are others than before.

    lines: int64 [bucket, width].
    """

    def __init__(self, layout: Layout, bucket: int) -> None:
        self._layout, self._spare = layout, Row(0, 0, (layout.scratch,))
        self.lines = np.full((bucket, layout.width), layout.scratch, np.int64)
        self._pages: list[Sequence[int]] = [()] * bucket
        self.filled([])

    def filled(self, rows: Sequence[Row]) -> NDArray[np.int64]:
        """The lines of a step of these rows, as many as there are at most."""
        everybody = [*rows, *[self._spare] * (len(self.lines) - len(rows))]
        slot = self._layout.slot
        self.lines[:, :HEAD] = [(row.token, row.position, slot(row), row.position + 1) for row in everybody]
        for line, row in enumerate(everybody):
            if self._pages[line] is not row.pages:
                self._pages[line] = row.pages
                self.lines[line, HEAD:] = self._layout.scratch
                self.lines[line, HEAD : HEAD + len(row.pages)] = row.pages[: self._layout.most]
        return self.lines
