"""Adapters of random values in the form of trained ones: for measuring, where only their size matters.

Values are so small that the base's replies stay sensible.
"""

from pathlib import Path

import numpy as np

from persona.engine import adapter_file
from persona.engine.adapter_file import Array, Header
from persona.engine.protocol import Plan
from persona.engine.shape import TARGETS, Shape

_SPREAD = 127 / 3**0.5  # standard deviation of integers that are uniform over -127…127
_B = 1e-3  # standard deviation of B


def write(folder: Path, shape: Shape, base: str, plan: Plan, seed: int) -> Path:
    """Write adapter.safetensors of the plan's rank, alpha and layers into `folder`; other values for each seed."""
    random = np.random.default_rng(seed)
    header = _header(shape, base, plan)
    tensors: dict[str, Array] = {}
    for target in TARGETS:
        out, inputs = shape.projection(target)
        sizes = {"A": (plan.rank, inputs), "B": (out, plan.rank)}
        for half, spread in (("A", inputs**-0.5), ("B", _B)):
            name, scale = f"{target}.{half}", np.float32(spread / _SPREAD)
            tensors[name] = random.integers(-127, 127, (header.layers, *sizes[half]), np.int8, endpoint=True)
            tensors[f"{name}.scale"] = np.full((header.layers, plan.rank), scale, np.float32)
    return adapter_file.write(folder, header, tensors)


def nbytes(shape: Shape, plan: Plan) -> int:
    """Bytes of such a file, its header of a few hundred aside."""
    sizes = [sum(shape.projection(target)) + 8 for target in TARGETS]  # and two fp32 scales a rank
    return _header(shape, "", plan).layers * plan.rank * sum(sizes)


def _header(shape: Shape, base: str, plan: Plan) -> Header:
    layers = max(1, round(shape.layers * plan.layers))
    return Header("sparse", base, shape.layers - layers, layers, plan.rank, plan.alpha)
