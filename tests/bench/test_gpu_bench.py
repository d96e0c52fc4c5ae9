"""`make bench-gpu` without a GPU: it says so, and its whole way runs on a tiny shape in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parts import library

ROOT = Path(__file__).parents[2]


def bench(*options: str, interpret: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "tests/bench/gpu.py"), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    done = bench(interpret="0")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "nothing was measured" in done.stderr.splitlines()[-1]


def section(part: str, out: Path) -> list[str]:
    """The measures of a part on a tiny shape, which are in the section that was written, too."""
    library("triton")
    done = bench("--tiny", "--part", part, "--out", str(out), interpret="1")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]  # bitsandbytes warns of the CPU
    found = list(dict.fromkeys(json.loads(line)["measure"] for line in lines))
    written = out.read_text(encoding="utf-8")
    assert written.startswith("\n### no GPU: Triton's interpreter, ")
    assert all(f"\n**{measure}**\n" in written for measure in found)
    return found


def test_kernels_and_steps_run_on_a_tiny_shape_and_make_a_section(tmp_path: Path) -> None:
    assert section("kernels", tmp_path / "section.md") == [
        "largest error",
        "device",
        "4-bit product",
        "attention",
        "attention of prompts",
        "adapters",
        "adapters of prompts",
        "decode, tokens/s",
        "PEFT on Linear4bit, tokens/s",
    ]


def test_the_whole_service_runs_on_a_tiny_shape_and_makes_a_section(tmp_path: Path) -> None:
    assert section("service", tmp_path / "section.md") == [
        "largest error",
        "M1, equal ranks",
        "M1, ranks 2, 8 and 16",
        "M2",
        "M3",
        "M15: capacity",
        "M15",
        "M16",
        "M17",
        "M7 swaps under load",
        "start",
        "M6 flip",
    ]
