"""What the engine does beside serving, in slices: scoring of many sequences, and one training.

Serving comes first: beside running sequences, slices get a share of the time that steps took, after they took it.
Scoring goes before training. Nothing that fails here reaches serving.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import structlog

from persona.engine import protocol
from persona.engine.protocol import Progress, Reply
from persona.engine.refusals import cause, failed, fatal
from persona.errors import Busy, PersonaError, StorageFull, TrainingFailed

T = TypeVar("T")
R = TypeVar("R")

SHARE = 0.11  # of the time that steps took: gaps between tokens grow by that in the mean
SCORING = 1.0  # the same for scoring, which is short: a new version waits for its gate
ABORTED = "The scoring was aborted."
log = structlog.get_logger("engine")

Scores = Generator[None, None, list[list[float]]]  # each item is one slice


@dataclass(frozen=True, eq=False, slots=True)
class Scoring:
    """A part of the request `job`. ended: what follows when all is scored · stop: called in any case."""

    job: int
    slices: Scores
    ended: Callable[[list[list[float]]], None]
    stop: Callable[[], None]


def settled(slices: Generator[T, None, R], settle: Callable[[], None]) -> Generator[T, None, R]:
    """The same, each with all that it put on its way done: a slice is charged for what it costs a device, too."""
    try:
        while True:
            try:
                said = next(slices)
            except StopIteration as ended:
                result: R = ended.value
                return result
            settle()
            yield said
    finally:
        slices.close()


class Slices:
    """The work in slices. Answers go to `send`."""

    def __init__(
        self, send: Callable[[Reply], None], aside: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """aside: around all that computes."""
        self._send, self._aside = send, aside
        self._scorings: deque[Scoring] = deque()
        self._training: tuple[int, Iterator[Progress | None]] | None = None
        self.paused = False  # training
        self.done = 0
        self._credit = 0.0  # seconds that serving has earned for slices; below zero after a long one

    @property
    def waiting(self) -> bool:
        """Whether there is something to do."""
        return bool(self._scorings) or (self.training and not self.paused)

    @property
    def training(self) -> bool:
        return self._training is not None

    def score(self, scoring: Scoring) -> None:
        self._scorings.append(scoring)

    def train(self, job: int, slices: Callable[[], Iterator[Progress | None]]) -> None:
        """Raises Busy while another training is under way."""
        if self._training:
            raise Busy("Another training is running; try again when it has ended.", retry_after=30)
        self._training = job, slices()

    def abort(self, job: int) -> bool:
        """End what belongs to this request. Whether there was something."""
        if mine := [scoring for scoring in self._scorings if scoring.job == job]:
            self._scorings.remove(mine[0])
            mine[0].slices.close()
            mine[0].stop()
            self._fail(job, Busy(ABORTED))
        elif self._training and self._training[0] == job:
            self._end_training()
            self._fail(job, TrainingFailed("The training was abandoned."))
        else:
            return False
        return True

    def earn(self, seconds: float) -> None:
        """Serving has worked for so long."""
        share = SCORING if self._scorings else SHARE
        self._credit = min(0.0, self._credit + share * seconds)

    def work(self, *, beside: bool) -> bool:
        """One slice, if there is one; beside running sequences only if they have earned it. Whether there was."""
        if not self.waiting or (beside and self._credit < 0):
            return False
        started = time.perf_counter()
        self.done += 1
        if self._scorings:
            self._score(self._scorings[0])
        elif self._training:
            self._train(*self._training)
        self._credit -= (time.perf_counter() - started) * beside
        return True

    def _score(self, scoring: Scoring) -> None:
        try:
            with self._aside():
                next(scoring.slices)
        except StopIteration as ended:
            self._scorings.popleft()
            scoring.stop()
            scoring.ended(ended.value)
        except (RuntimeError, MemoryError) as error:
            if fatal(error):
                raise
            self._scorings.popleft()
            scoring.stop()
            log.error("scoring failed", kind=type(error).__name__)
            self._fail(scoring.job, Busy("There is no memory to score this now; try again later.", retry_after=30))

    def _train(self, job: int, slices: Iterator[Progress | None]) -> None:
        try:
            with self._aside():
                progress = next(slices)
        except PersonaError as error:
            self._end_training()
            self._fail(job, error)
        except OSError as error:
            self._end_training()
            self._fail(job, StorageFull(f"The adapter could not be written: {error.strerror}."))
        except Exception as error:  # whatever it is, serving goes on
            if fatal(error):
                raise
            self._end_training()
            log.error("training failed", kind=type(error).__name__)
            self._fail(job, TrainingFailed(f"The training stopped on {type(error).__name__}: {cause(error)}"))
        else:
            if progress is not None:
                if progress.done:
                    self._end_training()
                self._send(protocol.Step(job, progress))

    def _end_training(self) -> None:
        if self._training:
            close = getattr(self._training[1], "close", None)
            if close is not None:
                close()
        self._training = None

    def _fail(self, job: int, error: PersonaError) -> None:
        self._send(failed(job, error))
