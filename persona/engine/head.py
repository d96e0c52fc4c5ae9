"""The head in slices, for scoring and training: some words of the vocabulary at a time, forward and back.

Written out by hand, since autograd would go through the whole vocabulary without a stop. Each item of a generator here
is a slice.
"""

from collections.abc import Generator, Iterator

import torch
import torch.nn.functional as F

from persona.engine.decoder import Decoder, voiced

ROWS = 64  # targets whose logits are in memory at once
_SOFTMAX_ROWS = 16


def logits(decoder: Decoder, normed: torch.Tensor) -> Generator[None, None, torch.Tensor]:
    """normed: [rows, hidden] fp32, of `Decoder.spoken` → [rows, vocab] fp32."""
    made = normed.new_empty(len(normed), decoder.shape.vocab)
    with torch.no_grad():
        for words, piece in decoder.pieces():
            made[:, words] = voiced(normed, piece)
            yield
    return made


def gradient(decoder: Decoder, slope: torch.Tensor) -> Generator[None, None, torch.Tensor]:
    """slope: of the logits, [rows, vocab] fp32 → of what the head multiplies, [rows, hidden] fp32."""
    made = slope.new_zeros(len(slope), decoder.shape.hidden)
    for words, piece in decoder.pieces():
        made += slope[:, words].to(piece.dtype) @ piece
        yield
    return made


def cross_entropy(z: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor) -> Generator[None, None, float]:
    """z: logits [rows, vocab] → the weighted sum of the rows' losses in nats; z becomes its slope."""
    loss = 0.0
    for rows in _rows(len(z)):
        some = F.log_softmax(z[rows], -1)
        at = wanted[rows, None]
        loss -= float((some.gather(1, at)[:, 0] * weights[rows]).sum())
        slope = some.exp_().scatter_add_(1, at, torch.full_like(at, -1, dtype=z.dtype))
        z[rows] = slope.mul_(weights[rows, None])
        yield
    return loss


def divergence(z: torch.Tensor, taught: torch.Tensor, weights: torch.Tensor) -> Generator[None, None, float]:
    """Kullback-Leibler of logits `z` from the distribution of `taught`, both [rows, vocab] → the weighted sum over the
    rows in nats; z becomes its slope."""
    loss = 0.0
    for rows in _rows(len(z)):
        some, aim = F.log_softmax(z[rows], -1), F.log_softmax(taught[rows], -1)
        share = aim.exp()
        loss += float(((share * (aim - some)).sum(-1) * weights[rows]).sum())
        z[rows] = some.exp_().sub_(share).mul_(weights[rows, None])
        yield
    return loss


def _rows(count: int) -> Iterator[slice]:
    return (slice(start, start + _SOFTMAX_ROWS) for start in range(0, count, _SOFTMAX_ROWS))
