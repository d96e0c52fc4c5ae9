"""What the interpreter does not see: every kernel is compiled to machine code, for GPUs that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

from parts import library

SHARED = 99 * 1024  # bytes that a block may have on consumer GPUs since Ampere


def test_every_kernel_compiles_for_cuda(tmp_path: Path) -> None:
    library("triton")
    root = Path(__file__).parent
    path = os.pathsep.join([str(root.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, str(root / "compile_all.py"), "bf16", "80", "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 2 * 11
    assert all(int(shared) <= SHARED for *_, shared, _ in lines)
    assert {spilled for *_, spilled in lines} == {"0"}
