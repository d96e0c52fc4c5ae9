"""4-bit products of few rows: they compute with exactly the matrix that is stored, in x's type, summed in fp32.

Tolerances, relative to the row's largest value: 1e-5 in fp32; in fp16 a rounding and a half of the result; in bf16
three, as the interpreter does not round weights to bf16 but cuts them off.
"""

import pytest
import torch
from bitsandbytes import functional

from persona.engine import quantize
from persona.engine.kernels import reference
from persona.engine.kernels.choice import Kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3 * 2**-8, torch.float16: 1.5 * 2**-11}
SHAPES = [(16, 64), (48, 192), (80, 320), (32, 1536)]  # the last is split along its inputs


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    """To the product with `dense` [out, in] rounded to x's type."""
    wanted = x.float() @ dense.to(x.dtype).float().t()
    assert found.dtype == x.dtype
    assert ((found.float() - wanted).abs() <= TOLERANCE[x.dtype] * wanted.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 32, 33, 64])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES[:3])
def test_int4_and_nf4_products(kernels: Kernels, outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> None:
    x, dense = random(rows, inputs, seed=2).to(dtype), random(outputs, inputs) / 8
    parts = quantize.encode(dense, "int4")
    close(kernels.int4(x, parts["codes"], parts["scales"]), x, int4_dense(parts))
    parts = quantize.encode(dense, "nf4")
    written = reference.nf4_dense(parts["bytes"], parts["absmax"], outputs)
    close(kernels.nf4(x, parts["bytes"], parts["absmax"], outputs), x, written)


def int4_dense(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    return quantize.int4_dense(quantize.unpack_nibbles(parts["codes"]), parts["scales"])


def test_groups_at_the_end_of_a_round_count_once(kernels: Kernels) -> None:
    """96 inputs: three groups of 32, where a round has four."""
    parts = quantize.encode(random(16, 96), "int4")
    x = torch.cat([random(2, 96, seed=2), torch.full((2, 96), torch.nan)], 1)[:, :96]  # beside it lies NaN
    close(kernels.int4(x, parts["codes"], parts["scales"]), x, int4_dense(parts))


def test_long_rows_of_the_matrix_are_split(kernels: Kernels) -> None:
    outputs, inputs = SHAPES[3]
    x = random(2, inputs, seed=2)
    parts = quantize.encode(random(outputs, inputs), "int4")
    close(kernels.int4(x, parts["codes"], parts["scales"]), x, int4_dense(parts))


def test_a_row_is_the_same_whoever_stands_beside_it(kernels: Kernels) -> None:
    parts, x = quantize.encode(random(48, 192), "nf4"), random(5, 192, seed=2).bfloat16()
    x[3] = torch.nan
    together = kernels.nf4(x, parts["bytes"], parts["absmax"], 48)
    for row in (0, 1, 2, 4):
        assert torch.equal(kernels.nf4(x[row : row + 1], parts["bytes"], parts["absmax"], 48)[0], together[row])


def test_the_definition_of_nf4_is_that_of_bitsandbytes() -> None:
    dense = random(48, 192)
    data, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    assert torch.equal(reference.nf4_dense(data, state.absmax, 48), functional.dequantize_4bit(data, state))
    assert torch.equal(torch.tensor(reference.NF4), functional.get_4bit_type("nf4", device="cpu"))
