"""Compiles every kernel for GPUs that need not be there: `python compile_all.py bf16 80 90` (compute capabilities).

One line a kernel: capability, name, bytes of machine code, of shared memory, and of registers that it spills.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from persona.engine.kernels import reference
from persona.engine.kernels import triton_attention as attention
from persona.engine.kernels import triton_fourbit as fourbit
from persona.engine.kernels import triton_lora as lora
from persona.engine.kernels.triton_product import operand

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def kernels(kind: str) -> Iterator[tuple[Any, dict[str, str], dict[str, Any]]]:
    """Each kernel with the types of its pointers and its constants, as the wrappers launch it for an 8B model."""
    x, fp32, int64, uint8 = f"*{kind}", "*fp32", "*i64", "*u8"
    part = {"SPLIT": attention.SPLIT, "BLOCK": attention.BLOCK, "GROUP": 16, "DIM": 128, "TYPE": operand(TYPES[kind])}
    pointers = {"table": int64, "lengths": int64, "parts": fp32, "sums": fp32}
    yield attention._part, {"q": x, "keys": x, "values": x, **pointers}, part
    yield attention._join, {"out": x, **pointers}, {"SPLIT": attention.SPLIT, "DIM": 128}
    tile = {"QUERIES": reference.QUERIES, "BLOCK": attention.BLOCK, "DIM": 128, "TYPE": operand(TYPES[kind])}
    pointers = {"q": x, "keys": x, "values": x, "out": x, "table": int64, "blocks": "*i32"}
    yield attention._prompts, pointers, {**tile, "num_warps": attention.WARPS}
    ranks = {"RANKS": lora.RANKS, "LANES": lora.LANES}
    pointers = {"table": int64, "narrow": fp32}
    yield lora._shrink, {"x": x, **pointers}, {**ranks, "CHUNK": lora.CHUNK, "INPUTS": lora.INPUTS}
    yield lora._expand, {"y": x, **pointers}, {**ranks, "OUTPUTS": lora.OUTPUTS}
    ranks, pointers = {**ranks, "BLOCK": reference.BLOCK}, {**pointers, "blocks": "*i32"}
    tile = {"CHUNK": lora.CHUNK, "INPUTS": lora.INPUTS, "TYPE": operand(TYPES[kind])}
    yield lora._shrink_blocks, {"x": x, **pointers}, {**ranks, **tile}
    yield lora._expand_blocks, {"y": x, **pointers}, {**ranks, "OUTPUTS": lora.OUTPUTS}
    for rows in (16, 32):
        tile = {"ROWS": rows, "OUTPUTS": fourbit.OUTPUTS, "INPUTS": fourbit.INPUTS, "TYPE": operand(TYPES[kind])}
        yield fourbit._int4, {"x": x, "codes": uint8, "scales": "*bf16", "parts": fp32}, {"GROUP": 32, **tile}
        yield fourbit._nf4, {"x": x, "data": uint8, "absmax": fp32, "table": fp32, "parts": fp32}, {"GROUP": 64, **tile}


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int) -> Any:
    """What is neither pointer nor constant is an int; `scale` is a float. num_warps is how it is launched."""
    options = {"num_warps": constants.pop("num_warps", 4)}
    scalars = {name: "fp32" if name == "scale" else "i32" for name in kernel.arg_names}
    types = {name: pointers.get(name, kind) for name, kind in scalars.items()} | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [at for at, name in enumerate(kernel.arg_names) if types[name].startswith("*") and name != "table"]
    attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}  # as torch allocates, and launches find
    source = triton.compiler.ASTSource(kernel, types, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled(made: Any, capability: int) -> int:
    """Bytes that are stored because registers ran out, as the assembler tells."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        target = f"--gpu-name=sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", target, file.name, "-o", os.devnull]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.findall(r"(\d+) bytes spill stores", told)
    assert found, told
    return sum(map(int, found))


if __name__ == "__main__":
    for wanted in map(int, sys.argv[2:]):
        for function, pointers, constants in kernels(sys.argv[1]):
            made = compiled(function, pointers, constants, wanted)
            size, name = len(made.asm["cubin"]), function.fn.__name__
            sys.stdout.write(f"{wanted} {name} {size} {made.metadata.shared} {spilled(made, wanted)}\n")
