"""How the loss of a training goes: the mean over its latest words, and when that says that the run is lost.

An optimizer step may hold three words, and the loss of three words says nothing.
"""

import math
from dataclasses import dataclass

WORDS = 160  # that a loss is taken over
EXPLODED = 3.0  # times the first loss


@dataclass(frozen=True, slots=True)
class Course:
    """How it went up to some optimizer step."""

    loss: float = math.nan  # nats per word, over the latest WORDS
    words: float = 0.0  # how many those are
    first: float = math.inf  # the first loss over WORDS

    def after(self, nats: float, words: float) -> "Course":
        """One optimizer step later; a step that has no words, or whose nats are not finite, tells nothing."""
        if not words or not math.isfinite(nats):
            return self
        kept = min(self.words, max(0.0, WORDS - words))
        loss = (nats + (kept * self.loss if kept else 0.0)) / (kept + words)
        begun = math.isinf(self.first) and kept + words >= WORDS
        return Course(loss, kept + words, loss if begun else self.first)

    @property
    def exploded(self) -> bool:
        return self.loss > EXPLODED * self.first + 1
