"""When a training keeps its state: at every optimizer step, as long as that costs a hundredth of its time at most.

A checkpoint is a convenience: a disk that is full, or a folder that was taken away because what was learned has to go,
ends the keeping and never the training.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from persona.engine import checkpoint_file
from persona.engine.checkpoint_file import State
from storage.failpoints import reach

SHARE = 0.01
log = structlog.get_logger("engine")


class Checkpoint:
    """The state of one training, in `folder` (none is kept without). `request` is the fingerprint it belongs to."""

    def __init__(self, folder: str, request: str, share: float = SHARE) -> None:
        self.request = request
        self._folder = Path(folder) if folder else None
        self._share = share
        self._spent = 0.0  # seconds

    def read(self) -> State | None:
        """The state to go on from, if there is one of this request."""
        return checkpoint_file.read(self._folder, self.request) if self._folder else None

    def due(self, seconds: float) -> bool:
        """Whether to keep the state now, after so many seconds of training."""
        return self._folder is not None and self._spent <= self._share * seconds

    def write(self, state: State) -> Iterator[None]:
        """Keep `state`: each item is a few milliseconds of work."""
        assert self._folder is not None, "only what is due is kept"
        pieces = checkpoint_file.write(self._folder, state)
        while (done := self._next(pieces)) is not None:
            reach(f"checkpoint-{done}")
            yield

    def _next(self, pieces: Iterator[str]) -> str | None:
        started = time.perf_counter()
        try:
            return next(pieces, None)
        except OSError as error:
            self._folder = None
            if not isinstance(error, FileNotFoundError):  # else it was taken away on purpose
                log.warning("no state of this run is kept", reason=error.strerror)
            return None
        finally:
            self._spent += time.perf_counter() - started
