"""The stored forms: exact where they promise to be, close where they round."""

import numpy as np
import pytest
import torch

from persona.engine import quantize
from persona.errors import ModelError


def random(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def q4_1(rows: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Random Q4_1 rows as ggml lays them out, and the codes, scales and minima that they hold."""
    source = np.random.default_rng(3)
    codes = source.integers(0, 16, (rows, groups, 32), dtype=np.uint8)
    scale = source.uniform(0.001, 0.1, (rows, groups)).astype(np.float16)
    least = source.uniform(-1, 0, (rows, groups)).astype(np.float16)
    packed = codes[..., :16] | codes[..., 16:] << 4
    head = np.stack([scale, least], -1).view(np.uint8)
    return np.concatenate([head, packed], -1).reshape(rows, -1), codes.reshape(rows, -1), scale, least


def test_the_codes_of_q4_1_blocks_are_taken_over_exactly() -> None:
    raw, codes, scale, least = q4_1(16, 3)
    found, pairs = quantize.from_q4_1(raw)
    assert torch.equal(found, torch.from_numpy(codes))
    exact = torch.from_numpy(np.stack([scale, least + 8 * scale.astype(np.float32)], -1)).transpose(0, 1)
    assert torch.equal(pairs, exact.float().bfloat16())


def test_q4_1_weights_differ_from_ggml_by_the_rounding_of_their_scales_only() -> None:
    import gguf

    raw, _, scale, least = q4_1(16, 3)
    theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_1)
    ours = quantize.int4_dense(*quantize.from_q4_1(raw)).numpy()
    span = 8 * np.abs(scale).astype(np.float32) + np.abs(least + 8 * scale.astype(np.float32))
    assert (np.abs(ours - theirs).reshape(16, 3, 32) <= span[..., None] * 2**-8).all()


def test_int4_is_within_half_a_step_of_the_weights() -> None:
    dense = random(32, 96)
    codes, scales = quantize.int4(dense)
    groups = dense.view(32, 3, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (quantize.int4_dense(codes, scales) - dense).view(32, 3, 32).abs().amax(-1)
    assert (error <= step * 0.5 + groups.abs().amax(-1) * 2**-7).all()


def test_what_is_already_int4_does_not_change_when_it_is_encoded_again() -> None:
    codes, scales = quantize.int4(random(16, 64).bfloat16())
    dense = quantize.int4_dense(codes, scales)
    again = quantize.int4_dense(*quantize.int4(dense))
    assert (again - dense).abs().max() <= dense.abs().max() * 2**-6


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30])
def test_a_group_of_equal_weights_keeps_its_value(value: float) -> None:
    dense = torch.full((16, 32), value)
    assert torch.allclose(quantize.int4_dense(*quantize.int4(dense)), dense, rtol=2**-7, atol=1e-6)


def test_nibbles_come_back_from_their_bytes() -> None:
    codes = torch.randint(0, 16, (16, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    packed = quantize.pack_nibbles(codes)
    assert packed.shape == (16, 32)
    assert torch.equal(quantize.unpack_nibbles(packed), codes)


@pytest.mark.parametrize(("rows", "columns"), [(16, 33), (8, 32), (17, 64), (16, 16)])
def test_a_shape_without_an_int4_form_is_refused(rows: int, columns: int) -> None:
    with pytest.raises(ModelError, match=f"{rows}×{columns}"):
        quantize.int4(random(rows, columns))


def test_the_form_none_is_bf16() -> None:
    dense = random(16, 32)
    assert torch.equal(quantize.encode(dense, "none")["dense"], dense.bfloat16())
