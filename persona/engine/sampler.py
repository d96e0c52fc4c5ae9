"""From logits to the next token, for all rows of a step at once.

Penalties and biases touch the tokens that they name, a grammar rules tokens out; then come temperature, min-p, top-k
and the nucleus, in vLLM's order. A row that wants the likeliest token and nothing else costs its share of two searches
for the highest; the others are computed together, each by its own numbers, in torch here or by compiled code
(kernels/draw.c). Chance comes from a generator of the row's own, so a seeded reply does not depend on who else is in
the batch.
"""

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch

from persona.engine.grammar import Grammar
from persona.engine.protocol import Sampling

COLDEST = 1e-5  # temperatures up to here are greedy: dividing by them would overflow
FIRST = (64, 1024)  # tokens that a row which narrows its draw looks at, before its whole vocabulary is sorted
BLOCK = 128  # tokens whose probabilities are added up before those of single tokens are looked at
HOTTEST = 1e30  # and from here on all alike; an infinite one would make NaN of a token that is ruled out
NOT_FINITE = -1  # in place of a token: what is left of the row's logits has no largest

# logits: [rows, vocab], which may be changed · wishes: fp64 [rows, 5], a Wish each → a token each, or NOT_FINITE
Choose = Callable[[torch.Tensor, np.ndarray], list[int]]


class Wish(NamedTuple):
    """How one row's next token is chosen among what penalties, biases and a grammar left."""

    temperature: float  # 0: the likeliest token
    top_k: float  # 0: no limit
    top_p: float
    min_p: float
    chance: float  # in [0, 1)


_LIKELIEST = Wish(0.0, 0.0, 1.0, 0.0, 0.0)


class Sampler:
    """Draws for one sequence, whose prompt is `prompt` and whose reply is held to `grammar`."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), grammar: Grammar | None = None) -> None:
        self.sampling = sampling
        self.grammar = grammar
        self._random = random.Random(None if sampling.seed is None else sampling.seed % (1 << 64))  # None: any
        self._greedy = not (sampling.temperature > COLDEST and sampling.top_p > 0)
        self._heat = min(sampling.temperature, HOTTEST)
        self.tally = Tally(prompt if sampling.repetition_penalty != 1 else ()) if _penalises(sampling) else None

    def chance(self) -> float:
        """The next number in [0, 1) of this sequence."""
        return self._random.random()

    def wish(self) -> Wish:
        """For the next token."""
        if self._greedy:
            return _LIKELIEST
        asked = self.sampling
        return Wish(self._heat, max(asked.top_k, 0), asked.top_p, asked.min_p, self.chance())

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


def draw(logits: torch.Tensor, samplers: list[Sampler], choose: Choose) -> list[int]:
    """logits: [rows, vocab] → one token a row, or NOT_FINITE. Logits of rows that ask for more are changed in place."""
    _penalise(logits, [(row, one) for row, one in enumerate(samplers) if one.tally is not None])
    _bias(logits, [(row, one) for row, one in enumerate(samplers) if one.sampling.logit_bias])
    _constrain(logits, [(row, one.grammar) for row, one in enumerate(samplers) if one.grammar is not None])
    tokens = choose(logits, np.array([one.wish() for one in samplers], np.float64))
    for one, token in zip(samplers, tokens, strict=True):
        if token != NOT_FINITE:
            one.took(token)
    return tokens


def in_torch(logits: torch.Tensor, wishes: np.ndarray) -> list[int]:
    """A Choose for any device."""
    finite = logits.amax(-1).isfinite().tolist()
    if not all(finite):
        logits = logits.nan_to_num()
    heat, top_k, top_p, min_p, _ = wishes.T
    greedy = heat == 0
    narrow = (top_k > 0) | (top_p < 1) | (min_p > 0)
    tokens = np.zeros(len(wishes), np.int64)
    if greedy.any():
        tokens[:] = logits.argmax(-1).tolist()
    for chosen, chosen_from in ((~greedy & ~narrow, _from_all), (~greedy & narrow, _from_the_likeliest)):
        if rows := chosen.nonzero()[0].tolist():
            some = logits if len(rows) == len(wishes) else logits[rows]
            tokens[rows] = chosen_from(some, wishes[rows])
    return [int(token) for token in np.where(finite, tokens, NOT_FINITE)]


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


def _from_all(logits: torch.Tensor, wishes: np.ndarray) -> list[int]:
    """logits: [rows, vocab] → a token each, from the whole vocabulary: first its block, then its place in there."""
    probabilities = _tempered(logits, wishes)
    whole = probabilities.shape[1] // BLOCK * BLOCK
    blocks = probabilities[:, :whole].reshape(len(wishes), -1 if whole else 0, BLOCK).sum(-1, dtype=torch.float64)
    rest = probabilities[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    mass = torch.cat([blocks, rest], 1).cumsum(-1)
    wanted = _chances(wishes, mass)
    block = _place(mass, wanted)
    places = block * BLOCK + torch.arange(BLOCK, device=mass.device)
    inside = probabilities.gather(1, places.clamp(max=probabilities.shape[1] - 1))
    inside[places >= probabilities.shape[1]] = 0
    before = torch.nn.functional.pad(mass, (1, 0)).gather(1, block)
    found = block * BLOCK + _place(inside.cumsum(-1, dtype=torch.float64), wanted - before)
    return [int(token) for token in found.flatten().tolist()]


def _from_the_likeliest(logits: torch.Tensor, wishes: np.ndarray) -> list[int]:
    """logits: [rows, vocab] → a token each, from what min-p, top-k and the nucleus (Holtzman et al. 2020) leave.

    All three keep a beginning of the tokens in order of probability, mostly a short one. Only a row whose beginning is
    longer than those of FIRST has its whole vocabulary sorted, which depends on this row alone.
    """
    probabilities = _tempered(logits, wishes)
    whole = probabilities.sum(-1, keepdim=True, dtype=torch.float64)
    found, left = np.zeros(len(wishes), np.int64), np.arange(len(wishes))
    for count in (*FIRST, probabilities.shape[1]):
        some = probabilities if len(left) == len(wishes) else probabilities[left.tolist()]
        last = count >= probabilities.shape[1]
        ordered, tokens = some.sort(descending=True, stable=True) if last else some.topk(count)
        done = np.full(len(left), last) if last else _is_short(ordered, whole[left.tolist()], wishes[left])
        if rows := done.nonzero()[0].tolist():
            mine = left[rows]
            found[mine] = _narrowed(ordered[rows], tokens[rows], whole[mine.tolist()], wishes[mine])
        left = left[~done]
        if not left.size:
            break
    return [int(token) for token in found]


def _is_short(ordered: torch.Tensor, whole: torch.Tensor, wishes: np.ndarray) -> np.ndarray:
    """ordered: [rows, n], the likeliest · whole: [rows, 1] → [rows], whether a row keeps none beyond these."""
    _, top_k, top_p, min_p, _ = wishes.T
    by_min_p = ordered[:, -1:] < ordered[:, :1] * _column(min_p, ordered)
    by_nucleus = ordered.sum(-1, keepdim=True, dtype=torch.float64) >= whole * _column(top_p, whole)
    nucleus = np.array(by_nucleus.flatten().tolist()) & _by_nucleus_alone(wishes)
    found: np.ndarray = np.array(by_min_p.flatten().tolist()) | (top_k > 0) & (top_k <= ordered.shape[1]) | nucleus
    return found


def _by_nucleus_alone(wishes: np.ndarray) -> np.ndarray:
    _, top_k, _, min_p, _ = wishes.T
    alone: np.ndarray = (top_k == 0) & (min_p <= 0)
    return alone


def _narrowed(ordered: torch.Tensor, tokens: torch.Tensor, whole: torch.Tensor, wishes: np.ndarray) -> list[int]:
    """ordered, tokens: [rows, n], the likeliest first · whole: [rows, 1] → a token each.

    The nucleus is that of what min-p and top-k left.
    """
    _, top_k, top_p, min_p, _ = wishes.T
    ordered[ordered < ordered[:, :1] * _column(min_p, ordered)] = 0
    ranks = torch.arange(ordered.shape[1], device=ordered.device)
    ordered[ranks >= _column(np.where(top_k > 0, top_k, len(ranks)), whole)] = 0
    mass = ordered.cumsum(-1, dtype=torch.float64)
    before = mass - ordered  # in front of each token: the first always stays
    left = torch.where(_column(_by_nucleus_alone(wishes), mass) > 0, whole, mass[:, -1:])
    ordered[before >= left * _column(top_p, mass)] = 0
    mass = ordered.cumsum(-1, dtype=torch.float64)
    found = tokens.gather(1, _place(mass, _chances(wishes, mass)))
    return [int(token) for token in found.flatten().tolist()]


def _tempered(logits: torch.Tensor, wishes: np.ndarray) -> torch.Tensor:
    """[rows, vocab] fp32 probabilities at each row's temperature. Changes the logits."""
    logits = logits.float()
    heat = _column(wishes[:, 0], logits)
    return torch.softmax(logits.sub_(logits.amax(-1, keepdim=True)).div_(heat), -1)


def _chances(wishes: np.ndarray, mass: torch.Tensor) -> torch.Tensor:
    """mass: [rows, n] cumulated → [rows, 1], where each row's chance falls in it."""
    return _column(wishes[:, 4], mass) * mass[:, -1:]


def _place(mass: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """mass: [rows, n] cumulated · wanted: [rows, 1] → [rows, 1], the places where it falls. None has probability 0."""
    whole = mass[:, -1:]
    return torch.searchsorted(mass, torch.minimum(wanted, whole.nextafter(whole * 0)), right=True)


def _column(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """[rows, 1] on the device and of the type of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
