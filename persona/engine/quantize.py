"""The stored 4-bit forms, as plain functions on tensors: encode once, decode anywhere.

    int4   codes  uint8 [out, in/2]        two codes a byte, the even column in the low nibble
           scales bf16  [in/32, out, 2]    (scale, zero) per 32 inputs: w = (code − 8) · scale + zero
    nf4    bytes  uint8 [out·in/2, 1]      bitsandbytes' layout, blocks of 64
           absmax fp32  [out·in/64]
    none   dense  bf16  [out, in]

`code − 8` and the (scale, zero) pairs are what torch's CPU kernel `_weight_int4pack_mm_for_cpu` takes.
"""

from typing import Any

import numpy as np
import torch

from persona.errors import ModelError

GROUP = 32
NF4_BLOCK = 64
_Q4_1_BYTES = 20  # fp16 scale, fp16 minimum, 16 bytes of codes


def from_q4_1(rows: "np.ndarray[Any, Any]") -> tuple[torch.Tensor, torch.Tensor]:
    """GGUF Q4_1 rows uint8 [out, in/32·20] → codes uint8 [out, in], scales bf16 [in/32, out, 2]. Codes are exact."""
    blocks = np.ascontiguousarray(rows).reshape(len(rows), -1, _Q4_1_BYTES)
    scale = blocks[..., 0:2].copy().view(np.float16).astype(np.float32)[..., 0]
    least = blocks[..., 2:4].copy().view(np.float16).astype(np.float32)[..., 0]
    packed = blocks[..., 4:]
    codes = np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(len(rows), -1)
    pairs = np.stack([scale, least + 8 * scale], axis=-1)  # [out, in/32, 2]
    return torch.from_numpy(codes), torch.from_numpy(pairs).transpose(0, 1).contiguous().bfloat16()


def encode(dense: torch.Tensor, weights: str) -> dict[str, torch.Tensor]:
    """dense [out, in] → the named parts of the form `weights`."""
    if weights == "none":
        return {"dense": dense.bfloat16()}
    if weights == "nf4":
        from bitsandbytes import functional

        data, state = functional.quantize_4bit(dense.float().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        return {"bytes": data, "absmax": state.absmax}
    codes, scales = int4(dense)
    return {"codes": pack_nibbles(codes), "scales": scales}


def int4(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to nearest: dense [out, in] → codes uint8 [out, in], scales bf16 [in/32, out, 2]."""
    rows, columns = dense.shape
    if columns % GROUP or rows % 16:
        raise ModelError(f"A projection of {rows}×{columns} has no int4 form (multiples of 16×{GROUP} have).")
    groups = dense.float().view(rows, -1, GROUP)
    least, most = groups.amin(-1), groups.amax(-1)
    scale = ((most - least) / 15).clamp_min(1e-8).bfloat16().float()
    zero = (least + 8 * scale).bfloat16().float()
    codes = ((groups - zero[..., None]) / scale[..., None] + 8).round().clamp(0, 15).to(torch.uint8)
    pairs = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()
    return codes.view(rows, columns), pairs


def int4_dense(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """codes uint8 [out, in], scales [in/32, out, 2] → dense [out, in]."""
    rows, columns = codes.shape
    pairs = scales.transpose(0, 1).to(dtype)  # [out, in/32, 2]
    groups = codes.view(rows, -1, GROUP).to(dtype) - 8
    return (groups * pairs[..., :1] + pairs[..., 1:]).view(rows, columns)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in] → uint8 [out, in/2]."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in/2] → uint8 [out, in]."""
    return torch.stack([packed & 15, packed >> 4], -1).view(packed.shape[0], -1)
