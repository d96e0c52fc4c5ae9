"""The base's projections in memory: one module type, one copy, three forms (int4, nf4, none).

Nothing merges into a projection or changes it after loading. `p(x)` is the product for serving, without gradient;
`p.dense()` is the same matrix written out, for wide batches and for training, and is thrown away after use.

On a GPU few rows go through the kernels of persona/engine/kernels, many through the matrix written out.

On the CPU Int4 keeps only the layout of torch's kernel. For many rows it unpacks that layout:

    packed uint8 [out/B, in, B/2]   B = 64 (AVX-512) or 32 (AVX2) output rows a block
    byte j of (block, k)            low nibble: row j, high nibble: row j + B/2
"""

import contextlib
import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from persona.engine import quantize
from persona.engine.device import Form
from persona.engine.kernels.choice import kernels
from persona.engine.kernels.reference import FEW
from persona.errors import ModelError

Tensors = Mapping[str, torch.Tensor]
ROUND = 32  # rows to which wide products are filled up: oneDNN compiles a kernel for every number of rows


def compute_dtype(device: str) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, else fp32 (emulated bf16 is many times slower)."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device == "cuda" or native else torch.float32


def product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x [rows, in] · matrix [in, out]. On the CPU bf16 rows are rounded up: oneDNN compiles a kernel, in 10 ms, for
    every number of rows that it has not seen yet."""
    rows = len(x)
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or rows <= ROUND:
        return x @ matrix
    return (F.pad(x, (0, 0, 0, -rows % ROUND)) @ matrix)[:rows]


class Projection(ABC):
    """A frozen matrix [out, in], perhaps with a bias [out]."""

    rows: int
    columns: int
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [tokens, in] → [tokens, out], in x's dtype."""
        y = self._product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix transposed, [in, out]: a fresh tensor."""

    @abstractmethod
    def nbytes(self) -> int: ...

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.dense(x.dtype))


class Int4(Projection):
    """torch's CPU kernel for few rows, an unpacked product for many. Rows are independent of each other in both."""

    FEW = 80  # rows up to which the kernel is faster (tests/bench/kernels.py --only few)

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.rows, self.columns, self.bias = codes.shape[0], codes.shape[1] * 2, bias
        self._block = block()
        spare = -self.rows % self._block  # whole blocks only: a partial one has another layout
        codes = F.pad(quantize.unpack_nibbles(codes), (0, 0, 0, spare))
        self._scales = F.pad(scales, (0, 0, 0, spare)).contiguous()  # [in/32, out, 2]
        self._packed = _pack(codes)
        self.writer: Callable[[torch.dtype], torch.Tensor | None] | None = None  # compiled code that makes `dense`

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The kernel's layout of the codes, and scales [in/32, out, 2] bf16, both with whole blocks of outputs."""
        return self._packed, self._scales

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        if self.writer is not None and (made := self.writer(dtype)) is not None:
            return made
        # In fp32, whose elementwise operations are faster on a CPU than bf16's, and rounded once at the end.
        codes = _unpack(self._packed, self._block, torch.float32)  # [in, out]
        groups = codes.view(-1, quantize.GROUP, codes.shape[1])
        scale, zero = self._scales.float().unbind(-1)  # [in/32, out] each
        torch.addcmul((zero - 8 * scale).unsqueeze(1), groups, scale.unsqueeze(1), out=groups)
        return codes[:, : self.rows].to(dtype)

    def nbytes(self) -> int:
        return self._packed.nbytes + self._scales.nbytes

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.FEW:
            return product(x, self.dense(x.dtype))
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        y: torch.Tensor = kernel(x.bfloat16(), self._packed, quantize.GROUP, self._scales)
        return y[:, : self.rows].to(x.dtype)


class StoredInt4(Projection):
    """int4 as it is stored (quantize.py): on any device but the CPU."""

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.rows, self.columns, self.bias = codes.shape[0], codes.shape[1] * 2, bias
        self._codes, self._scales = codes.contiguous(), scales.contiguous()

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return quantize.int4_dense(quantize.unpack_nibbles(self._codes), self._scales).to(dtype).t()

    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        quick = kernels(x.device.type)
        if quick is None or len(x) > FEW:
            return super()._product(x)
        return quick.int4(x, self._codes, self._scales)


class Nf4(Projection):
    """bitsandbytes NF4 through its functions: bytes and a quantization state, no module of theirs."""

    def __init__(self, data: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], bias: torch.Tensor | None):
        from bitsandbytes import functional  # now, as it takes seconds: not in somebody's step

        self.rows, self.columns, self.bias, self._functional = *shape, bias, functional
        self._data, self._absmax = data, absmax
        self._states: dict[torch.dtype, Any] = {}

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        matrix: torch.Tensor = self._functional.dequantize_4bit(self._data, self._state(dtype))
        return matrix.t()

    def nbytes(self) -> int:
        return self._data.nbytes + self._absmax.nbytes

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        quick = kernels(x.device.type)
        if quick is None or len(x) > FEW or self.columns % quantize.NF4_BLOCK:
            return super()._product(x)
        return quick.nf4(x, self._data, self._absmax, self.rows)

    def _state(self, dtype: torch.dtype) -> Any:
        if dtype not in self._states:
            code = self._functional.get_4bit_type("nf4", device=self._data.device)
            self._states[dtype] = self._functional.QuantState(
                self._absmax, (self.rows, self.columns), code, quantize.NF4_BLOCK, "nf4", dtype
            )
        return self._states[dtype]


class Dense(Projection):
    """Not quantized."""

    def __init__(self, matrix: torch.Tensor, bias: torch.Tensor | None) -> None:
        (self.rows, self.columns), self.bias = matrix.shape, bias
        self._matrix = matrix

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self._matrix.to(dtype).t()

    def nbytes(self) -> int:
        return self._matrix.nbytes


def load(parts: Tensors, prefix: str, shape: tuple[int, int], form: Form, device: str) -> Projection:
    """The projection stored under `prefix` (see quantize.py for the parts of each form)."""
    part = {key: parts[f"{prefix}.{key}"].to(device) for key in _PARTS[form]}
    bias = parts.get(f"{prefix}.bias")
    bias = None if bias is None else bias.to(device)
    if form == "int4":
        return (Int4 if device == "cpu" else StoredInt4)(part["codes"], part["scales"], bias)
    if form == "nf4":
        return Nf4(part["bytes"], part["absmax"], shape, bias)
    return Dense(part["dense"].to(compute_dtype(device)), bias)


_PARTS: dict[Form, tuple[str, ...]] = {"int4": ("codes", "scales"), "nf4": ("bytes", "absmax"), "none": ("dense",)}


def block() -> int:
    """Output rows per block of the int4 kernel's layout on this CPU (0 would mean: layout unknown)."""
    return 64 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 32


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """codes uint8 [out, in] → the kernel's layout. Raises ModelError if torch packs otherwise than we unpack."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    if not torch.equal(_unpack(packed, block()), codes.t()):
        raise ModelError(f"torch {torch.__version__} packs int4 in an unknown way; set model.weights to none or nf4.")
    return packed


def _unpack(packed: torch.Tensor, block: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """The kernel's layout → codes [in, out]."""
    blocks = packed.view(-1, packed.numel() // (packed.shape[0] // block * (block // 2)), block // 2)
    codes = blocks.new_empty(blocks.shape[1], blocks.shape[0], block, dtype=dtype)
    codes[..., : block // 2] = (blocks & 15).transpose(0, 1)
    codes[..., block // 2 :] = (blocks >> 4).transpose(0, 1)
    return codes.view(blocks.shape[1], -1)


def on_one_core() -> None:
    """Let this thread compute without a team. A second team beside that of the steps is more threads than cores: OpenMP
    then lets those of the steps sleep at every barrier, and steps take twice as long from then on."""
    torch.get_num_threads()  # torch sets a thread's number when it is first asked, and only then
    with contextlib.suppress(AttributeError):  # another OpenMP than torch's on Linux
        ctypes.CDLL(None).omp_set_num_threads(1)


def threads(wanted: int) -> int:
    """CPU threads to compute with: `wanted`, or all that this process may use."""
    return wanted or len(os.sched_getaffinity(0))
