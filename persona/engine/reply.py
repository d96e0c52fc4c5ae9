"""A reply in the making: from rows of logits to tokens, and from tokens to pieces of text."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from persona.engine import logprobs, sampler
from persona.engine.logprobs import Margin
from persona.engine.protocol import Chunk, TokenLogprob
from persona.engine.sampler import Choose, Sampler
from persona.engine.sequence import Sequence
from persona.engine.stops import Stops
from persona.engine.text import Detokenizer
from persona.errors import EngineDown, PersonaError, RequestError


@dataclass(slots=True)
class Generation:
    """What is known of one reply. Text that may yet become part of a stop string is held back."""

    sequence: Sequence
    sampler: Sampler
    words: Detokenizer
    stops: Stops
    margin: Margin = field(default_factory=Margin)
    generated: int = 0

    def add(self, token: int, told: TokenLogprob | None, eos: Collection[int]) -> Chunk | None:
        """The next piece, if there is something to show; the last one has `finish`."""
        grammar = self.sampler.grammar
        if grammar is not None and grammar.lost:
            return self.end("error", "The schema became too complex on the way; make it simpler.", RequestError)
        self.generated += 1
        if token in eos:
            if self.sampler.sampling.tell_end:
                self.margin.add(told, 0)
            return self.end("stop")
        self.sequence.tokens.append(token)
        written = self.words.add(token)
        self.margin.add(told, len(written))
        shown, stopped = self.stops.feed(written)
        if stopped:
            return self.end("stop", shown=shown, cut=True)
        if grammar is not None and grammar.ended:
            return self.end("stop", shown=shown)
        if len(self.sequence.tokens) >= self.sequence.limit:
            return self.end("length", shown=shown)
        return Chunk(shown, self.generated, logprobs=self.margin.show(len(shown))) if shown else None

    def end(
        self,
        finish: str,
        error: str | None = None,
        kind: type[PersonaError] = EngineDown,
        *,
        shown: str = "",
        cut: bool = False,
    ) -> Chunk:
        """The last piece. kind: of the error · shown: the last certain text; a stop string has `cut` the rest."""
        text, stopped = shown, cut
        if not stopped:
            tail, stopped = self.stops.feed(self.words.flush())
            text += tail if stopped else tail + self.stops.flush()
            finish = "stop" if stopped and finish == "length" else finish
        beside = self.margin.show(len(text)) if stopped else self.margin.rest()
        told = kind.__name__ if error else ""
        return Chunk(text, self.generated, finish, error, beside, self.sequence.cached, told)


def drawn(
    logits: torch.Tensor, samplers: list[Sampler], eos: Collection[int], choose: Choose
) -> list[tuple[int, TokenLogprob | None]]:
    """logits: [rows, vocab] → a token each, or NOT_FINITE, and, where it was asked for, what is told of it."""
    rows = [row for row, one in enumerate(samplers) if one.sampling.logprobs is not None]
    plain = logits[rows] if rows else logits  # a copy: drawing changes logits
    sampler.without(logits, [one.sampling.ignore_eos for one in samplers], eos)
    tokens = sampler.draw(logits, samplers, choose)
    told: dict[int, TokenLogprob] = {}
    if rows:
        tops = [samplers[row].sampling.logprobs or 0 for row in rows]
        told = dict(zip(rows, logprobs.of(plain, [max(tokens[row], 0) for row in rows], tops), strict=True))
    return [(token, told.get(row)) for row, token in enumerate(tokens)]
