"""How long a reply will probably get, and so what a request costs.

Its bound alone does not say it: who sets none gets the model's whole context as one and uses little of it, who asks for
an exact length uses all. So each user's replies are watched: what part of their bounds they came to, apart for bounds
of another power of two. Of whom nothing is known yet the mean over users is expected, in which nobody counts twice; at
the very start, 128 tokens. Numbers alone are kept, and those of a dropped user are not.
"""

from collections import Counter, defaultdict
from typing import Protocol

GENERATED = 2.0  # what a generated token counts, against one of a prompt
LONG = 128  # tokens of a reply that may be longer, as long as none was seen
LEARNED = 1 / 4  # of the way from what was expected of a user to what a reply came to
KEPT = 1000  # users who are remembered, at most


class Waiting(Protocol):
    """What stands in the room."""

    user_id: int
    prompt: int  # tokens
    limit: int  # with the longest reply


class Lengths:
    """Of each user's replies, the part of their bounds, by the bounds' bit lengths."""

    def __init__(self) -> None:
        self._parts: dict[int, dict[int, float]] = {}  # who was seen last stands last
        self._sums, self._users = defaultdict[int, float](float), Counter[int]()  # over users

    def expected(self, user_id: int, bound: int) -> float:
        """Tokens of a reply that may have `bound`."""
        size = bound.bit_length()
        if (part := self._parts.get(user_id, {}).get(size)) is not None:
            return part * bound
        if self._users[size]:
            return self._sums[size] / self._users[size] * bound
        return min(bound, LONG)

    def cost(self, one: Waiting) -> float:
        """What a request is expected to cost, as counters count."""
        return one.prompt + GENERATED * self.expected(one.user_id, one.limit - one.prompt)

    def ended(self, user_id: int, bound: int, tokens: int) -> None:
        """A reply that might have had `bound` tokens came to so many."""
        if bound < 1:
            return
        size, part, parts = bound.bit_length(), tokens / bound, self._parts.pop(user_id, {})
        before = parts.get(size)
        parts[size] = part if before is None else before + LEARNED * (part - before)
        self._sums[size] += parts[size] - (before or 0.0)
        self._users[size] += before is None
        self._parts[user_id] = parts
        if len(self._parts) > KEPT:
            self.forget(next(iter(self._parts)))

    def forget(self, user_id: int) -> None:
        for size, part in self._parts.pop(user_id, {}).items():
            self._sums[size] -= part
            self._users[size] -= 1
