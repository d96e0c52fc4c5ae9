"""The three faces of the engine, as the service sees them: serving, versions, training.

Each has one contract suite in tests/contracts that every implementation passes. `scripted.py` says what it is
told, `client.py` speaks to the engine process. A method raises `Busy` (try later), `EngineDown` (being restarted)
or `AdapterError` (that file cannot be served); closing an iterator aborts the work behind it.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from persona.engine.protocol import (
    AdapterRef,
    Chunk,
    GenerateRequest,
    Health,
    PrefillRequest,
    Progress,
    ScoreRequest,
    TokenLogprob,
    TrainRequest,
)


class Serving(Protocol):
    """Replies and log-probabilities."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Chunk]:
        """Yield chunks until one has `finish`. Closing the iterator aborts and frees the sequence's pages."""
        ...

    async def score(self, request: ScoreRequest) -> list[float]:
        """Natural log-probabilities, one per target."""
        ...

    async def tell(self, request: ScoreRequest) -> list[TokenLogprob]:
        """What `score` gives, with the target itself and `request.top` alternatives in its place."""
        ...

    async def score_all(self, requests: Sequence[ScoreRequest]) -> list[list[float]]:
        """What `score` gives for each request, up to rounding, in slices beside serving like training.

        Neighbours with one adapter whose tokens begin alike are computed together: far cheaper for many messages
        under one long prompt.
        """
        ...

    async def prefill(self, request: PrefillRequest) -> None:
        """Compute what a coming prompt begins with, when nothing else is to be computed: it may take long, or for ever
        on a busy engine. Cancelling it keeps what was computed."""
        ...

    async def health(self) -> Health: ...


class Versions(Protocol):
    """Which adapters are resident. A request may name any version that was published."""

    async def stage(self, ref: AdapterRef) -> None:
        """Load and verify. Raises AdapterError and changes nothing if the file is corrupt or foreign."""
        ...

    async def flip(self, ref: AdapterRef) -> None:
        """Make the staged version its user's newest; older ones leave once no sequence runs on them."""
        ...

    async def drop(self, user_id: int) -> None:
        """Forget every version of the user that is in memory."""
        ...


class Training(Protocol):
    """Turns examples into an adapter file, beside serving."""

    def train(self, request: TrainRequest) -> AsyncIterator[Progress]:
        """Yield progress until one is `done`: then adapter.safetensors lies in `request.out`.

        Raises TrainingFailed with the reason otherwise; EngineDown or StorageFull when the examples are not to blame.
        Closing the iterator abandons the run. Its state lies in `request.checkpoint` then, and the same examples, plan
        and start go on from there to the same result; any other request removes it and begins anew. The folder is the
        caller's: one that is taken away while it trains costs the state and not the run.
        """
        ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...


class Engine(Serving, Versions, Training, Protocol):
    """All three faces at once."""
