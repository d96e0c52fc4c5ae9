"""Projections: every form computes with exactly the matrix that `dense` writes out, whoever stands in the batch."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes import functional

from persona.engine import quantize, weights
from persona.engine.weights import Projection

FORMS = ["int4", "nf4", "none"]
BF16 = 2**-8  # relative rounding of one bf16 value


def random(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def made(form: str, rows: int = 128, columns: int = 64, bias: bool = False, seed: int = 1) -> Projection:
    parts = quantize.encode(random(rows, columns, seed) / 8, form)
    if bias:
        parts["bias"] = random(1, rows, 5)[0]
    named = {f"p.{key}": tensor for key, tensor in parts.items()}
    return weights.load(named, "p", (rows, columns), form, "cpu")  # type: ignore[arg-type]


def close(found: torch.Tensor, wanted: torch.Tensor, parts: float = 2.0) -> None:
    """Within a few bf16 roundings of the row's largest value."""
    scale = wanted.abs().amax(-1, keepdim=True).clamp_min(1e-6)
    assert ((found.float() - wanted).abs() / scale).max() < parts * BF16


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 31, 80, 81, 200])
def test_a_product_is_the_product_with_the_dense_matrix(form: str, bias: bool, rows: int) -> None:
    projection = made(form, bias=bias)
    x = random(rows, 64, 2).bfloat16()
    wanted = x.float() @ projection.dense(torch.float32)
    close(projection(x), wanted if projection.bias is None else wanted + projection.bias)


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 32), (80, 96), (112, 160), (576, 1536), (1728, 576)])
def test_the_int4_kernel_and_the_dense_path_agree_for_odd_shapes(rows: int, columns: int) -> None:
    projection = made("int4", rows, columns)
    x = random(4, columns, 3).bfloat16()
    assert projection(x).shape == (4, rows)
    close(projection(x), x.float() @ projection.dense(torch.float32))


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (128, 64), (192, 576)])
def test_int4_unpacks_the_kernels_layout_to_the_stored_codes(rows: int, columns: int) -> None:
    codes, scales = quantize.int4(random(rows, columns))
    projection = weights.Int4(quantize.pack_nibbles(codes), scales, None)
    assert torch.equal(projection.dense(torch.float32).t(), quantize.int4_dense(codes, scales))


@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (48, 96), (192, 576)])
def test_int4_off_the_cpu_is_the_same_matrix_as_on_it(rows: int, columns: int) -> None:
    codes, scales = quantize.int4(random(rows, columns))
    there, here = (form(quantize.pack_nibbles(codes), scales, None) for form in (weights.StoredInt4, weights.Int4))
    assert torch.equal(there.dense(torch.float32), here.dense(torch.float32))
    x = random(4, columns, 3)
    close(there(x), x @ here.dense(torch.float32))
    assert there.nbytes() <= here.nbytes()


def test_int4_rows_are_bit_equal_whatever_stands_beside_them() -> None:
    projection = made("int4", 192, 576)
    x = random(32, 576, 4).bfloat16()
    alone = torch.cat([projection(row[None]) for row in x])
    for rows in range(1, 33):
        assert torch.equal(projection(x[:rows]), alone[:rows])
    poisoned = x.clone()
    poisoned[1::2] = torch.nan
    assert torch.equal(projection(poisoned)[::2], alone[::2])


@pytest.mark.parametrize(("rows", "columns"), [(128, 64), (48, 32), (16, 96), (192, 576)])
def test_nf4_is_what_bitsandbytes_makes_of_it(rows: int, columns: int) -> None:
    dense = random(rows, columns) / 8
    data, state = functional.quantize_4bit(dense, blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(data, state)
    ours = weights.load(
        {f"p.{k}": t for k, t in quantize.encode(dense, "nf4").items()}, "p", (rows, columns), "nf4", "cpu"
    )
    assert torch.equal(ours.dense(torch.float32).t(), theirs)
    assert torch.equal(ours(random(3, columns, 2)), F.linear(random(3, columns, 2), theirs))


@pytest.mark.parametrize("form", FORMS)
def test_what_dense_returns_may_be_changed_without_changing_the_projection(form: str) -> None:
    projection = made(form)
    before = projection.dense(torch.float32)
    projection.dense(torch.float32).mul_(0)
    assert torch.equal(projection.dense(torch.float32), before)


@pytest.mark.parametrize(("form", "most"), [("int4", 0.66), ("nf4", 0.66), ("none", 2.0)])
def test_a_projection_says_how_many_bytes_it_holds(form: str, most: float) -> None:
    projection = made(form, 192, 576)
    most = weights.compute_dtype("cpu").itemsize if form == "none" else most
    assert 0.5 * 192 * 576 <= projection.nbytes() <= most * 192 * 576


@pytest.mark.parametrize("form", FORMS)
def test_no_projection_asks_for_a_gradient_of_its_own(form: str) -> None:
    x = random(4, 64).requires_grad_()
    projection = made(form)
    (x @ projection.dense(torch.float32)).sum().backward()
    assert x.grad is not None
    assert not projection.dense(torch.float32).requires_grad


def test_threads_are_all_cores_unless_told() -> None:
    assert weights.threads(3) == 3
    assert weights.threads(0) >= 1


def test_a_thread_of_its_own_computes_without_a_team() -> None:
    """In a process of its own: a team, once there, stays."""
    program = """if True:
        import os, torch
        from concurrent.futures import ThreadPoolExecutor
        from persona.engine.weights import on_one_core
        torch.set_num_threads(2)
        x = torch.ones(1 << 20)
        x.bfloat16()
        def work():
            before = set(os.listdir("/proc/self/task"))
            x.bfloat16()
            return torch.get_num_threads(), len(set(os.listdir("/proc/self/task")) - before)
        for initializer in (on_one_core, None):
            with ThreadPoolExecutor(1, initializer=initializer) as thread:
                print(*thread.submit(work).result())
        print(torch.get_num_threads())
    """
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["1", "0", "2", "1", "2"]
