"""The device that is measured, and what was found on it."""

import datetime
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from gpu_model import Size

from persona.engine import attention, graphs, runner, weights
from persona.engine.graphs import Record, Work
from persona.engine.kernels.choice import Kernels

Figures = dict[str, object]
WARM, SAMPLE = 0.2, 0.02  # seconds of replays before any is timed; of those that are timed together, at least


class Bench:
    """The device, its kernels, and what was found."""

    def __init__(self, size: Size, device: torch.device, kernels: Kernels) -> None:
        self.size, self.device, self.kernels = size, device, kernels
        self.cuda = device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.found: list[tuple[str, Figures]] = []

    def report(self, measure: str, **figures: object) -> None:
        self.found.append((measure, figures))
        sys.stdout.write(json.dumps({"measure": measure, **figures}) + "\n")
        sys.stdout.flush()

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def recorder(self) -> Record:
        """What makes recordings that share memory: CUDA graphs, or work itself on the CPU."""
        return graphs.Recorder() if self.cuda else _again

    def seconds(self, work: Work) -> float:
        """The median of a replay."""
        replay, _ = self.recorder()(work)
        if self.cuda:
            return self._by_the_gpu(replay)
        times = []
        for _ in range(self.size.rounds + 1):
            started = time.perf_counter()
            replay()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:] or times)

    def _by_the_gpu(self, replay: Callable[[], None]) -> float:
        """By its own clock, of so many replays in a row that launches do not count, once it runs at full speed."""
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < WARM:
            replay()
            count += 1
            torch.cuda.synchronize()
        several = max(1, math.ceil(count * SAMPLE / WARM))
        times = []
        for _ in range(max(1, self.size.rounds)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()  # type: ignore[no-untyped-call]
            for _ in range(several):
                replay()
            end.record()  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1000 / several)  # type: ignore[no-untyped-call]
        return statistics.median(times)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def let_go(self) -> None:
        """Give back what a measure had, recordings that refer to themselves included."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def fits(self, size: int) -> bool:
        """Whether so many bytes leave a tenth of the free memory."""
        self.let_go()
        return not self.cuda or size < 0.9 * torch.cuda.mem_get_info()[0]

    def cached(self, size: int) -> bool:
        """Whether so many bytes, read again and again, may come from the GPU's own cache and not from its memory."""
        return self.cuda and size < 2 * torch.cuda.get_device_properties(self.device).L2_cache_size

    def section(self) -> str:
        """What was found as Markdown, a table a measure."""
        card = torch.cuda.get_device_name() if self.cuda else "no GPU: Triton's interpreter"
        lines = [f"### {card}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}", ""]
        lines += [
            f"torch {torch.__version__}, shape {self.size.name}, random weights, rows of {self.size.length} tokens.",
            "",
        ]
        for measure in dict.fromkeys(name for name, _ in self.found):
            lines += [*_table(measure, [figures for name, figures in self.found if name == measure]), ""]
        return "\n".join(lines)


def _again(work: Work) -> tuple[Callable[[], None], torch.Tensor]:
    result = work()

    def again() -> None:
        result.copy_(work())

    return again, result


def _table(measure: str, rows: list[Figures]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    yield f"**{measure}**"
    yield ""
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield "| " + " | ".join(str(row.get(column, "–")) for column in columns) + " |"


@contextmanager
def path(kernels: Kernels | None) -> Iterator[None]:
    """The engine takes these kernels meanwhile, on whatever device; None: plain torch."""
    before = attention.kernels
    for module in (attention, runner, weights):
        module.kernels = lambda device: kernels  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in (attention, runner, weights):
            module.kernels = before  # type: ignore[attr-defined]
