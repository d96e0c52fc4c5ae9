"""Log-probabilities of tokens, and of the likeliest in their place, as the model has them.

That is before temperature, penalties, biases and grammars, so that a generated token and a scored one of a prompt are
told by the same sums.
"""

from collections import deque
from collections.abc import Sequence

import torch

from persona.engine.protocol import TokenLogprob


def of(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """logits: [rows, vocab] · tokens: [rows] · tops: [rows], how many alternatives each row wants → one a row."""
    logits = logits.float()
    whole = logits.logsumexp(-1)
    wanted = torch.tensor(tokens, dtype=torch.int64, device=logits.device)
    found = (logits.gather(1, wanted[:, None]).squeeze(1) - whole).tolist()
    alternatives = _likeliest(logits, whole, max(tops))
    rows = zip(tokens, found, alternatives, tops, strict=True)
    return [TokenLogprob(token, value, some[:top]) for token, value, some, top in rows]


def _likeliest(logits: torch.Tensor, whole: torch.Tensor, most: int) -> list[list[tuple[int, float]]]:
    """The `most` likeliest tokens of each row, in order."""
    if not most:
        return [[] for _ in logits]
    values, tokens = logits.topk(min(most, logits.shape[1]))
    rows = zip(tokens.tolist(), (values - whole[:, None]).tolist(), strict=True)
    return [list(zip(some, theirs, strict=True)) for some, theirs in rows]


class Margin:
    """Holds each token's log-probability until the first character of its text is shown.

    So what stands beside a piece of text belongs to it, and what a stop string cut off is never told.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # (where its text begins, what is told)
        self._written = self._shown = 0

    def add(self, found: TokenLogprob | None, chars: int) -> None:
        """The next token, which completes `chars` characters; None: nothing is told of it."""
        if found is not None:
            self._waiting.append((self._written, found))
        self._written += chars

    def show(self, chars: int) -> list[TokenLogprob]:
        """What stands beside the next `chars` characters."""
        self._shown += chars
        told = []
        while self._waiting and self._waiting[0][0] < self._shown:
            told.append(self._waiting.popleft()[1])
        return told

    def rest(self) -> list[TokenLogprob]:
        """Everything that was held back, at the end of the reply."""
        told = [found for _, found in self._waiting]
        self._waiting.clear()
        return told
