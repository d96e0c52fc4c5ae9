"""Requests whose grammar is being compiled, in a thread that lets go of the GIL: they wait outside the scheduler.

They count among those who wait, in a full room and for the patience of the engine, from the moment they came.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass

from persona.engine.grammar import Grammar, Grammars
from persona.engine.protocol import GenerateRequest
from persona.engine.sequence import Sequence

MOMENT = 0.005  # seconds that an idle loop waits for a grammar before it looks for messages


@dataclass(frozen=True, slots=True)
class Coming:
    """A request of the loop, on its way in."""

    sequence: Sequence
    request: GenerateRequest
    grammar: futures.Future[Grammar] | None = None


class Compiling:
    """All that wait, by job."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._coming: dict[int, Coming] = {}

    def __len__(self) -> int:
        return len(self._coming)

    def __iter__(self) -> Iterator[Sequence]:
        return (coming.sequence for coming in self._coming.values())

    def add(self, sequence: Sequence, request: GenerateRequest) -> None:
        future = self._grammars.compile(request.sampling.grammar)
        self._coming[sequence.id] = Coming(sequence, request, future)

    def forget(self) -> None:
        """What was compiled for requests that have ended."""
        self._grammars.forget()

    def pause(self) -> None:
        """With nothing else to do, wait for one for a moment."""
        some = [one.grammar for one in self._coming.values() if one.grammar is not None]
        futures.wait(some, MOMENT, futures.FIRST_COMPLETED)

    def ready(self) -> list[Coming]:
        """Those whose grammar is there, or cannot be followed."""
        return self._taken(lambda one: one.grammar is not None and one.grammar.done())

    def late(self, before: float) -> list[Coming]:
        """Those who came before that moment and wait still."""
        return self._taken(lambda one: one.sequence.since < before)

    def abort(self, job: int) -> bool:
        """Take it out; whether it was here."""
        return bool(self._taken(lambda one: one.sequence.id == job))

    def _taken(self, which: Callable[[Coming], bool]) -> list[Coming]:
        taken = [one for one in self._coming.values() if which(one)]
        for one in taken:
            del self._coming[one.sequence.id]
            if one.grammar is not None:
                one.grammar.cancel()  # does nothing to what has been compiled
        return taken
