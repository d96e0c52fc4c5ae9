"""Who may wait, and who is refused or told to come again later, before anything is computed for them.

What a request asks for becomes a Sequence here, if it can be computed at all. The room is bounded, and each user's
share of it: in a full one a request of whoever has the most there leaves. A request whose turn would come after
`patience` seconds is refused at once; one that has waited so long is sent away.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable

from persona.engine.compiling import Compiling
from persona.engine.prefix import Owner
from persona.engine.protocol import AdapterRef, GenerateRequest, Health, PrefillRequest, ScoreRequest
from persona.engine.refusals import crowded
from persona.engine.scheduler import Scheduler
from persona.engine.sequence import Sequence
from persona.engine.waiting import Pace
from persona.errors import Busy, RequestError, TooLarge

LOOK_SECONDS = 0.25  # between two looks for those who have waited too long


class Admission:
    """The door of the scheduler, and of those whose grammar is being compiled."""

    def __init__(
        self,
        scheduler: Scheduler,
        compiling: Compiling,
        about: Callable[[], Health],
        *,
        patience: float,
        clock: Callable[[], float],
    ) -> None:
        """patience: seconds within which a request must be admitted · clock: that of `Sequence.since`."""
        self._scheduler, self._compiling, self._about = scheduler, compiling, about
        self._patience, self._clock = patience, clock
        self._pace, self._looked = Pace(), -math.inf

    def generation(self, job: int, request: GenerateRequest) -> Sequence:
        """Raises RequestError for what the model cannot read, TooLarge for what it cannot hold."""
        if any(not 0 <= token < self._about().vocab for token, _ in request.sampling.logit_bias):
            raise RequestError("logit_bias names a token that the model does not have.", param="logit_bias")
        limit = len(request.tokens) + request.sampling.max_tokens
        sequence = self._sequence(job, request.tokens, limit, request.adapter)
        sequence.user_id = request.user_id
        if request.user_id:
            sequence.owner = Owner(request.user_id, request.adapter)
        return sequence

    def scoring(self, job: int, request: ScoreRequest) -> Sequence:
        """Raises as `generation`. One that no user asked for is background."""
        wanted = sorted(set(request.targets))
        if request.targets != wanted or wanted[0] < 1 or wanted[-1] >= len(request.tokens):
            raise RequestError("Targets to score must ascend and lie inside the tokens, after the first.")
        sequence = self._sequence(job, request.tokens, len(request.tokens), request.adapter)
        sequence.targets, sequence.top = tuple(request.targets), request.top or 0
        sequence.user_id, sequence.background = request.user_id, not request.user_id
        return sequence

    def prefill(self, job: int, request: PrefillRequest) -> Sequence:
        """Raises as `generation`."""
        sequence = self._sequence(job, request.tokens, len(request.tokens), request.adapter)
        sequence.owner, sequence.user_id = Owner(request.user_id, request.adapter), request.user_id
        sequence.background = sequence.silent = True
        return sequence

    def _sequence(self, job: int, tokens: list[int], limit: int, adapter: AdapterRef | None) -> Sequence:
        about = self._about()
        if not tokens:
            raise RequestError("The prompt is empty.")
        if min(tokens) < 0 or max(tokens) >= about.vocab:  # one such row would end the whole step
            raise RequestError("The prompt holds a token that the model does not have.")
        if limit > about.context or not self._scheduler.fits(limit):
            raise TooLarge(
                f"Prompt and reply together are {limit} tokens; at most {about.context} fit.",
                code="context_length_exceeded",
            )
        return Sequence(job, list(tokens), len(tokens), limit, adapter, since=self._clock())

    def surplus(self) -> Sequence | None:
        """Who has to leave again, if somebody came into a full room: the newest request of the user with the most, and
        of users with as many the newest."""
        if not self._scheduler.crowded(len(self._compiling)):
            return None
        waiting: list[Sequence] = sorted([*self._compiling, *self._scheduler.chats], key=lambda one: one.id)
        theirs = Counter(one.user_id for one in waiting)
        return max(reversed(waiting), key=lambda one: theirs[one.user_id])

    def enter(self, sequence: Sequence) -> None:
        """Into the waiting room. Raises Busy if its turn would come too late."""
        if not sequence.background and not self._scheduler.chats:
            self._pace.forget()
        self._scheduler.add(sequence)
        wait = 0.0 if sequence.background else self._pace.wait(self._scheduler.before(sequence))
        if wait > self._patience:
            self._scheduler.remove(sequence)
            raise crowded(wait)

    def late(self) -> list[Sequence]:
        """Those who have waited too long, four times a second. Who waits for a grammar is out with this."""
        now = self._clock()
        if now < self._looked + LOOK_SECONDS:
            return []
        self._looked, since = now, now - self._patience
        waiting = [one for one in self._scheduler.sequences() if not one.pages and not one.silent and one.since < since]
        return [*(coming.sequence for coming in self._compiling.late(since)), *waiting]

    def left(self, admitted: Iterable[Sequence]) -> None:
        """These left the room for the running set just now."""
        for one in admitted:
            if not one.background:
                self._pace.left(self._clock(), others=len(self._scheduler.chats) > 0)

    def refusal(self) -> Busy:
        """What somebody is told who may not wait any longer."""
        return crowded(self._pace.wait(self._scheduler.waiting))
