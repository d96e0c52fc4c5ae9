"""The device that is measured, and what was found on it."""

import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from gpu_model import Size

from persona.engine import attention, graphs, runner, weights
from persona.engine.graphs import Work
from persona.engine.kernels.choice import Kernels

Figures = dict[str, object]


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

    def record(self, work: Work) -> tuple[Callable[[], None], torch.Tensor]:
        """What replays `work`: a CUDA graph, or work itself on the CPU."""
        if self.cuda:
            return graphs.recorded(work)
        result = work()

        def again() -> None:
            result.copy_(work())

        return again, result

    def seconds(self, work: Work) -> float:
        """The median of a replay."""
        replay, _ = self.record(work)
        times = []
        for _ in range(self.size.rounds + 1):
            self.synchronize()
            started = time.perf_counter()
            replay()
            self.synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:] or times)

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
        return not self.cuda or size < 0.9 * torch.cuda.mem_get_info()[0]

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
