"""Forwards over a forest, without the paged cache: what scoring and training have in common.

Each node attends to itself and to what stands before it in its tree, so all sequences of a forest go through the base
side by side, and a beginning that they share goes once. Scoring takes a forest of any size in chunks and keeps of each
layer the keys and values that later chunks look back to:

    before        │ chunk         │ spare
    kept k and v  │ this forward  │ rows that fill the last block: they see only themselves, nobody sees them
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from persona.engine import head
from persona.engine.decoder import Decoder
from persona.engine.forest import Chunk, Forest
from persona.engine.lora import Resident
from persona.engine.weights import ROUND, Projection

Factors = Callable[[int, str], tuple[torch.Tensor, torch.Tensor] | None]  # a [in, rank], b [rank, out], scaled


class Kept:
    """A layer's keys and values [before, kv_heads, dim] of the nodes that later chunks look back to."""

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def joined(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All that a chunk's rows may see, k and v [before + rows, …]; what stands at `keep` is kept."""
        if layer in self._pairs:
            keys, values = self._pairs[layer]
            k, v = torch.cat([keys, k]), torch.cat([values, v])
        self._pairs[layer] = k[keep], v[keep]
        return k, v


class Branches:
    """A chunk of a forest as one pass: implements decoder.Pass. `tokens`: [rows], nodes and then spare rows."""

    def __init__(self, decoder: Decoder, chunk: Chunk, factors: Factors, kept: Kept | None = None) -> None:
        """kept: of the chunks before; needed where there is more than one."""
        device, nodes, before = decoder.device, len(chunk), chunk.seen.shape[1] - len(chunk)
        self.spare = ROUND - nodes % ROUND  # at least one
        self.tokens = torch.tensor(chunk.tokens + [0] * self.spare, device=device)
        self.rotary = decoder.rotary(torch.tensor(chunk.positions + [0] * self.spare, device=device))
        self.mask = torch.zeros(nodes + self.spare, before + nodes + self.spare, dtype=torch.bool)
        self.mask[:nodes, : before + nodes] = torch.from_numpy(chunk.seen)
        self.mask[nodes:, before + nodes :] = torch.eye(self.spare, dtype=torch.bool)
        self.mask = self.mask.to(device)
        self._keep = torch.tensor(chunk.keep, dtype=torch.int64, device=device)
        self._factors, self._kept = factors, kept

    def project(self, layer: int, target: str, base: Projection, x: torch.Tensor) -> torch.Tensor:
        y = x @ base.dense(x.dtype)
        if base.bias is not None:
            y = y + base.bias.to(y.dtype)
        found = self._factors(layer, target)
        return y if found is None else y + (x @ found[0]) @ found[1]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self._kept is not None:
            k, v = self._kept.joined(layer, k, v, self._keep)
        return attended(q, k, v, self.mask)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q: [rows, heads, dim], k and v: [nodes, kv_heads, dim], mask: [rows, nodes] → [rows, heads · dim]."""
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if not (grouped := q.device.type == "cpu"):  # CUDA has no quick kernel for a mask and heads that share keys
        k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1).reshape(q.shape[1], -1)


def scores(
    decoder: Decoder, wanted: Sequence[tuple[list[int], list[int], Resident | None]], size: int
) -> Generator[None, None, list[list[float]]]:
    """Log-probabilities for each (tokens, targets, adapter), in slices of half a layer over at most `size` nodes.

    Neighbours with one adapter share a forest. Each item is a slice; the result is one list per request.
    """
    found = [[0.0] * len(targets) for _, targets, _ in wanted]
    for _, group in groupby(range(len(wanted)), key=lambda index: id(wanted[index][2])):
        forest, asked = Forest(), list[_Asked]()
        members = sorted(group, key=lambda index: wanted[index][0])  # walked branch by branch
        for index in members:
            tokens, targets, _ = wanted[index]
            path = forest.add(tokens[: targets[-1]])  # the last token is only predicted
            asked += [_Asked(path[target - 1], tokens[target], index, n) for n, target in enumerate(targets)]
        for one, value in (yield from _logprobs(decoder, forest, wanted[members[0]][2], asked, size)):
            found[one.index][one.place] = value
    return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """How likely is `token` after `node`? The answer stands at `place` among those for request `index`."""

    node: int
    token: int
    index: int
    place: int


def _logprobs(
    decoder: Decoder, forest: Forest, adapter: Resident | None, asked: list[_Asked], size: int
) -> Generator[None, None, list[tuple[_Asked, float]]]:
    """An answer to each of `asked`."""

    def factors(layer: int, target: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return adapter.factors.get((layer, target)) if adapter else None

    answers: list[tuple[_Asked, float]] = []
    kept = Kept()
    for chunk in forest.chunks(max(1, size - 1)):  # and a spare row
        run = Branches(decoder, chunk, factors, kept)
        with torch.no_grad():
            h = decoder.embedded(run.tokens)
        for layer in range(decoder.shape.layers):
            for half in decoder.halves:
                with torch.no_grad():
                    h = half(layer, h, run)
                yield
        here = [one for one in asked if 0 <= one.node - chunk.start < len(chunk)]
        for start in range(0, len(here), head.ROWS):
            some = here[start : start + head.ROWS]
            logits = yield from head.logits(decoder, decoder.spoken(h[[one.node - chunk.start for one in some]]))
            wanted = torch.tensor([one.token for one in some], device=h.device)
            values = logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(-1)
            answers += zip(some, values.tolist(), strict=True)
            yield
    return answers
