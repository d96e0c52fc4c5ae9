"""The shortest possible use of the decoder: one sequence, no cache, no adapter. The yardstick for everything else."""

from collections.abc import Generator
from typing import TypeVar

import torch
import torch.nn.functional as F

from persona.engine.decoder import Decoder
from persona.engine.weights import Projection

Result = TypeVar("Result")


class Whole:
    """A pass over one whole sequence: implements persona.engine.decoder.Pass."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        self.rotary = decoder.rotary(torch.arange(length))

    def project(self, layer: int, target: str, base: Projection, x: torch.Tensor) -> torch.Tensor:
        return base(x)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(q.shape[2], -1)


@torch.no_grad()
def logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocab]"""
    run = Whole(decoder, len(tokens))
    h = decoder.embedded(torch.tensor(tokens))
    for layer in range(decoder.shape.layers):
        h = decoder.layer(layer, h, run)
    return decoder.logits(h)


def drained(slices: Generator[None, None, Result]) -> Result:
    """The result of work in slices."""
    while True:
        try:
            next(slices)
        except StopIteration as ended:
            result: Result = ended.value
            return result


def some_tokens(length: int, vocab: int = 320, seed: int = 1) -> list[int]:
    """Ordinary tokens, no special ones."""
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
