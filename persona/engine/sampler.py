"""From logits to the next token, for all rows of a step at once.

A row that wants the likeliest token and nothing else costs its share of one argmax. The others are computed together,
each by its own numbers: penalties and biases touch the tokens that they name, a grammar rules tokens out, then come
temperature, min-p, top-k and the nucleus, in vLLM's order. Chance comes from a generator of the row's own, so a seeded
reply does not depend on who else is in the batch.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch

from persona.engine.grammar import Grammar
from persona.engine.protocol import Sampling

COLDEST = 1e-5  # temperatures up to here are greedy: dividing by them would overflow
FIRST = (64, 1024)  # tokens that a row which narrows its draw looks at, before its whole vocabulary is sorted
BLOCK = 128  # tokens whose probabilities are added up before those of single tokens are looked at
HOTTEST = 1e30  # and from here on all alike; an infinite one would make NaN of a token that is ruled out


class Sampler:
    """Draws for one sequence, whose prompt is `prompt` and whose reply is held to `grammar`."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), grammar: Grammar | None = None) -> None:
        self.sampling = sampling
        self.grammar = grammar
        self._random = random.Random(None if sampling.seed is None else sampling.seed % (1 << 64))  # None: any
        self.greedy = not (sampling.temperature > COLDEST and sampling.top_p > 0)
        self.narrow = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        self.tally = Tally(prompt if sampling.repetition_penalty != 1 else ()) if _penalises(sampling) else None

    def chance(self) -> float:
        """The next number in [0, 1) of this sequence."""
        return self._random.random()

    def took(self, token: int) -> None:
        """The sequence goes on with `token`."""
        if self.tally is not None:
            self.tally.add(token)
        if self.grammar is not None:
            self.grammar.took(token)


class Tally:
    """How often each token was generated. Tokens of the prompt that is given stand in it with 0.

    tokens: [n] · counts: [n], of the `n` different ones.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._tokens = np.array([*self._places, *repeat(0, 64)], np.int64)
        self._counts = np.zeros(len(self._tokens), np.float32)

    @property
    def tokens(self) -> np.ndarray:
        return self._tokens[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self._places)]

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1


def without(logits: torch.Tensor, rows: Sequence[bool], tokens: Collection[int]) -> None:
    """logits: [rows, vocab]; `tokens` become impossible, in place, where `rows` says so."""
    if chosen := [[row] for row, wanted in enumerate(rows) if wanted and tokens]:
        logits[chosen, list(tokens)] = -torch.inf


def draw(logits: torch.Tensor, samplers: list[Sampler]) -> list[int]:
    """logits: [rows, vocab] → one token a row. Logits of rows that ask for more are changed in place."""
    _penalise(logits, [(row, one) for row, one in enumerate(samplers) if one.tally is not None])
    _bias(logits, [(row, one) for row, one in enumerate(samplers) if one.sampling.logit_bias])
    _constrain(logits, [(row, one.grammar) for row, one in enumerate(samplers) if one.grammar is not None])
    tokens = [0] * len(samplers)
    if any(one.greedy for one in samplers):
        tokens = [int(token) for token in logits.argmax(-1).tolist()]
    for narrow in (False, True):
        rows = [row for row, one in enumerate(samplers) if not one.greedy and one.narrow is narrow]
        if rows:
            choose = _from_the_likeliest if narrow else _from_all
            some = logits if len(rows) == len(samplers) else logits[rows]
            for row, token in zip(rows, choose(some, [samplers[row] for row in rows]), strict=True):
                tokens[row] = token
    for one, token in zip(samplers, tokens, strict=True):
        one.took(token)
    return tokens


def _penalises(sampling: Sampling) -> bool:
    return bool(sampling.frequency_penalty or sampling.presence_penalty) or sampling.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class _Places:
    """Places in the logits, row by row, and values that a row has for all of its places."""

    rows: np.ndarray
    tokens: np.ndarray
    sizes: list[int]
    device: torch.device

    @classmethod
    def of(cls, rows: list[int], tokens: list[np.ndarray], device: torch.device) -> "_Places":
        sizes = [len(some) for some in tokens]
        return cls(np.repeat(np.array(rows, np.int64), sizes), np.concatenate(tokens), sizes, device)

    @property
    def index(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.on_device(self.rows), self.on_device(self.tokens)

    def each(self, values: list[float]) -> torch.Tensor:
        return self.on_device(np.repeat(np.array(values, np.float32), self.sizes))

    def on_device(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)


def _penalise(logits: torch.Tensor, rows: list[tuple[int, Sampler]]) -> None:
    """Frequency and presence as OpenAI defines them, over what was generated; repetition (Keskar et al. 2019) over
    the prompt, too."""
    tallies = [(row, one.sampling, one.tally) for row, one in rows if one.tally is not None and one.tally.tokens.size]
    if not tallies:
        return
    places = _Places.of([row for row, _, _ in tallies], [tally.tokens for _, _, tally in tallies], logits.device)
    counts = places.on_device(np.concatenate([tally.counts for _, _, tally in tallies]))
    index = places.index
    found = logits[index]
    repetition = places.each([sampling.repetition_penalty for _, sampling, _ in tallies])
    found = torch.where(found > 0, found / repetition, found * repetition)
    found -= counts * places.each([sampling.frequency_penalty for _, sampling, _ in tallies])
    found -= (counts > 0) * places.each([sampling.presence_penalty for _, sampling, _ in tallies])
    logits[index] = found.to(logits.dtype)


def _bias(logits: torch.Tensor, rows: list[tuple[int, Sampler]]) -> None:
    """What a request adds to single tokens, after the penalties: a bias is not scaled by them."""
    if not rows:
        return
    biases = [one.sampling.logit_bias for _, one in rows]
    tokens = [np.array([token for token, _ in pairs], np.int64) for pairs in biases]
    places = _Places.of([row for row, _ in rows], tokens, logits.device)
    added = places.on_device(np.array([value for pairs in biases for _, value in pairs], np.float32))
    logits.index_put_(places.index, added.to(logits.dtype), accumulate=True)


def _constrain(logits: torch.Tensor, rows: list[tuple[int, Grammar]]) -> None:
    """Rule out what a row's grammar does not allow. One that allows nothing is lost, and its reply ends after this."""
    if not rows:
        return
    bits = np.stack([np.frombuffer(grammar.allowed(), np.uint8) for _, grammar in rows])
    bits[~bits.any(axis=1)] = 0xFF
    allowed = np.unpackbits(bits, axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    index = torch.tensor([row for row, _ in rows], device=logits.device)
    ruled_out = torch.from_numpy(~allowed).to(logits.device)
    logits[index] = logits[index].masked_fill(ruled_out, -torch.inf)


def _from_all(logits: torch.Tensor, samplers: list[Sampler]) -> list[int]:
    """logits: [rows, vocab] → a token each, from the whole vocabulary: first its block, then its place in there."""
    probabilities = _tempered(logits, samplers)
    whole = probabilities.shape[1] // BLOCK * BLOCK
    blocks = probabilities[:, :whole].reshape(len(samplers), -1 if whole else 0, BLOCK).sum(-1, dtype=torch.float64)
    rest = probabilities[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    mass = torch.cat([blocks, rest], 1).cumsum(-1)
    wanted = _chances(samplers, mass)
    block = _place(mass, wanted)
    places = block * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = probabilities.gather(1, places.clamp(max=probabilities.shape[1] - 1))
    inside[places >= probabilities.shape[1]] = 0
    before = torch.nn.functional.pad(mass, (1, 0)).gather(1, block)
    found = block * BLOCK + _place(inside.cumsum(-1, dtype=torch.float64), wanted - before)
    return [int(token) for token in found.flatten().tolist()]


def _from_the_likeliest(logits: torch.Tensor, samplers: list[Sampler]) -> list[int]:
    """logits: [rows, vocab] → a token each, from what min-p, top-k and the nucleus (Holtzman et al. 2020) leave.

    All three keep a beginning of the tokens in order of probability, mostly a short one. Only a row whose beginning is
    longer than those of FIRST has its whole vocabulary sorted, which depends on this row alone.
    """
    probabilities = _tempered(logits, samplers)
    whole = probabilities.sum(-1, keepdim=True, dtype=torch.float64)
    found, left = [0] * len(samplers), list(range(len(samplers)))
    for count in (*FIRST, probabilities.shape[1]):
        some = probabilities if len(left) == len(samplers) else probabilities[left]
        last = count >= probabilities.shape[1]
        ordered, tokens = some.sort(descending=True, stable=True) if last else some.topk(count)
        asked = [samplers[row] for row in left]
        done = [last] * len(left) if last else _is_short(ordered, whole[left], asked)
        if rows := [place for place, one in enumerate(done) if one]:
            drawn = _narrowed(ordered[rows], tokens[rows], whole[left][rows], [asked[place] for place in rows])
            for place, token in zip(rows, drawn, strict=True):
                found[left[place]] = token
        left = [row for row, one in zip(left, done, strict=True) if not one]
        if not left:
            break
    return found


def _is_short(ordered: torch.Tensor, whole: torch.Tensor, samplers: list[Sampler]) -> list[bool]:
    """ordered: [rows, n], the likeliest · whole: [rows, 1] → [rows], whether a row keeps none beyond these."""
    asked = [one.sampling for one in samplers]
    by_min_p = ordered[:, -1:] < ordered[:, :1] * _column([s.min_p for s in asked], ordered)
    nucleus = ordered.sum(-1, keepdim=True, dtype=torch.float64) >= whole * _column([s.top_p for s in asked], whole)
    sure = zip(by_min_p.flatten().tolist(), nucleus.flatten().tolist(), samplers, strict=True)
    count = ordered.shape[1]
    return [a or 0 < one.sampling.top_k <= count or (b and _by_nucleus_alone(one)) for a, b, one in sure]


def _by_nucleus_alone(one: Sampler) -> bool:
    return one.sampling.top_k <= 0 and one.sampling.min_p <= 0


def _narrowed(ordered: torch.Tensor, tokens: torch.Tensor, whole: torch.Tensor, samplers: list[Sampler]) -> list[int]:
    """ordered, tokens: [rows, n], the likeliest first · whole: [rows, 1] → a token each.

    The nucleus is that of what min-p and top-k left.
    """
    asked = [one.sampling for one in samplers]
    ordered[ordered < ordered[:, :1] * _column([s.min_p for s in asked], ordered)] = 0
    ranks = torch.arange(ordered.shape[1], device=ordered.device)
    ordered[ranks >= _column([s.top_k if s.top_k > 0 else len(ranks) for s in asked], ordered)] = 0
    mass = ordered.cumsum(-1, dtype=torch.float64)
    before = mass - ordered  # in front of each token: the first always stays
    left = torch.where(_column([_by_nucleus_alone(one) for one in samplers], mass) > 0, whole, mass[:, -1:])
    ordered[before >= left * _column([s.top_p for s in asked], mass)] = 0
    mass = ordered.cumsum(-1, dtype=torch.float64)
    found = tokens.gather(1, _place(mass, _chances(samplers, mass)))
    return [int(token) for token in found.flatten().tolist()]


def _tempered(logits: torch.Tensor, samplers: list[Sampler]) -> torch.Tensor:
    """[rows, vocab] fp32 probabilities at each row's temperature. Changes the logits."""
    logits = logits.float()
    heat = _column([min(one.sampling.temperature, HOTTEST) for one in samplers], logits)
    return torch.softmax(logits.sub_(logits.amax(-1, keepdim=True)).div_(heat), -1)


def _chances(samplers: list[Sampler], mass: torch.Tensor) -> torch.Tensor:
    """mass: [rows, n] cumulated → [rows, 1], where each row's chance falls in it."""
    return _column([one.chance() for one in samplers], mass) * mass[:, -1:]


def _place(mass: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """mass: [rows, n] cumulated · wanted: [rows, 1] → [rows, 1], the places where it falls. None has probability 0."""
    whole = mass[:, -1:]
    return torch.searchsorted(mass, torch.minimum(wanted, whole.nextafter(whole * 0)), right=True)


def _column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """[rows, 1] on the device and of the type of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
