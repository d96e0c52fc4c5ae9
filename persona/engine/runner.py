"""One step of the engine: from a plan over integers to logits and log-probabilities.

The rows of a step stand in one list of tokens, so that every base product is shared by all users:

    | decode rows, those of one kind of adapter side by side | segment of prompt 1 | segment of prompt 2 | …

A step is built, run and thrown away; what survives it are the cache's pages, and for a next one with the same rows what
it was told of them. On a CPU it may be one call of compiled code (kernels/native.py: rows in the plan's order), on a
GPU, with decode rows alone, a replay (graphs.py). Runs under no_grad, never inference_mode (its tensors could not be
shared with training).
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from persona.engine import attention, logprobs, sampler
from persona.engine.attention import KvCache
from persona.engine.buckets import Row
from persona.engine.decoder import Decoder
from persona.engine.graphs import DecodeGraphs
from persona.engine.kernels.choice import kernels
from persona.engine.kernels.native import NativeSteps, Part
from persona.engine.kernels.reference import DecodeRows, Piece, PromptGroups, PromptRows
from persona.engine.lora import Resident, StepAdapters
from persona.engine.protocol import TokenLogprob
from persona.engine.sampler import Choose
from persona.engine.sequence import Plan, Segment, Sequence
from persona.engine.weights import Projection


@dataclass(frozen=True, slots=True)
class Result:
    """What a step found. `logits`: [rows, vocab] for the sequences in `next`; `scores` per scored segment."""

    next: list[Sequence]
    logits: torch.Tensor
    scores: list[tuple[Sequence, list[TokenLogprob]]]


class Runner:
    """Runs plans on one decoder and one cache, with recordings of both if there are any."""

    def __init__(self, decoder: Decoder, cache: KvCache, whole: DecodeGraphs | NativeSteps | None = None) -> None:
        """whole: what computes rows in one piece, where there is such a thing."""
        self._decoder, self._cache, self._whole = decoder, cache, whole
        self._adapters = self._no_adapters()

    @torch.no_grad()
    def run(self, plan: Plan, adapters: dict[int, Resident | None]) -> Result:
        """`adapters`: by sequence id. Afterwards each sequence's `computed` has moved on."""
        result = self._whole_step(plan, adapters) or self._together(plan.decode, plan.prefill, adapters)
        if self._decoder.device.type == "cuda":  # here, where others may see to loads, and not where results are read
            torch.cuda.current_stream(self._decoder.device).synchronize()
        for sequence in plan.decode:
            sequence.computed += 1
        for segment in plan.prefill:
            segment.sequence.computed = segment.end
        return result

    def forget(self) -> None:
        """Let go of the last step's adapters, which are kept for a next step with the same rows."""
        self._adapters = self._no_adapters()
        if self._whole is not None:
            self._whole.forget()

    @property
    def choose(self) -> Choose:
        """How the next tokens are chosen among a step's logits."""
        return self._whole.draw if isinstance(self._whole, NativeSteps) else sampler.in_torch

    def _no_adapters(self) -> StepAdapters:
        return StepAdapters(kernels(self._decoder.device.type))

    def _whole_step(self, plan: Plan, adapters: dict[int, Resident | None]) -> Result | None:
        """The step in one piece, where there is a way: all but scores as compiled code, or decode rows as a replay."""
        match self._whole:
            case NativeSteps():
                return self._compiled(self._whole, plan.decode, plan.prefill, adapters)
            case DecodeGraphs() if plan.decode and not plan.prefill:
                decode = _by_kind(plan.decode, adapters)
                rows = [Row(s.tokens[s.computed], s.computed, s.pages) for s in decode]
                logits = self._whole.logits(rows, [adapters[s.id] for s in decode])
                return None if logits is None else Result(decode, logits, [])
        return None

    def _compiled(
        self,
        steps: NativeSteps,
        decode: list[Sequence],
        prefill: list[Segment],
        adapters: dict[int, Resident | None],
    ) -> Result | None:
        scored = [segment for segment in prefill if segment.sequence.targets]
        others = [segment for segment in prefill if not segment.sequence.targets]
        parts = [Part(s.tokens[s.computed : s.computed + 1], s.computed, s.pages, adapters[s.id], True) for s in decode]
        following = list(decode)
        for segment in others:
            self._clear(segment)
            sequence, tokens = segment.sequence, segment.sequence.tokens[segment.start : segment.end]
            speaks = segment.end == sequence.prompt and not sequence.silent
            parts.append(Part(tokens, segment.start, sequence.pages, adapters[sequence.id], speaks))
            following += [sequence] * speaks
        logits = steps.logits(parts) if parts else torch.empty(0, self._decoder.shape.vocab)
        if logits is None:
            return None
        return Result(following, logits, self._together([], scored, adapters).scores if scored else [])

    def _clear(self, segment: Segment) -> None:
        """Before its sequence's first step: pages that it does not share."""
        if segment.start == (sequence := segment.sequence).cached:
            self._cache.clear(sequence.pages[sequence.cached // self._cache.size :])

    def _together(self, decode: list[Sequence], prefill: list[Segment], adapters: dict[int, Resident | None]) -> Result:
        """All rows layer by layer: they share the base's products."""
        decode = _by_kind(decode, adapters)
        step = self._step(decode, prefill, adapters)
        h = self._decoder.embedded(step.tokens)
        for layer in range(self._decoder.shape.layers):
            h = self._decoder.layer(layer, h, step)
        return self._result(h, decode, prefill)

    def _step(self, decode: list[Sequence], prefill: list[Segment], adapters: dict[int, Resident | None]) -> "_Step":
        tokens = [s.tokens[s.computed] for s in decode]
        positions = [s.computed for s in decode]
        slots = [self._slot(s, s.computed) for s in decode]
        pieces, segments = list[Piece](), []
        for segment in prefill:
            start, sequence = len(tokens), segment.sequence
            self._clear(segment)
            tokens += sequence.tokens[segment.start : segment.end]
            positions += range(segment.start, segment.end)
            slots += [self._slot(sequence, t) for t in range(segment.start, segment.end)]
            pages = sequence.pages[: -(-segment.end // self._cache.size)]
            pieces.append(Piece(start - len(decode), len(tokens) - len(decode), segment.start, pages))
            if (adapter := adapters[sequence.id]) is not None:
                segments.append((start, len(tokens), adapter))
        self._adapters.arrange([adapters[s.id] for s in decode], segments)
        rows = self._decode_rows(decode) if decode else None
        return _Step(
            self._tensor(tokens),
            self._decoder.rotary(self._tensor(positions)),
            self._tensor(slots),
            rows,
            attention.arranged(pieces, self._cache.size, self._decoder.device) if pieces else None,
            self._cache,
            self._adapters,
            len(decode),
        )

    def _decode_rows(self, decode: list[Sequence]) -> DecodeRows:
        size = self._cache.size
        used = max(s.computed // size + 1 for s in decode)
        pages = self._tensor([[*s.pages[:used], *[s.pages[0]] * used][:used] for s in decode])
        return DecodeRows.of(pages, self._tensor([s.computed + 1 for s in decode]), size)

    def _slot(self, sequence: Sequence, position: int) -> int:
        page, place = divmod(position, self._cache.size)
        return self._cache.slot(sequence.pages[page], place)

    def _result(self, h: torch.Tensor, decode: list[Sequence], prefill: list[Segment]) -> Result:
        following, rows, scores = list(decode), list(range(len(decode))), []
        start = len(decode)
        for segment in prefill:
            sequence = segment.sequence
            if sequence.targets:
                scores.append((sequence, self._scored(h[start:], segment)))
            elif segment.end == sequence.prompt and not sequence.silent:
                following.append(sequence)
                rows.append(start + segment.end - segment.start - 1)
            start += segment.end - segment.start
        logits = self._decoder.logits(h[rows]) if rows else h.new_empty(0, self._decoder.shape.vocab)
        return Result(following, logits, scores)

    def _scored(self, h: torch.Tensor, segment: Segment) -> list[TokenLogprob]:
        """Log-probabilities of the targets whose preceding token lies in this segment."""
        sequence = segment.sequence
        targets = [t for t in sequence.targets if segment.start < t <= segment.end]
        found: list[TokenLogprob] = []
        for some in _chunks(targets, 64):  # bounds the logits in memory
            logits = self._decoder.logits(h[[t - 1 - segment.start for t in some]])
            found += logprobs.of(logits, [sequence.tokens[t] for t in some], [sequence.top] * len(some))
        return found

    def _tensor(self, values: Rows[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._decoder.device)


@dataclass(frozen=True, slots=True)
class _Step:
    """The whole state of one forward: implements decoder.Pass."""

    tokens: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    slots: torch.Tensor
    decode: DecodeRows | None
    prompts: PromptRows | PromptGroups | None
    cache: KvCache
    adapters: StepAdapters
    rows: int  # how many decode rows

    def project(self, layer: int, target: str, base: Projection, x: torch.Tensor) -> torch.Tensor:
        return self.adapters.add(layer, target, x, base(x))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.write(layer, self.slots, k, v)
        parts = []
        if self.decode is not None:
            parts.append(attention.decode(q[: self.rows], self.cache, layer, self.decode))
        if self.prompts is not None:
            parts.append(attention.prompts(q[self.rows :], self.cache, layer, self.prompts))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _by_kind(decode: list[Sequence], adapters: dict[int, Resident | None]) -> list[Sequence]:
    """Those whose adapters are of one kind side by side, those without an adapter last."""

    def order(one: Sequence) -> tuple[bool, int, int]:
        adapter = adapters[one.id]
        return (True, 0, 0) if adapter is None else (False, hash(adapter.kind), id(adapter))

    return sorted(decode, key=order)


def _chunks(items: list[int], size: int) -> list[list[int]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
