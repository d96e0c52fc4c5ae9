"""One request's scoring of many sequences, an adapter at a time: what came mixed is computed together.

An adapter is held only while its own part is computed, so a request may name more of them than memory holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from persona.engine.lora import Resident
from persona.engine.protocol import AdapterRef, ScoreRequest

# (tokens, targets, adapter) for each sequence
Wanted = list[tuple[list[int], list[int], Resident | None]]


@dataclass(frozen=True, slots=True)
class Group:
    """Which of the requests name this adapter."""

    adapter: AdapterRef | None
    places: list[int]


class ByAdapter:
    """The requests, and what was found for each in their order."""

    def __init__(self, requests: Sequence[ScoreRequest]) -> None:
        self._requests = requests
        self.found: list[list[float]] = [[] for _ in requests]
        places: dict[AdapterRef | None, list[int]] = {}
        for place, request in enumerate(requests):
            if request.targets:
                places.setdefault(request.adapter, []).append(place)
        self._groups = [Group(adapter, some) for adapter, some in places.items()]

    def next(self) -> Group | None:
        """A part that is still to be computed."""
        return self._groups.pop(0) if self._groups else None

    def wanted(self, group: Group, adapter: Resident | None) -> Wanted:
        return [(self._requests[place].tokens, self._requests[place].targets, adapter) for place in group.places]

    def fill(self, group: Group, values: list[list[float]]) -> None:
        for place, some in zip(group.places, values, strict=True):
            self.found[place] = some
