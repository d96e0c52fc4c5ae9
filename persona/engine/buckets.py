"""Decode steps of a few fixed sizes, as plain integers: what a recorded step reads. Knows nothing of tensors.

    a line a row     │ token │ position │ slot │ length │ page │ page │ … │   width = 4 + most pages of a sequence
    rows 0 … n       │ the sequences of the step                          │
    rows n … bucket  │ write to the scratch page and read it: nobody else does, and what comes of them is not looked at

The scratch page lies behind the last page that the page pool knows of, so it can never be given to a sequence.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

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

    def lines(self, rows: Sequence[Row], bucket: int) -> list[list[int]]:
        """`bucket` lines of `width` integers."""
        spare = Row(0, 0, [self.scratch])
        return [self._line(row) for row in [*rows, *[spare] * (bucket - len(rows))]]

    def _line(self, row: Row) -> list[int]:
        page, place = divmod(row.position, self.size)
        used = row.pages[: page + 1]
        pages = [*used, *[self.scratch] * (self.most - len(used))]
        return [row.token, row.position, row.pages[page] * self.stride + place, row.position + 1, *pages]
