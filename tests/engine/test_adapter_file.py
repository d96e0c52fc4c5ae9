"""The stored adapter: what is written is what is read, and nothing else is."""

import errno
import json
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
from models import Models
from safetensors.numpy import save

from persona.engine import adapter_file
from persona.engine.adapter_file import FILE, Header
from persona.engine.protocol import AdapterRef
from persona.engine.shape import TARGETS, Shape
from persona.errors import AdapterError

BASE = "b" * 64


@pytest.fixture(scope="module")
def shape(models: Models) -> Shape:
    return Shape.read(models.prepared().folder)


def read(ref: AdapterRef, shape: Shape, base: str = BASE) -> adapter_file.Adapter:
    return adapter_file.read(Path(ref.path), ref.sha256, base, shape)


def test_a_sparse_adapter_comes_back_as_it_was(shape: Shape, tmp_path: Path) -> None:
    adapter = read(adapters.sparse(tmp_path, shape, BASE), shape)
    assert adapter.header == Header("sparse", BASE, 0, 2, 8, 16.0)
    for layer in range(shape.layers):
        for target in TARGETS:
            out, inputs = shape.projection(target)
            pair = adapter.factors(layer, target, shape)
            assert pair is not None
            assert (pair[0].shape, pair[1].shape) == ((8, inputs), (out, 8))
            values = adapter.values(layer, target)
            assert values is not None
            assert np.array_equal(pair[0], values[0])
            assert np.array_equal(pair[1], values[1] * 2)  # alpha / rank


def test_eight_bits_lose_half_a_step_of_each_ranks_largest_value_at_most() -> None:
    source = np.random.default_rng(3)
    a, b = source.normal(0, 1, (2, 4, 40)), source.normal(0, 1e-3, (2, 30, 4))
    b[1, :, 2] = 0.0
    head = Header("sparse", BASE, 1, 2, 4, 8.0)
    adapter = adapter_file.Adapter(head, adapter_file.rounded("o", a, b))
    for row in range(2):
        pair = adapter.values(row + 1, "o")
        assert pair is not None
        assert (np.abs(pair[0] - a[row]) <= np.abs(a[row]).max(1, keepdims=True) / 253).all()
        assert (np.abs(pair[1] - b[row]) <= np.abs(b[row]).max(0) / 253).all()
    assert not adapter.tensors["o.B"][1, :, 2].any()


def test_the_order_of_an_array_in_memory_does_not_matter(shape: Shape, tmp_path: Path) -> None:
    content = adapter_file.parse((Path(adapters.sparse(tmp_path, shape, BASE).path) / FILE).read_bytes())
    adapter_file.write(tmp_path, content.header, {n: np.asfortranarray(t) for n, t in content.tensors.items()})
    again = adapter_file.parse((tmp_path / FILE).read_bytes())
    assert all(np.array_equal(again.tensors[name], tensor) for name, tensor in content.tensors.items())


def test_layers_below_the_first_are_not_adapted(shape: Shape, tmp_path: Path) -> None:
    adapter = read(adapters.sparse(tmp_path, shape, BASE, layers=1), shape)
    assert adapter.values(0, "qkv") is None
    assert adapter.factors(0, "qkv", shape) is None
    assert adapter.factors(1, "qkv", shape) is not None


def test_an_imported_adapter_is_fused_block_by_block(shape: Shape, tmp_path: Path) -> None:
    adapter = read(adapters.lora(tmp_path, shape, BASE), shape)
    pair = adapter.factors(0, "qkv", shape)
    assert pair is not None
    a, b = adapter.tensors["0.self_attn.q_proj.A"], adapter.tensors["0.self_attn.q_proj.B"]
    wanted = np.zeros((128, 64), np.float32)
    wanted[:64] = b @ a
    assert np.allclose(pair[1] @ pair[0], wanted)
    assert adapter.factors(0, "down", shape) is None
    assert adapter.factors(0, "gate_up", shape) is None


@pytest.mark.parametrize("form", [adapters.sparse, adapters.lora])
def test_threat_06_a_flipped_bit_anywhere_is_refused(shape: Shape, tmp_path: Path, form: Any) -> None:
    ref = form(tmp_path, shape, BASE)
    file = tmp_path / FILE
    whole = file.read_bytes()
    for place in [*range(0, 400, 7), *range(400, len(whole), max(1, len(whole) // 97)), len(whole) - 1]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(AdapterError, match="checksum"):
            read(ref, shape)
    file.write_bytes(whole)
    read(ref, shape)


def test_threat_06_a_file_cut_short_or_zeroed_is_refused(shape: Shape, tmp_path: Path) -> None:
    ref = adapters.sparse(tmp_path, shape, BASE)
    file = tmp_path / FILE
    whole = file.read_bytes()
    for spoiled in (b"", whole[:-1], whole[: len(whole) // 2], whole[:-512] + bytes(512), whole + b"\0"):
        file.write_bytes(spoiled)
        with pytest.raises(AdapterError, match="checksum"):
            read(ref, shape)
    file.unlink()
    with pytest.raises(AdapterError, match="cannot be read"):
        read(ref, shape)


def test_a_file_that_cannot_be_read_now_is_not_called_bad(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = adapters.sparse(tmp_path, shape, BASE)

    def crowded(self: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as now:
        now.setattr(Path, "read_bytes", crowded)
        with pytest.raises(OSError, match="Too many open files"):
            read(ref, shape)
    read(ref, shape)


def test_an_adapter_of_another_base_sleeps(shape: Shape, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="another base"):
        read(adapters.sparse(tmp_path, shape, "c" * 64), shape)


def test_an_adapter_of_another_shape_is_refused(models: Models, tmp_path: Path) -> None:
    wide = Shape.read(models.prepared().folder)
    other = Shape(**{**{n: getattr(wide, n) for n in Shape.__slots__}, "hidden": 96})
    with pytest.raises(AdapterError, match="does not fit"):
        read(adapters.sparse(tmp_path / "s", wide, BASE), other)
    with pytest.raises(AdapterError, match="does not fit"):
        read(adapters.lora(tmp_path / "l", wide, BASE), other)


HEADER = {"form": "sparse", "base": BASE, "first": 0, "layers": 2, "rank": 8, "alpha": 16.0}


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 4096}, {"rank": 0}, {"rank": -1}, {"rank": "8"}, {"rank": 8.5}, {"rank": 7},
        {"alpha": float("nan")}, {"alpha": float("inf")}, {"alpha": "x"}, {"density": 0.3},
        {"first": -1}, {"first": 1}, {"layers": 3}, {"layers": 0}, {"layers": -2}, {"seed": 0},
        {"form": "dora"}, {"later": 1}, {"base": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_means_something_else_is_refused(shape: Shape, tmp_path: Path, change: dict[str, Any]) -> None:
    content = adapter_file.parse((Path(adapters.sparse(tmp_path, shape, BASE).path) / FILE).read_bytes())
    about = json.dumps({**HEADER, **change})
    (tmp_path / FILE).write_bytes(save(content.tensors, metadata={"persona": about}))
    with pytest.raises(AdapterError):
        read(adapters.reference(tmp_path), shape)


@pytest.mark.parametrize("missing", ["qkv.A", "down.B", "o.B.scale", "more"])
def test_a_sparse_file_without_all_of_its_pairs_is_refused(shape: Shape, tmp_path: Path, missing: str) -> None:
    content = adapter_file.parse((Path(adapters.sparse(tmp_path, shape, BASE).path) / FILE).read_bytes())
    if content.tensors.pop(missing, None) is None:
        content.tensors[missing] = np.zeros((2, 8, 64), np.float16)
    adapter_file.write(tmp_path, content.header, content.tensors)
    with pytest.raises(AdapterError, match="pair of factors"):
        read(adapters.reference(tmp_path), shape)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(shape: Shape, tmp_path: Path, bad: float) -> None:
    adapters.sparse(tmp_path, shape, BASE)
    content = adapter_file.parse((tmp_path / FILE).read_bytes())
    content.tensors["down.B.scale"][1, 3] = bad
    adapter_file.write(tmp_path, content.header, content.tensors)
    with pytest.raises(AdapterError, match="not finite"):
        read(adapters.reference(tmp_path), shape)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("0.self_attn.q_proj.A", None),  # its B stays alone
        ("9.self_attn.q_proj", (4, 64, 64)), ("x.self_attn.q_proj", (4, 64, 64)), ("0.lm_head", (4, 64, 64)),
        ("0.mlp.up_proj", (65, 64, 128)), ("0.mlp.up_proj", (4, 64, 64)), ("0.mlp.up_proj", (4, 32, 128)),
    ],
)  # fmt: skip
def test_factors_that_do_not_fit_are_refused(
    shape: Shape, tmp_path: Path, name: str, sizes: tuple[int, int, int] | None
) -> None:
    adapters.lora(tmp_path, shape, BASE)
    content = adapter_file.parse((tmp_path / FILE).read_bytes())
    if sizes is None:
        del content.tensors[name]
    else:
        content.tensors[name + ".A"] = np.zeros((sizes[0], sizes[1]), np.float32)
        content.tensors[name + ".B"] = np.zeros((sizes[2], sizes[0]), np.float32)
    adapter_file.write(tmp_path, content.header, content.tensors)
    with pytest.raises(AdapterError):
        read(adapters.reference(tmp_path), shape)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 64, b"PK\x03\x04 zip", b"\x80\x04K\x01.", b"[" * 100000])
def test_what_is_no_adapter_is_refused(content: bytes) -> None:
    with pytest.raises(AdapterError, match="not a persona adapter"):
        adapter_file.parse(content)


def test_an_ordinary_safetensors_file_is_refused() -> None:
    with pytest.raises(AdapterError, match="not a persona adapter"):
        adapter_file.parse(save({"x": np.zeros(3, np.float32)}))
