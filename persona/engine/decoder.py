"""The Llama family's decoder, ours: one function per layer over fused projections, used by serving and training alike.

Whatever a step needs beyond the base (cache, adapters, gradients) comes in as a `Pass`: nothing is set on the model
and nothing survives the step. Equal to transformers' models of the same weights (tests/engine/test_decoder.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import safe_open

from persona.engine import weights, words
from persona.engine.device import Form
from persona.engine.shape import TARGETS, Shape
from persona.engine.weights import Projection
from persona.engine.words import Words

WORDS = 4096  # of the head, at a time


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's frozen weights. Norms are fp32 vectors."""

    attn_norm: torch.Tensor
    mlp_norm: torch.Tensor
    projections: dict[str, Projection]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


class Pass(Protocol):
    """What one forward adds to the base."""

    @property
    def rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the tokens' positions, from `Decoder.rotary`."""
        ...

    def project(self, layer: int, target: str, base: Projection, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in] → [tokens, out], adapters included."""
        ...

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q: [tokens, heads, dim], k and v: [tokens, kv_heads, dim] → [tokens, heads · dim]."""
        ...


Half = Callable[[int, torch.Tensor, Pass], torch.Tensor]  # of a layer: its index, h [tokens, hidden] → the same


class Decoder:
    """Embedding, layers, head. Activations between layers are fp32; projections compute in `dtype`."""

    def __init__(self, shape: Shape, layers: Sequence[Layer], embed: Words, norm: torch.Tensor, head: Words) -> None:
        self.shape, self.layers = shape, tuple(layers)
        self.embed, self.norm, self.head = embed, norm, head
        self.device = norm.device
        self.dtype = weights.compute_dtype(self.device.type)
        self._inv_freq = torch.tensor(shape.inv_freq, dtype=torch.float32, device=self.device)

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [tokens] → [tokens, hidden], fp32."""
        return self.embed[tokens].float()

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: [tokens] → cos and sin [tokens, 1, head_dim]."""
        cos, sin = (torch.cat([part, part], -1).unsqueeze(1) for part in self.turns(positions))
        return cos.to(self.dtype), sin.to(self.dtype)

    def turns(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: [tokens] → cos and sin [tokens, head_dim / 2], fp32: one half, as both are alike."""
        angles, scale = positions.float()[:, None] * self._inv_freq, self.shape.rope_scale
        return angles.cos() * scale, angles.sin() * scale

    @property
    def halves(self) -> tuple[Half, Half]:
        """A layer is one after the other."""
        return self.attention, self.mlp

    def layer(self, index: int, h: torch.Tensor, run: Pass) -> torch.Tensor:
        """One layer: h [tokens, hidden] fp32 → the same."""
        return self.mlp(index, self.attention(index, h, run), run)

    def attention(self, index: int, h: torch.Tensor, run: Pass) -> torch.Tensor:
        layer = self.layers[index]
        weight = layer.projections
        x = self._normed(h, layer.attn_norm)
        q, k, v = self.heads(index, run.project(index, "qkv", weight["qkv"], x), run.rotary)
        attended = run.attend(index, q, k, v)
        return h + run.project(index, "o", weight["o"], attended)

    def mlp(self, index: int, h: torch.Tensor, run: Pass) -> torch.Tensor:
        layer = self.layers[index]
        weight = layer.projections
        x = self._normed(h, layer.mlp_norm)
        gate, up = run.project(index, "gate_up", weight["gate_up"], x).chunk(2, -1)
        return h + run.project(index, "down", weight["down"], F.silu(gate) * up)

    def heads(
        self, index: int, projected: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What attention sees of a layer's qkv projection [tokens, out]: q, k and v [tokens, heads, dim]."""
        layer, shape = self.layers[index], self.shape
        heads = projected.view(len(projected), -1, shape.head_dim)
        q, k, v = torch.split(heads, [shape.heads, shape.kv_heads, shape.kv_heads], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._normed(q.float(), layer.q_norm), self._normed(k.float(), layer.k_norm)
        return rotate(q, *rotary), rotate(k, *rotary), v

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """h: [rows, hidden] → [rows, vocab], fp32."""
        normed = self.spoken(h)
        parts = [voiced(normed, piece) for _, piece in self.pieces()]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def spoken(self, h: torch.Tensor) -> torch.Tensor:
        """What the head multiplies: h [rows, hidden] → the same."""
        return F.rms_norm(h, self.norm.shape, self.norm, self.shape.eps)

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The head, some words at a time: [words, hidden] each. On the CPU in fp32: what is held otherwise is written
        out piece by piece, never whole, and each over the one before."""
        if self.device.type != "cpu":
            yield slice(len(self.head)), self.head[:]
            return
        for start in range(0, len(self.head), WORDS):
            words = slice(start, min(start + WORDS, len(self.head)))
            yield words, self.head.floats(words)

    def widen(self) -> None:
        """Hold embedding and head in fp32, as plain torch multiplies them on a CPU: quicker, and two to four times the
        bytes."""
        tied = self.head is self.embed
        self.embed = self.embed.written(self.device.type, torch.float32)
        self.head = self.embed if tied else self.head.written(self.device.type, torch.float32)

    def nbytes(self) -> int:
        """Bytes of the base's weights in memory."""
        projections = sum(p.nbytes() for layer in self.layers for p in layer.projections.values())
        return projections + self.embed.nbytes() + (0 if self.head is self.embed else self.head.nbytes())

    def _normed(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(h, weight.shape, weight, self.shape.eps).to(self.dtype)


def voiced(normed: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    """normed: [rows, hidden] fp32 · piece: [words, hidden] → logits [rows, words], fp32."""
    if piece.dtype == torch.float32:
        return F.linear(normed, piece)
    return torch.mm(normed.to(piece.dtype), piece.t(), out_dtype=torch.float32)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (RoFormer, Su et al. 2021) with the halves layout of Hugging Face checkpoints."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def load(folder: Path, form: Form, device: str) -> Decoder:
    """The decoder of a prepared model. Its tensors are made outside any grad scope and never require grad."""
    shape = Shape.read(folder)
    with safe_open(folder / "weights.safetensors", framework="pt") as file:
        parts = _Parts(file)
        embed = words.load(parts, "embed")
        head = embed if shape.tied else words.load(parts, "head")
        if device != "cpu":
            embed, head = _there(embed, head, device)
        layers = [_layer(parts, i, shape, form, device) for i in range(shape.layers)]
        return Decoder(shape, layers, embed, parts["norm"].float().to(device), head)


def _there(embed: Words, head: Words, device: str) -> tuple[Words, Words]:
    """Both on a device that multiplies bf16 with a result in fp32; one of them if they are one."""
    dtype = weights.compute_dtype(device)
    moved = embed.written(device, dtype)
    return moved, moved if head is embed else head.written(device, dtype)


def _layer(parts: "_Parts", index: int, shape: Shape, form: Form, device: str) -> Layer:
    def norm(name: str) -> torch.Tensor | None:
        tensor = parts.get(f"layers.{index}.{name}")
        return None if tensor is None else tensor.float().to(device)

    attn, mlp = norm("attn_norm"), norm("mlp_norm")
    assert attn is not None
    assert mlp is not None
    made = {
        target: weights.load(parts, f"layers.{index}.{target}", shape.projection(target), form, device)
        for target in TARGETS
    }
    return Layer(attn, mlp, made, norm("q_norm"), norm("k_norm"))


class _Parts(dict[str, torch.Tensor]):
    """Tensors of an open safetensors file, read when asked for and not kept."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self._file = file
        self._names = frozenset(file.keys())

    def __missing__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def get(self, name: str, default: torch.Tensor | None = None) -> torch.Tensor | None:  # type: ignore[override]
        return self[name] if name in self._names else default
