"""Embedding and head in eight bits: what they stand for, bit for bit, and what steps make of them."""

import gguf
import numpy as np
import pytest
import torch
from models import Models

from persona.engine import words
from persona.engine.decoder import Decoder
from persona.engine.prepare import Prepared
from persona.engine.words import Words


def q8_0(vocab: int, hidden: int, seed: int = 1) -> tuple[Words, torch.Tensor]:
    """Random words, and what they stand for."""
    numbers = np.random.default_rng(seed).normal(0, 0.1, (vocab, hidden)).astype(np.float32)
    blocks = gguf.quantize(numbers, gguf.GGMLQuantizationType.Q8_0)
    parts = {f"embed.{name}": part for name, part in words.from_q8_0(blocks).items()}
    meant = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    return words.load(parts, "embed"), torch.from_numpy(np.ascontiguousarray(meant)).bfloat16()


def test_words_in_eight_bits_are_what_the_file_means() -> None:
    held, meant = q8_0(70, 96)
    assert torch.equal(held[:], meant)
    assert torch.equal(held[10:20], meant[10:20])
    some = torch.tensor([69, 0, 3, 3])
    assert torch.equal(held[some], meant[some])
    assert (len(held), held.dtype) == (70, torch.bfloat16)
    assert held.nbytes() < 0.6 * meant.nbytes
    assert torch.equal(held.written("cpu", torch.float32)[:], meant.float())


def test_the_embedded_models_words_stay_in_eight_bits(embedded_model: Prepared) -> None:
    from persona.engine import decoder

    ours = decoder.load(embedded_model.folder, "int4", "cpu")
    assert ours.head is ours.embed
    assert ours.head.scales is not None
    assert ours.head.values.dtype == torch.int8
    before = ours.nbytes()
    ours.widen()
    assert ours.nbytes() - before == 4 * 49152 * 576 - (49152 * 576 + 4 * 49152 * 18)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_computes_with_them_as_with_the_numbers(models: Models, tied: bool) -> None:
    ours = models.decoder("llama" if tied else "llama-untied")
    compact, meant = q8_0(ours.shape.vocab, ours.shape.hidden)
    other, numbers = q8_0(ours.shape.vocab, ours.shape.hidden, seed=2)
    small = Decoder(ours.shape, ours.layers, compact, ours.norm, compact if tied else other)
    plain = Decoder(ours.shape, ours.layers, Words(meant), ours.norm, Words(meant if tied else numbers))
    tokens = torch.arange(3, 40)
    assert torch.equal(small.embedded(tokens), plain.embedded(tokens))
    h = torch.randn(5, ours.shape.hidden, generator=torch.Generator().manual_seed(2))
    assert torch.equal(small.logits(h), plain.logits(h))
    small.widen()
    assert (small.head is small.embed) == tied
    assert torch.allclose(small.logits(h), plain.logits(h), atol=1e-5)
