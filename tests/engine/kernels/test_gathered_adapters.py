"""Rows and prompts with adapters of any rank, or none, in one call: each row as plain torch computes it alone.

Tolerances, relative to the row's largest value: 1e-5 in fp32, two roundings in 16 bits.
"""

import pytest
import torch

from persona.engine.kernels import reference
from persona.engine.kernels.choice import Kernels
from persona.engine.kernels.reference import BLOCK

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}
RANKS = (16, 1, 0, 64, 2, 8, 4, 0, 17, 192, 96)  # three modules of one projection may have 64 each

Pair = tuple[torch.Tensor, torch.Tensor]


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(ranks: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype) -> list[Pair | None]:
    return [
        (random(inputs, rank, seed=rank).to(dtype), (random(rank, outputs, seed=rank + 100) / 8).to(dtype))
        if rank
        else None
        for rank in ranks
    ]


def table(some: list[Pair | None]) -> torch.Tensor:
    return torch.tensor([[0, 0, 0] if p is None else [p[0].data_ptr(), p[1].data_ptr(), p[0].shape[1]] for p in some])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (100, 130), (1056, 32)])
def test_each_row_gets_its_own_adapter(kernels: Kernels, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    some = pairs(RANKS, inputs, outputs, dtype)
    x, y = random(len(RANKS), inputs, seed=2).to(dtype), random(len(RANKS), outputs, seed=3).to(dtype)
    wanted = y.float().clone()
    reference.adapt(x.float(), wanted, [None if p is None else (p[0].float(), p[1].float()) for p in some])
    found = y.clone()
    kernels.adapt(x, found, table(some))
    most = wanted.abs().amax(1, keepdim=True)
    assert ((found.float() - wanted).abs() <= TOLERANCE[dtype] * most).all()
    assert torch.equal(found[2], y[2])
    assert torch.equal(found[7], y[7])


def test_an_adapter_gives_the_same_whoever_stands_beside_it(kernels: Kernels) -> None:
    some = pairs(RANKS, 64, 96, torch.bfloat16)
    x, y = random(len(RANKS), 64).bfloat16(), random(len(RANKS), 96, seed=3).bfloat16()
    together = y.clone()
    kernels.adapt(x, together, table(some))
    for row in range(len(RANKS)):
        alone = y[row : row + 1].clone()
        kernels.adapt(x[row : row + 1], alone, table(some[row : row + 1]))
        assert torch.equal(alone[0], together[row])


def test_rows_of_one_adapter_may_share_its_factors(kernels: Kernels) -> None:
    (one,) = pairs((2,), 64, 32, torch.float32)
    x, y = random(3, 64), torch.zeros(3, 32)
    kernels.adapt(x, y, table([one, one, one]))
    assert one is not None
    assert torch.allclose(y, x @ one[0] @ one[1], atol=1e-4)


def test_a_row_of_nan_spoils_itself_alone(kernels: Kernels) -> None:
    some = pairs((4, 4), 64, 32, torch.float32)
    x, y = random(2, 64), torch.zeros(2, 32)
    x[0] = torch.nan
    kernels.adapt(x, y, table(some))
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


# Prompts as (adapter, first row, rows): a whole block, one row, nobody's, two blocks of one prompt, and large ranks.
PROMPTS = ((0, 2, BLOCK), (1, 34, 1), (2, 36, 5), (3, 41, BLOCK), (3, 73, 7), (4, 80, 3), (5, 83, 2))
ROWS = 85


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (100, 130), (1056, 32)])
def test_each_prompt_gets_its_own_adapter(kernels: Kernels, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    some = pairs((16, 17, 0, 2, 192, 96), inputs, outputs, dtype)
    x, y = random(ROWS, inputs, seed=2).to(dtype), random(ROWS, outputs, seed=3).to(dtype)
    whose: list[Pair | None] = [None] * ROWS
    for adapter, start, rows in PROMPTS:
        whose[start : start + rows] = [some[adapter]] * rows
    wanted = y.float().clone()
    reference.adapt(x.float(), wanted, [None if p is None else (p[0].float(), p[1].float()) for p in whose])
    found = y.clone()
    blocks = torch.tensor([(start, rows) for _, start, rows in PROMPTS], dtype=torch.int32)
    kernels.adapt_blocks(x, found, table([some[adapter] for adapter, _, _ in PROMPTS]), blocks)
    most = wanted.abs().amax(1, keepdim=True)
    assert ((found.float() - wanted).abs() <= TOLERANCE[dtype] * most).all()
    bare = [row for row, pair in enumerate(whose) if pair is None]
    assert len(bare) == 8
    assert torch.equal(found[bare], y[bare])


def test_a_prompt_gives_the_same_whoever_stands_beside_it(kernels: Kernels) -> None:
    some = pairs((2, 64), 64, 96, torch.bfloat16)
    x, y = random(20, 64).bfloat16(), random(20, 96, seed=3).bfloat16()
    together = y.clone()
    kernels.adapt_blocks(x, together, table(some), torch.tensor([(0, 13), (13, 7)], dtype=torch.int32))
    for one, start, end in ((0, 0, 13), (0, 3, 13), (1, 13, 20), (1, 15, 19)):  # and wherever it is cut
        alone = y[start:end].clone()
        blocks = torch.tensor([(0, end - start)], dtype=torch.int32)
        kernels.adapt_blocks(x[start:end], alone, table(some[one : one + 1]), blocks)
        assert torch.equal(alone, together[start:end])


def test_a_row_of_nan_in_a_prompt_spoils_itself_alone(kernels: Kernels) -> None:
    some = pairs((4,), 64, 32, torch.float32)
    x, y = random(3, 64), torch.zeros(3, 32)
    x[1] = torch.nan
    kernels.adapt_blocks(x, y, table(some), torch.tensor([(0, 3)], dtype=torch.int32))
    assert y.isnan().all(1).tolist() == [False, True, False]
