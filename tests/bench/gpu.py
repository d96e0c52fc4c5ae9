"""The GPU path on the GPU of this machine: first whether it is right, then how quick it is, on an 8B-shaped model.

    make bench-gpu [ARGS="--only decode"]

prints one JSON line a figure and appends a dated section to docs/BENCHMARKS.md. Weights are random. What disagrees with
plain torch ends it before anything is timed. Kernels are timed as CUDA graphs over all layers, so that neither launches
nor a cache that holds one layer's matrix spoil a figure; decode steps end with an argmax and without sampling. Then the
whole service and the engine's process run on a prepared model of that shape (gpu_service.py), which needs 15 GB of disk
below TMPDIR and 22 GB of RAM. It ends with 1 if a program of these failed.

    TRITON_INTERPRET=1 make bench-gpu ARGS=--tiny

runs the same on a tiny shape on the CPU, in Triton's interpreter, to try this file out: its times mean nothing.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import gpu_right
import gpu_service
import gpu_speed
import torch
from gpu_bench import Bench, path
from gpu_model import EIGHT_B, TINY

from persona.engine.kernels import choice
from persona.engine.kernels.choice import Kernels

PARTS = {"kernels": lambda bench, _: gpu_speed.measures(bench), "service": gpu_service.measures}


def device_path() -> tuple[torch.device, Kernels]:
    """What there is to measure. Ends the program with a sentence if that is nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu"), choice.triton_kernels()
    if not torch.cuda.is_available():
        sys.exit("There is no CUDA GPU here, or torch is a build without CUDA: nothing was measured.")
    if (quick := choice.kernels("cuda")) is None:
        sys.exit("Triton is not installed or does not start (`persona doctor`): there are no kernels to measure.")
    return torch.device("cuda"), quick


def check(bench: Bench) -> None:
    """Ends the program if something is wrong."""
    found = list(gpu_right.errors(bench))
    for one in found:
        bench.report("largest error", what=one.what, found=f"{one.found:.1e}", limit=f"{one.limit:.1e}")
    if wrong := [one.what for one in found if one.wrong]:
        sys.exit(f"Not what plain torch gives: {', '.join(wrong)}. Nothing was timed.")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try this out; nothing is appended")
    parser.add_argument("--part", choices=PARTS, action="append", help="the kernels and steps, or the whole service")
    parser.add_argument("--only", default="", help="part of a measure's name")
    parser.add_argument("--out", type=Path, help="append to this file, not to docs/BENCHMARKS.md")
    options = parser.parse_args()
    device, quick = device_path()
    if device.type == "cpu" and not options.tiny:
        sys.exit("Triton's interpreter takes days for a model of this size: add --tiny.")
    torch.manual_seed(1)
    bench = Bench(TINY if options.tiny else EIGHT_B, device, quick)
    out = options.out or (None if options.tiny else Path(__file__).parents[2] / "docs/BENCHMARKS.md")
    with path(quick), tempfile.TemporaryDirectory(prefix="persona-") as scratch:
        check(bench)
        try:
            for part in options.part or PARTS:
                for name, measure in PARTS[part](bench, Path(scratch)).items():
                    if options.only in name:
                        measure()
                        bench.let_go()
        finally:  # what was measured before something failed
            if out is not None:
                with out.open("a", encoding="utf-8") as file:
                    file.write("\n" + bench.section())
    if failed := [str(figures["what"]) for name, figures in bench.found if name == "failed"]:
        sys.exit(f"What ran in a process of its own failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
