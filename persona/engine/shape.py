"""The numbers of the network, read from a prepared model's model.json. No torch: the service reads it too."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The fused projections of a layer, and the checkpoint modules that each holds, in row order.
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
TARGETS = tuple(FUSED)


@dataclass(frozen=True, slots=True)
class Shape:
    """The network's numbers, as in model.json."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    tied: bool
    inv_freq: tuple[float, ...]
    rope_scale: float
    context: int
    eos: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> "Shape":
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        values: dict[str, Any] = {name: about[name] for name in cls.__slots__}
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**tuples)

    def rows(self, target: str) -> tuple[int, ...]:
        """Output rows of each checkpoint module in a fused projection."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (heads, kv, kv),
            "o": (self.hidden,),
            "gate_up": (self.intermediate, self.intermediate),
            "down": (self.hidden,),
        }[target]

    def projection(self, target: str) -> tuple[int, int]:
        """(out, in) of a fused projection."""
        inputs = {"o": self.heads * self.head_dim, "down": self.intermediate}
        return sum(self.rows(target)), inputs.get(target, self.hidden)
