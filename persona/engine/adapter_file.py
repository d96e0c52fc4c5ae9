"""The stored adapter: one safetensors file, numpy only, plain LoRA factors of fused projections when it is loaded.

Two forms, told apart by the header (JSON in the safetensors metadata):

    sparse   trained here: A and B of the layers from `first` to the last, and none below, int8 with an fp32 scale per
             rank, stacked per target: "qkv.A" [layers, rank, in], "qkv.B" [layers, out, rank] and their "….scale"
             [layers, rank]; the update is alpha / rank · B A
    lora     A and B as imported, fp32, per layer and checkpoint module; the scale is folded into B

The factors of a fused projection are A [rank, in] and B [out, rank] with y = base(x) + B(A x).
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from persona.engine.shape import FUSED, TARGETS, Shape
from persona.errors import AdapterError

Array = NDArray[Any]
FILE = "adapter.safetensors"
MAX_BYTES = 1 << 30
MAX_RANK = 64


@dataclass(frozen=True, slots=True)
class Header:
    """What the tensors mean. `rank` and `alpha` belong to the sparse form."""

    form: str  # sparse or lora
    base: str  # hash of the base it was trained on
    first: int = 0  # first adapted layer
    layers: int = 0  # number of adapted layers
    rank: int = 0
    alpha: float = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class Adapter:
    """A parsed file."""

    header: Header
    tensors: dict[str, Array]

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def rank(self, layer: int, target: str) -> int:
        """Of the factors below; 0 where the projection is not adapted."""
        if self.header.form == "lora":
            halves = (self.tensors.get(f"{layer}.{module}.A") for module in FUSED[target])
            return sum(len(a) for a in halves if a is not None)
        return self.header.rank if 0 <= layer - self.header.first < self.header.layers else 0

    def factors(self, layer: int, target: str, shape: Shape) -> tuple[Array, Array] | None:
        """A [rank, in] and B [out, rank] (scale included), fp32; None where the projection is not adapted."""
        if self.header.form == "lora":
            return _stacked(self.tensors, layer, target, shape)
        return self._scaled(layer, target)

    def stacked(self, target: str) -> tuple[Array, Array]:
        """All layers of the sparse form: A [layers, rank, in] and B [layers, out, rank] (scale included), fp32."""
        return self._a(target, ...), self._b(target, ...) * np.float32(self.header.scale)

    def _scaled(self, layer: int, target: str) -> tuple[Array, Array] | None:
        pair = self.values(layer, target)
        return None if pair is None else (pair[0], pair[1] * np.float32(self.header.scale))

    def values(self, layer: int, target: str) -> tuple[Array, Array] | None:
        """A [rank, in] and B [out, rank] of the sparse form as they were trained, without alpha: fp32."""
        row = layer - self.header.first
        if not 0 <= row < self.header.layers:
            return None
        return self._a(target, row), self._b(target, row)

    def _a(self, target: str, rows: int | EllipsisType) -> Array:
        codes, scale = self.tensors[f"{target}.A"][rows], self.tensors[f"{target}.A.scale"][rows]
        return codes.astype(np.float32) * scale[..., :, None]

    def _b(self, target: str, rows: int | EllipsisType) -> Array:
        codes, scale = self.tensors[f"{target}.B"][rows], self.tensors[f"{target}.B.scale"][rows]
        return codes.astype(np.float32) * scale[..., None, :]


def rounded(target: str, a: Array, b: Array) -> dict[str, Array]:
    """A [layers, rank, in] and B [layers, out, rank] as the sparse form stores them."""
    stored = {}
    for half, values, axis in (("A", a, 2), ("B", b, 1)):
        scale = np.maximum(np.abs(values).max(axis), np.finfo(np.float32).tiny * 128).astype(np.float32) / np.float32(
            127
        )
        stored[f"{target}.{half}"] = np.rint(values / np.expand_dims(scale, axis)).astype(np.int8)
        stored[f"{target}.{half}.scale"] = scale
    return stored


def _stacked(tensors: dict[str, Array], layer: int, target: str, shape: Shape) -> tuple[Array, Array] | None:
    """Separate LoRA factors of the modules in a fused projection: A stacked, B block-diagonal."""
    blocks = []
    start = 0
    for module, rows in zip(FUSED[target], shape.rows(target), strict=True):
        if (a := tensors.get(f"{layer}.{module}.A")) is not None:
            blocks.append((start, a, tensors[f"{layer}.{module}.B"]))
        start += rows
    if not blocks:
        return None
    b = np.zeros((start, sum(len(a) for _, a, _ in blocks)), np.float32)
    column = 0
    for row, a, part in blocks:
        b[row : row + len(part), column : column + len(a)] = part
        column += len(a)
    return np.concatenate([a for _, a, _ in blocks]).astype(np.float32), b


def write(folder: Path, header: Header, tensors: dict[str, Array]) -> Path:
    """Write adapter.safetensors into `folder`."""
    file = folder / FILE
    rows = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}  # safetensors takes memory as it is
    file.write_bytes(save(rows, metadata={"persona": json.dumps(asdict(header))}))
    return file


def read(folder: Path, sha256: str, base: str, shape: Shape) -> Adapter:
    """Load and verify. Raises AdapterError if it is missing, corrupt, for another base, or does not fit `shape`;
    OSError if it cannot be read now, which says nothing against it."""
    adapter = parse(_content(folder, sha256))
    if adapter.header.base != base:
        raise AdapterError("The adapter was trained on another base; it sleeps until its user is trained again.")
    check(adapter, shape)
    return adapter


def _content(folder: Path, sha256: str) -> bytes:
    try:
        file = folder / FILE
        if file.stat().st_size > MAX_BYTES:
            raise AdapterError(f"The adapter file is larger than {MAX_BYTES} bytes.")
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise AdapterError(f"The adapter file cannot be read: {error.strerror}.") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise AdapterError("The adapter file does not match its checksum.")
    return content


def parse(content: bytes) -> Adapter:
    """Raises AdapterError for anything but a persona adapter file."""
    try:
        size = int.from_bytes(content[:8], "little")
        about = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["persona"])
        if not set(about) <= set(Header.__slots__):
            raise ValueError  # a later form, whose meaning is unknown here
        return Adapter(msgspec.convert(about, Header), load(content))
    except (SafetensorError, msgspec.ValidationError, ValueError, KeyError, TypeError, RecursionError):
        raise AdapterError("The file is not a persona adapter.") from None


def check(adapter: Adapter, shape: Shape) -> None:
    """Sizes, ranks and values. Raises AdapterError."""
    head = adapter.header
    if head.form == "sparse":
        _check_sparse(adapter, shape)
    elif head.form == "lora":
        _check_lora(adapter, shape)
    else:
        raise AdapterError(f"The adapter form {head.form!r} is unknown to this version of persona.")
    for tensor in adapter.tensors.values():
        if not np.isfinite(tensor).all():
            raise AdapterError("The adapter holds values that are not finite.")


def _check_sparse(adapter: Adapter, shape: Shape) -> None:
    head = adapter.header
    if not (1 <= head.rank <= MAX_RANK and math.isfinite(head.alpha)):
        raise AdapterError("The adapter's rank or alpha is out of range.")
    if not (head.layers >= 1 and 0 <= head.first <= shape.layers - head.layers):
        raise AdapterError("The adapter's layers are not layers of this base.")
    wanted: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {}
    for target in TARGETS:
        out, inputs = shape.projection(target)
        wanted[f"{target}.A"] = np.int8, (head.layers, head.rank, inputs)
        wanted[f"{target}.B"] = np.int8, (head.layers, out, head.rank)
        wanted[f"{target}.A.scale"] = wanted[f"{target}.B.scale"] = np.float32, (head.layers, head.rank)
    if set(adapter.tensors) != set(wanted):
        raise AdapterError("The adapter holds something else than a pair of factors for each projection.")
    for name, (kind, size) in wanted.items():
        if adapter.tensors[name].dtype != kind or adapter.tensors[name].shape != size:
            raise AdapterError(f"The adapter's tensor {name} does not fit this base.")


def _check_lora(adapter: Adapter, shape: Shape) -> None:
    names = {name.rpartition(".")[0] for name in adapter.tensors}
    if set(adapter.tensors) != {f"{name}.{half}" for name in names for half in "AB"}:
        raise AdapterError("The adapter holds something else than pairs of factors.")
    for name in names:
        layer, _, module = name.partition(".")
        if not layer.isdecimal():
            raise AdapterError(f"The adapter's module {name[:100]!r} is not one of this base.")
        check_factors(int(layer), module, adapter.tensors[name + ".A"], adapter.tensors[name + ".B"], shape)


def check_factors(layer: int, module: str, a: Array, b: Array, shape: Shape) -> None:
    """Whether A and B fit the checkpoint module `module` of that layer. Raises AdapterError."""
    target = next((target for target, modules in FUSED.items() if module in modules), None)
    if target is None or layer >= shape.layers:
        raise AdapterError(f"The adapter's module {layer}.{module[:100]} is not one of this base.")
    rows = shape.rows(target)[FUSED[target].index(module)]
    inputs = shape.projection(target)[1]
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != inputs or b.shape[0] != rows:
        raise AdapterError(f"The adapter's module {layer}.{module} does not fit this base.")
    if a.shape[0] != b.shape[1] or not 1 <= a.shape[0] <= MAX_RANK:
        raise AdapterError(f"The adapter's module {layer}.{module} has a rank outside 1…{MAX_RANK}.")
