"""The trainable form of an adapter: low-rank factors of the upper layers, in one flat vector for the optimizer.

Only the last layers have factors; below them the model is the bare base, in training (nothing is kept or computed twice
there) and in serving. Chosen by measurement among sparser and denser forms (docs/BENCHMARKS.md). Exports exactly to
ordinary LoRA: it is one.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from persona.engine import adapter_file
from persona.engine.adapter_file import Adapter, Array, Header
from persona.engine.protocol import Plan
from persona.engine.shape import TARGETS, Shape
from persona.errors import TrainingFailed


@dataclass(frozen=True, slots=True)
class Factor:
    """One adapted projection: leaves that share the flat vector's memory, and whose gradients share its gradient's.

    a: [in, rank] · b: [rank, out]
    """

    a: torch.Tensor
    b: torch.Tensor


class SparseAdapter:
    """All factors of one adapter; `values` is the vector that an optimizer sees, fp32, with its gradient."""

    def __init__(self, shape: Shape, plan: Plan, base: str, dtype: torch.dtype, device: torch.device) -> None:
        layers = max(1, round(plan.layers * shape.layers))
        self.header = Header("sparse", base, shape.layers - layers, layers, plan.rank, plan.alpha)
        self.factors: dict[tuple[int, str], Factor] = {}
        size = layers * plan.rank * sum(sum(shape.projection(target)) for target in TARGETS)
        self.values = torch.zeros(size, device=device)
        self.values.grad = torch.zeros_like(self.values)
        self._shape, self._dtype, self._seed = shape, dtype, plan.seed
        self._made = 0  # values that belong to a factor already

    def build(self) -> Iterator[None]:
        """Make the factors, one projection's at a time: each item is a short piece of work. B is zero at first."""
        rank = self.header.rank
        for layer in range(self.header.first, self._shape.layers):
            for target in TARGETS:
                out, inputs = self._shape.projection(target)
                a, b = self._leaf(inputs, rank), self._leaf(rank, out)
                with torch.no_grad():
                    a.copy_(torch.from_numpy(first_a(self._seed, layer, target, inputs, rank)))
                self.factors[layer, target] = Factor(a, b)
                yield

    @torch.no_grad()
    def start_from(self, adapter: Adapter) -> None:
        """Begin with the values of an earlier version. Raises TrainingFailed if its form is another."""
        if adapter.header != self.header:
            raise TrainingFailed("What this run should start from has another form than the plan: train from the base.")
        for (layer, target), factor in self.factors.items():
            pair = adapter.values(layer, target)
            assert pair is not None  # by the header
            factor.a.copy_(torch.from_numpy(pair[0]).t())
            factor.b.copy_(torch.from_numpy(pair[1]).t())

    @torch.no_grad()
    def halve(self, begun: torch.Tensor | None) -> None:
        """Go half of the way back to the values `begun`, or to the bare base: from there to half of the update."""
        if begun is not None:
            self.values.lerp_(begun, 0.5)
            return
        for factor in self.factors.values():
            factor.b.mul_(0.5)

    def scaled(self, layer: int, target: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What a projection adds: A [in, rank] and B [rank, out] with its scale; None where nothing trains."""
        factor = self.factors.get((layer, target))
        if factor is None:
            return None
        return factor.a.to(self._dtype), (factor.b * self.header.scale).to(self._dtype)

    @torch.no_grad()
    def norm(self) -> float:
        """‖update‖_F over all projections, relative to their number of output rows: about ‖update · x‖ for |x| = 1."""
        factors = self.factors.values()
        parts = [((factor.a.t() @ factor.a) * (factor.b @ factor.b.t())).sum() for factor in factors]
        squares = float(torch.stack(parts).double().sum()) if parts else 0.0  # waits for a GPU once, not for each
        rows = sum(factor.b.shape[1] for factor in factors)
        return float((max(squares, 0.0) / max(rows, 1)) ** 0.5) * self.header.scale

    def save(self, folder: Path) -> None:
        """Write adapter.safetensors. Raises TrainingFailed for values that are not finite."""
        if not self.values.isfinite().all():
            raise TrainingFailed("The trained values are not finite; nothing was published.")
        tensors: dict[str, Array] = {}
        for target in TARGETS:
            mine = [factor for (_, name), factor in self.factors.items() if name == target]
            a, b = _stacked([factor.a for factor in mine]), _stacked([factor.b for factor in mine])
            tensors |= adapter_file.rounded(target, a, b)
        adapter_file.write(folder, self.header, tensors)

    def _leaf(self, rows: int, columns: int) -> torch.Tensor:
        """The next values of the vector as a leaf [rows, columns]."""
        span = slice(self._made, self._made + rows * columns)
        self._made = span.stop
        assert self.values.grad is not None
        leaf = self.values[span].view(rows, columns).requires_grad_()
        leaf.grad = self.values.grad[span].view(rows, columns)
        return leaf


def first_a(seed: int, layer: int, target: str, inputs: int, rank: int) -> Array:
    """A before training: uniform within ±1/√in as in PEFT, fp32 [in, rank], the same on every machine."""
    name = f"{seed}/{layer}/{target}".encode()
    key = int.from_bytes(hashlib.sha256(name).digest()[:16], "big")
    # Raw generator output is the part of numpy's random API that never changes; 24 bits of it are exact in fp32.
    raw = np.random.Philox(key=key).random_raw(inputs * rank) >> np.uint64(40)
    unit = raw.astype(np.float32) * np.float32(2**-23) - np.float32(1)
    return (unit * np.float32(inputs**-0.5)).reshape(inputs, rank)


def _stacked(leaves: list[torch.Tensor]) -> Array:
    """fp32 [layers, columns, rows]: as LoRA writes its factors."""
    stacked: Array = np.stack([leaf.detach().t().cpu().numpy() for leaf in leaves])
    return stacked
