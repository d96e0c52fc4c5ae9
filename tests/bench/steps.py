"""What stands around the compiled step in the engine's loop, and what its way with prompts costs beside plain torch.

    .venv/bin/python tests/bench/steps.py [--threads 2] [--rounds 3] [--only around|prompts]

The engine's own loop in this process, on the embedded model. One JSON line a measure, medians in milliseconds:

    around    whole steps of so many decode rows, each with its own adapter, greedy or drawn at a temperature; the call
              of the compiled step in them, and the rest: plan, rows, draw, text, answers
    prompts   256 tokens of one prompt behind so many others, by the compiled step and layer by layer, in turn
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paging
import torch

from persona.engine import decoder, prepare, protocol
from persona.engine.attention import KvCache
from persona.engine.client import SPINS
from persona.engine.grammar import Grammars
from persona.engine.kernels import native
from persona.engine.kernels.native import NativeSteps
from persona.engine.memory import Memory
from persona.engine.protocol import GenerateRequest, Sampling
from persona.engine.runner import Runner
from persona.engine.sequence import Plan, Segment, Sequence
from persona.settings import Settings

ROWS, PROMPT, REPLY, SETTLED = (1, 8, 32), 100, 140, 20
CHUNK, BEHIND = 256, (0, 1024, 3500)


def around(prepared: prepare.Prepared, rounds: int) -> None:
    base = decoder.load(prepared.folder, "int4", "cpu")
    tokenizer = (prepared.folder / "tokenizer.json").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        refs = paging.adapters(Path(folder), base, prepared.base)
        side = paging.Side(base, prepared, 700, None, Grammars(tokenizer, base.shape.vocab, frozenset()))
        steps: Any = side.loop._runner._whole
        assert isinstance(steps, NativeSteps), "there is no C compiler"
        spent = [0.0]
        steps._code = _Timed(steps._code, spent)
        for rows in ROWS:
            for heat in (0.0, 1.0):
                found = [_steps(side, refs[:rows], heat, spent) for _ in range(rounds)]
                whole, inside, rest = (round(1000 * statistics.median(part), 2) for part in zip(*found, strict=True))
                paging.report(measure="around", rows=rows, temperature=heat, step=whole, compiled=inside, rest=rest)


class _Timed:
    """The compiled code, whose steps are timed."""

    def __init__(self, code: Any, spent: list[float]) -> None:
        self._code, self._spent = code, spent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._code, name)

    def run(self, *options: object) -> object:
        started = time.perf_counter()
        try:
            return self._code.run(*options)
        finally:
            self._spent[0] += time.perf_counter() - started


def _steps(side: paging.Side, refs: list[Any], heat: float, spent: list[float]) -> tuple[float, float, float]:
    """Medians of the steps in which all rows decode: whole, inside, the rest."""
    side.ended.clear()
    for number, ref in enumerate(refs):
        side._job += 1
        sampling = Sampling(max_tokens=REPLY, temperature=heat, seed=number, ignore_eos=True)
        request = GenerateRequest(paging.text(side._job, length=PROMPT), sampling, ref, ref.user_id)
        side.loop.handle(protocol.Generate(side._job, request))
    times = list[tuple[float, float, float]]()
    while len(side.ended) < len(refs):
        decoding = [not one.prefilling for one in side.scheduler._running]
        spent[0], started = 0.0, time.perf_counter()
        side.loop.work()
        whole = time.perf_counter() - started
        if len(decoding) == len(refs) and all(decoding):
            times.append((whole, spent[0], whole - spent[0]))
        if side.loop.idle and len(side.ended) < len(refs):
            side.bell.clear()
            side.bell.wait(1)
    return tuple(statistics.median(part) for part in zip(*times[SETTLED:], strict=True))  # type: ignore[return-value]


@torch.no_grad()
def prompts(prepared: prepare.Prepared, rounds: int) -> None:
    runs: dict[str, Callable[[int], None]] = {}
    for name in ("compiled", "layer by layer"):
        base = decoder.load(prepared.folder, "int4", "cpu")
        size = KvCache.page_bytes(base.shape, paging.SIZE, base.dtype)
        cache = KvCache(Memory(-(-4096 // paging.SIZE), size, base.device), base.shape, paging.SIZE, base.dtype)
        cache.memory.bytes.zero_()
        whole = native.steps(Settings().cache / "kernels", base, cache, 4096) if name == "compiled" else None
        assert name != "compiled" or whole is not None, "there is no C compiler"
        if whole is None:
            base.widen()
        runner = Runner(base, cache, whole)

        def run(behind: int, runner: Runner = runner, pages: int = cache.memory.pages) -> None:
            some = paging.text(behind, length=behind + CHUNK)
            one = Sequence(1, some, len(some), len(some) + 1, computed=behind, cached=behind, pages=tuple(range(pages)))
            runner.run(Plan([], [Segment(one, behind, len(some))]), {1: None})

        runs[name] = run
    for behind in BEHIND:
        found: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(5 * rounds + 1):
            for name, run in runs.items():
                started = time.perf_counter()
                run(behind)
                if number:
                    found[name].append(1000 * (time.perf_counter() - started))
        medians = {name: round(statistics.median(times)) for name, times in found.items()}
        pairs = zip(found["compiled"], found["layer by layer"], strict=True)
        ratio = round(statistics.median(a / b for a, b in pairs), 2)
        paging.report(measure="prompts", tokens=CHUNK, behind=behind, **medians, ratio=ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    prepared = prepare.fetch(prepare.EMBEDDED, Settings().cache, "int4", lambda _, __: None)
    for name, measure in {"around": around, "prompts": prompts}.items():
        if options.only in name:
            measure(prepared, options.rounds)


if __name__ == "__main__":
    if "GOMP_SPINCOUNT" not in os.environ:  # read once, when OpenMP is loaded: as the service starts the engine
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GOMP_SPINCOUNT": SPINS})
    main()
