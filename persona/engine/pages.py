"""Pages of the key-value cache, as plain integers.

Whoever allocates a page releases it; `check()` proves that nothing leaked. Knows nothing of tensors.
"""

from collections.abc import Iterable


class PagePool:
    """`total` pages of `size` tokens each."""

    def __init__(self, total: int, size: int) -> None:
        self.total, self.size = total, size
        self._free = list(range(total - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or None if there are not as many."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give(self, pages: list[int]) -> None:
        """Return pages and empty the list, so that none can be given twice."""
        self._free.extend(pages)
        pages.clear()

    def check(self, held: Iterable[list[int]]) -> None:
        """Assert that free pages and the `held` ones are all pages, each once."""
        everything = sorted([*self._free, *(page for pages in held for page in pages)])
        assert everything == list(range(self.total)), "pages leaked or were given twice"
