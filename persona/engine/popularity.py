"""Which of many is worth least: LFU with dynamic aging (Arlitt et al. 2000).

A thing's worth is the age at its last use plus uses times what it costs to get back. The age is the worth of the last
that left, so what was popular once does not stay for ever.
"""

from collections import Counter

from persona.engine.protocol import AdapterRef

FROM_DISK, FROM_HOST = 4.0, 1.0  # what getting an adapter back costs, against each other


class Popularity:
    """The worth of those that are kept."""

    def __init__(self) -> None:
        self._age = 0.0
        self._worth: dict[AdapterRef, float] = {}
        self._uses: Counter[AdapterRef] = Counter()

    def worth(self, ref: AdapterRef) -> float:
        return self._worth[ref]

    def use(self, ref: AdapterRef, cost: float) -> None:
        self._uses[ref] += 1
        self._worth[ref] = self._age + self._uses[ref] * cost

    def expire(self, ref: AdapterRef) -> None:
        """It is worth less than all others now."""
        self._worth[ref], self._uses[ref] = -1.0, 0

    def gave_way(self, ref: AdapterRef) -> None:
        """It left for others: all that stay are a little older."""
        self._age = max(self._age, self._worth[ref])

    def forget(self, ref: AdapterRef) -> None:
        del self._worth[ref], self._uses[ref]
