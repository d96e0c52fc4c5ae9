"""Random adapters are adapters: the engine's own check takes them, and they have the size that was announced."""

from pathlib import Path

import numpy as np
import pytest
from models import Models

from persona.engine import adapter_file, random_adapter
from persona.engine.prepare import sha256
from persona.engine.protocol import Plan
from persona.engine.shape import TARGETS, Shape


@pytest.mark.parametrize("rank", [1, 2, 16, 64])
@pytest.mark.parametrize("layers", [0.1, 0.5, 1.0])
def test_a_random_adapter_is_one_that_the_engine_takes(
    models: Models, tmp_path: Path, rank: int, layers: float
) -> None:
    shape = Shape.read(models.prepared().folder)
    plan = Plan(rank=rank, layers=layers)
    file = random_adapter.write(tmp_path, shape, "base", plan, seed=1)
    adapter = adapter_file.read(tmp_path, sha256(file), "base", shape)
    assert (adapter.header.rank, adapter.header.alpha) == (rank, plan.alpha)
    assert sum(tensor.nbytes for tensor in adapter.tensors.values()) == random_adapter.nbytes(shape, plan)


def test_seeds_differ_and_the_update_is_small_beside_the_base(models: Models, tmp_path: Path) -> None:
    shape = Shape.read(models.prepared().folder)
    found = []
    for seed in (1, 1, 2):
        file = random_adapter.write(tmp_path, shape, "base", Plan(rank=8), seed=seed)
        found.append(file.read_bytes())
        adapter = adapter_file.parse(found[-1])
        for target in TARGETS:
            a, b = adapter.factors(shape.layers - 1, target, shape) or (np.zeros(0), np.zeros(0))
            assert 0 < np.abs(b @ a).max() < 0.05
    assert found[0] == found[1] != found[2]
