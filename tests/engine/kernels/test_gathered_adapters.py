"""Rows with adapters of any rank, or none, in one launch: each row as plain torch computes it alone.

Tolerances, relative to the row's largest value: 1e-5 in fp32, two roundings in 16 bits.
"""

import pytest
import torch

from persona.engine.kernels import reference
from persona.engine.kernels.choice import Kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}
RANKS = (16, 1, 0, 64, 2, 8, 4, 0, 17)

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
