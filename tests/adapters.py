"""Adapters of random values, in both stored forms."""

import hashlib
from pathlib import Path

import numpy as np

from persona.engine import adapter_file
from persona.engine.adapter_file import Array, Header
from persona.engine.protocol import AdapterRef
from persona.engine.shape import FUSED, TARGETS, Shape


def reference(folder: Path, user: int = 1, number: int = 1) -> AdapterRef:
    """Names the file in `folder` as it is now."""
    digest = hashlib.sha256((folder / adapter_file.FILE).read_bytes()).hexdigest()
    return AdapterRef(user, number, str(folder), digest)


def sparse(
    folder: Path,
    shape: Shape,
    base: str,
    *,
    user: int = 1,
    number: int = 1,
    size: float = 0.2,
    rank: int = 8,
    alpha: float = 16.0,
    layers: int | None = None,
) -> AdapterRef:
    """A sparse adapter with a B of that size on the last `layers` layers, other for each user and number."""
    folder.mkdir(parents=True, exist_ok=True)
    count = layers or shape.layers
    header = Header("sparse", base, shape.layers - count, count, rank, alpha)
    source = np.random.default_rng([user, number])
    tensors: dict[str, Array] = {}
    for target in TARGETS:
        out, inputs = shape.projection(target)
        a = source.uniform(-1, 1, (count, rank, inputs)) * inputs**-0.5
        tensors |= adapter_file.rounded(target, a, source.normal(0, size, (count, out, rank)))
    adapter_file.write(folder, header, tensors)
    return reference(folder, user, number)


def lora(
    folder: Path, shape: Shape, base: str, *, user: int = 1, number: int = 1, rank: int = 4, size: float = 0.1
) -> AdapterRef:
    """An imported adapter: rank `rank` on q_proj, twice that on down_proj of the last layer, nothing elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    source = np.random.default_rng([user, number, 7])
    tensors: dict[str, Array] = {}
    wanted = [(layer, "qkv", 0, rank) for layer in range(shape.layers)] + [(shape.layers - 1, "down", 0, 2 * rank)]
    for layer, target, part, r in wanted:
        name = f"{layer}.{FUSED[target][part]}"
        tensors[name + ".A"] = source.normal(0, shape.hidden**-0.5, (r, shape.projection(target)[1])).astype(np.float32)
        tensors[name + ".B"] = source.normal(0, size, (shape.rows(target)[part], r)).astype(np.float32)
    adapter_file.write(folder, Header("lora", base), tensors)
    return reference(folder, user, number)
