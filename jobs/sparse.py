"""The trainable form of an adapter: a flat vector of values, scattered into dense B factors for the products.

A is frozen and follows from the plan's seed, B trains only under its mask (LoRI, Zhang et al. 2025): what is stored
is the vector and nothing else. Exports exactly to ordinary LoRA, because B is an ordinary matrix.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from persona.engine import adapter_file
from persona.engine.adapter_file import Adapter, Header
from persona.engine.protocol import Plan
from persona.engine.shape import TARGETS, Shape
from persona.errors import TrainingFailed

_FP16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class Factor:
    """One adapted projection. a: [in, rank], frozen · b: [rank, out], fp32 leaf · where: flat places in b."""

    a: torch.Tensor
    b: torch.Tensor
    where: torch.Tensor
    span: slice  # of the value vector


class SparseAdapter:
    """All factors of one adapter, and the vector of values that an optimizer sees."""

    def __init__(self, shape: Shape, plan: Plan, base: str, dtype: torch.dtype, device: torch.device) -> None:
        layers = min(plan.top_layers or shape.layers, shape.layers)
        self.header = Header(
            "sparse", base, shape.layers - layers, layers, plan.rank, plan.alpha, plan.density, plan.seed
        )
        self.scale = self.header.scale
        self.factors: dict[tuple[int, str], Factor] = {}
        self.values = torch.zeros(0)
        self._shape, self._dtype, self._device = shape, dtype, device

    def build(self) -> Iterator[None]:
        """Make the factors, one layer's at a time: each item is a short piece of work."""
        total = 0
        for target in TARGETS:
            for layer in range(self.header.first, self._shape.layers):
                factor = self._factor(layer, target, total)
                self.factors[layer, target] = factor
                total = factor.span.stop
                yield
        self.values = torch.zeros(total, device=self._device, requires_grad=True)

    def start_from(self, adapter: Adapter) -> None:
        """Begin with the values of an earlier version. Raises TrainingFailed if its form is another."""
        if adapter.header != self.header:
            raise TrainingFailed("The serving version has another form than the plan: train from the base.")
        flat = np.concatenate([adapter.tensors[target].reshape(-1) for target in TARGETS])
        with torch.no_grad():
            self.values.copy_(torch.from_numpy(flat.astype(np.float32)))
        self.scatter()

    @torch.no_grad()
    def scatter(self) -> None:
        """Write the values into the dense factors."""
        for factor in self.factors.values():
            factor.b.view(-1)[factor.where] = self.values[factor.span]

    def scaled(self, layer: int, target: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What a projection adds: A [in, rank] and B [rank, out] with its scale; None where nothing trains."""
        factor = self.factors.get((layer, target))
        return None if factor is None else (factor.a, (factor.b * self.scale).to(factor.a.dtype))

    @torch.no_grad()
    def norm(self) -> float:
        """‖scale · B‖_F / √out over all factors: about ‖update‖ per output row, as A's rows have norm 1."""
        rows = sum(factor.b.shape[1] for factor in self.factors.values())
        size: float = self.values.norm().item() * self.scale
        return size / math.sqrt(rows)

    @torch.no_grad()
    def gather_gradient(self) -> None:
        """Collect the gradients of the trained entries into `values.grad` and clear the dense ones."""
        gradient = torch.zeros_like(self.values)
        for factor in self.factors.values():
            if factor.b.grad is not None:
                gradient[factor.span] = factor.b.grad.view(-1)[factor.where]
                factor.b.grad = None
        self.values.grad = gradient

    def save(self, folder: Path) -> None:
        """Write adapter.safetensors. Raises TrainingFailed for values that fp16 cannot hold."""
        values = self.values.detach().cpu()
        if not values.isfinite().all() or values.abs().max() > _FP16_MAX:
            raise TrainingFailed("The trained values are not finite; nothing was published.")
        parts = values.half().numpy().reshape(-1)
        tensors, start = {}, 0
        for target in TARGETS:
            size = sum(f.span.stop - f.span.start for (_, name), f in self.factors.items() if name == target)
            tensors[target] = parts[start : start + size].reshape(self.header.layers, -1)
            start += size
        adapter_file.write(folder, self.header, tensors)

    def _factor(self, layer: int, target: str, start: int) -> Factor:
        head, device = self.header, self._device
        out, inputs = self._shape.projection(target)
        flat = adapter_file.mask(head.seed, layer, target, out * head.rank, head.density)
        row, column = np.divmod(flat, head.rank)  # of B [out, rank]
        a = adapter_file.frozen_a(head.seed, layer, target, head.rank, inputs)
        return Factor(
            torch.tensor(a).t().contiguous().to(device, self._dtype),
            torch.zeros(head.rank, out, device=device, requires_grad=True),
            torch.from_numpy(column * out + row).to(device),
            slice(start, start + len(flat)),
        )
