"""One forward over a forest, without a cache: what scoring and training have in common.

Each node attends to itself and to what stands before it in its tree, so all sequences of a forest go through the base
side by side, and a beginning that they share goes once. Spare rows fill the last block: they see only themselves and
nobody sees them.
"""

from collections.abc import Callable, Generator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F

from persona.engine.decoder import Decoder
from persona.engine.forest import Forest, packed
from persona.engine.lora import Resident
from persona.engine.weights import Projection

Factors = Callable[[int, str], tuple[torch.Tensor, torch.Tensor] | None]  # a [in, rank], b [rank, out], scaled
ROUND = 64  # rows to which a forward is filled up: oneDNN compiles a kernel for every number of rows
HEAD_ROWS = 64  # targets whose logits are in memory at once


class Branches:
    """All nodes of a forest as one pass: implements decoder.Pass. `tokens`: [rows], nodes and then spare rows."""

    def __init__(self, decoder: Decoder, forest: Forest, factors: Factors) -> None:
        device, nodes = decoder.device, len(forest)
        self.spare = ROUND - nodes % ROUND  # at least one
        self.tokens = torch.tensor(forest.tokens + [0] * self.spare, device=device)
        self.rotary = decoder.rotary(torch.tensor(forest.positions + [0] * self.spare, device=device))
        self.mask = torch.eye(nodes + self.spare, dtype=torch.bool)
        self.mask[:nodes, :nodes] = torch.from_numpy(forest.seen())
        self.mask = self.mask.to(device)
        self._factors = factors

    def project(self, layer: int, target: str, base: Projection, x: torch.Tensor) -> torch.Tensor:
        y = x @ base.dense(x.dtype)
        if base.bias is not None:
            y = y + base.bias.to(y.dtype)
        found = self._factors(layer, target)
        return y if found is None else y + (x @ found[0]) @ found[1]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attended(q, k, v, self.mask)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q: [rows, heads, dim], k and v: [nodes, kv_heads, dim], mask: [rows, nodes] → [rows, heads · dim]."""
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1).reshape(q.shape[1], -1)


def scores(
    decoder: Decoder, wanted: Sequence[tuple[list[int], list[int], Resident | None]], size: int
) -> Generator[None, None, list[list[float]]]:
    """Log-probabilities for each (tokens, targets, adapter), in slices of one layer over at most `size` nodes.

    Neighbours with one adapter share a forest. Each item is a slice; the result is one list per request.
    """
    found: list[list[float]] = []
    for _, group in groupby(wanted, key=lambda one: id(one[2])):
        members = list(group)
        # The last token of a sequence is only predicted.
        for forest, paths in packed([tokens[: targets[-1]] for tokens, targets, _ in members], size):
            some = [(members[index], path) for index, path in paths]
            rows = [path[target - 1] for (_, targets, _), path in some for target in targets]
            following = [tokens[target] for (tokens, targets, _), _ in some for target in targets]
            values = yield from _logprobs(decoder, forest, members[0][2], rows, following)
            start = 0
            for (_, targets, _), _ in some:
                found.append(values[start : start + len(targets)])
                start += len(targets)
    return found


def _logprobs(
    decoder: Decoder, forest: Forest, adapter: Resident | None, rows: list[int], following: list[int]
) -> Generator[None, None, list[float]]:
    """Of the tokens `following`, each after the node in `rows`."""

    def factors(layer: int, target: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        return adapter.factors.get((layer, target)) if adapter else None

    run = Branches(decoder, forest, factors)
    with torch.no_grad():
        h = decoder.embedded(run.tokens)
    for layer in range(decoder.shape.layers):
        with torch.no_grad():
            h = decoder.layer(layer, h, run)
        yield
    values: list[float] = []
    for start in range(0, len(rows), HEAD_ROWS):
        with torch.no_grad():
            logits = decoder.logits(h[torch.tensor(rows[start : start + HEAD_ROWS], device=h.device)])
            wanted = torch.tensor(following[start : start + HEAD_ROWS], device=h.device)
            values += (logits.gather(1, wanted[:, None]).squeeze(1) - logits.logsumexp(-1)).tolist()
        yield
    return values
