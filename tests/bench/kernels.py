"""The small facts behind docs/DECISIONS.md: what single operations cost on this CPU, one JSON line each.

    .venv/bin/python tests/bench/kernels.py [--threads 2] [--only PART]

`step` is one forward of the embedded model without cache and without the service. To see what a busy machine does to
it, run the same beside two busy processes, with and without GOMP_SPINCOUNT=10000 in the environment.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from jobs.trainer import Trainer
from persona.engine import decoder, prepare, quantize, sampler
from persona.engine.attention import KvCache
from persona.engine.decoder import Decoder
from persona.engine.kernels import native, reference
from persona.engine.kernels.native import Part
from persona.engine.memory import Memory
from persona.engine.protocol import Example, Plan, Sampling, TrainRequest
from persona.engine.sampler import Sampler
from persona.engine.shape import TARGETS, Shape
from persona.engine.weights import Int4, Projection, compute_dtype
from persona.settings import Settings


def report(measure: str, **figures: object) -> None:
    sys.stdout.write(json.dumps({"measure": measure, **figures}) + "\n")
    sys.stdout.flush()


def timed(work: Callable[[], object], count: int = 60) -> list[float]:
    """Ascending milliseconds of `count` runs after one that does not count."""
    work()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times)


def new_shapes() -> None:
    """A bf16 product with a number of rows that was not seen before, and again."""
    matrix = torch.randn(576, 3072).bfloat16()
    first, again = (
        [timed_once(torch.randn(rows, 576).bfloat16(), matrix) for rows in range(101, 131)] for _ in range(2)
    )
    report("new number of rows, ms", first=rounded(first), again=rounded(again))


def timed_once(x: torch.Tensor, matrix: torch.Tensor) -> float:
    return timed_call(lambda: torch.matmul(x, matrix))


def small_products() -> None:
    """One row through an adapter of rank 16, in both types."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(576, 16).to(dtype), torch.randn(1, 16, 960).to(dtype)
        x, y = torch.randn(1, 1, 576).bfloat16(), torch.randn(1, 960).bfloat16()
        found[str(dtype)] = rounded(
            timed(lambda a=a, b=b, x=x, y=y: y.add_(torch.matmul(torch.matmul(x.to(a.dtype), a), b).squeeze(1)), 200), 4
        )
    report("adapter product of one row, ms", **found)


@torch.no_grad()
def added_products() -> None:
    """An adapter of rank 2 for each of so many rows: two products and an addition, or added by the second product."""
    found = {}
    for rows in (1, 8, 32):
        x, y = torch.randn(rows, 576), torch.randn(rows, 960)
        a, b = torch.randn(rows, 576, 2), torch.randn(rows, 2, 960)

        def apart(x: torch.Tensor = x, y: torch.Tensor = y, a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            y[0 : len(x)] += torch.matmul(torch.matmul(x[0 : len(x)].unsqueeze(1).to(b.dtype), a), b).squeeze(1)

        def added(x: torch.Tensor = x, y: torch.Tensor = y, a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            y.unsqueeze(1).baddbmm_(torch.bmm(x.unsqueeze(1), a), b)

        found[str(rows)] = [rounded(timed(work, 2000), 4) for work in (apart, added)]
    report("adapters of so many rows, ms: apart, added", **found)


@torch.no_grad()
def pages() -> None:
    """A step writes and reads context of 12 pages a row in all layers: these outside, or pages outside (as KvCache)."""
    shape = Shape.read(prepare.fetch(prepare.EMBEDDED, Settings().cache, "int4", lambda _, __: None).folder)
    dtype, size, found = torch.float32, 32, {}
    memory = Memory(400, KvCache.page_bytes(shape, size, dtype), torch.device("cpu"))
    memory.bytes.zero_()
    cache = KvCache(memory, shape, size, dtype)
    apart = torch.zeros(2, shape.layers, 400, size, shape.kv_heads, shape.head_dim)
    for rows in (1, 8, 32):
        some = torch.randperm(400)[: rows * 12].view(rows, -1)
        k = torch.randn(rows, shape.kv_heads, shape.head_dim)
        slots = torch.tensor([cache.slot(page, 5) for page in some[:, -1].tolist()])

        def inside(some: torch.Tensor = some, k: torch.Tensor = k, slots: torch.Tensor = slots) -> None:
            for layer in range(shape.layers):
                cache.write(layer, slots, k, k)
                for pool in cache.layer(layer):
                    reference.gathered(pool, some)

        def outside(some: torch.Tensor = some, k: torch.Tensor = k) -> None:
            for layer in range(shape.layers):
                keys, values = apart[:, layer]
                keys.flatten(0, 1).index_copy_(0, some[:, -1] * size + 5, k)
                values.flatten(0, 1).index_copy_(0, some[:, -1] * size + 5, k)
                reference.gathered(keys, some), reference.gathered(values, some)  # both in memory at once, as in read

        both = zip(*((timed_call(outside), timed_call(inside)) for _ in range(30)), strict=True)
        found[str(rows)] = [rounded(list(times), 2) for times in both]
    report("context of so many rows, ms: layers outside, pages outside", **found)


def timed_call(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def draw() -> None:
    """The next token of 32 rows over the embedded model's vocabulary, by what the rows ask for: torch beside compiled
    code, in turn."""
    kinds = {
        "greedy": Sampling(),
        "temperature": Sampling(temperature=1.0),
        "top_p": Sampling(temperature=1.0, top_p=0.9),
        "top_k": Sampling(temperature=0.7, top_p=0.95, top_k=50),
        "penalties": Sampling(frequency_penalty=0.5, repetition_penalty=1.1),
    }
    found, ranks = {}, torch.stack([torch.randperm(49_152) for _ in range(32)]) + 1
    logits = -2 * ranks.float().log()  # as steep as a language model's: 64 words have 0.99
    code = native.library(Settings().cache / "native", torch.float32)
    assert code is not None, "there is no C compiler"
    ways = (sampler.in_torch, native.Draw(ctypes.CDLL(str(code))))
    for name, sampling in kinds.items():
        samplers = [Sampler(sampling, range(200)) for _ in range(32)]
        times: list[list[float]] = [[], []]
        for _ in range(30):
            for side, way in enumerate(ways):
                some = logits.clone()  # drawing changes them
                times[side].append(timed_call(partial(sampler.draw, some, samplers, way)))
        found[name] = [rounded(side, 2) for side in times]
    report("draw for 32 rows, ms: torch, compiled", **found)


def few_rows() -> None:
    """The int4 kernel beside the unpacked product, for a projection of the embedded model."""
    codes, scales = quantize.int4(torch.randn(576, 1536))
    found = {}
    for rows in (16, 48, 64, 80, 96, 128):
        x, sides = torch.randn(rows, 1536).to(compute_dtype("cpu")), []
        for limit in (rows, rows - 1):
            projection = Int4(quantize.pack_nibbles(codes), scales, None)
            projection.FEW = limit
            sides.append(rounded(timed(lambda p=projection, x=x: p(x)), 2))
        found[rows] = sides
    report("int4 product of so many rows, ms: kernel, unpacked", **{str(rows): both for rows, both in found.items()})


class Bare:
    """A pass without cache and adapters over one sequence: implements decoder.Pass."""

    def __init__(self, base: Decoder, tokens: int) -> None:
        self.rotary = base.rotary(torch.arange(tokens))

    def project(self, layer: int, target: str, base: Projection, x: torch.Tensor) -> torch.Tensor:
        return base(x)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(out.shape[2], -1)


@torch.no_grad()
def floor() -> None:
    """What this machine gives, the milliseconds below which no decode step can be, and the compiled step beside them.

    A step reads all of the base once, however many rows it has, and multiplies and adds for each weight and row. Its
    context, of 150 tokens a row here, comes to that.
    """
    prepared = prepare.fetch(prepare.EMBEDDED, Settings().cache, "int4", lambda _, __: None)
    base = decoder.load(prepared.folder, "int4", "cpu")
    size, some = base.nbytes(), torch.ones(2**28)
    bandwidth = 4 * len(some) / rounded(timed(some.sum, 9)) * 1000
    found = {"bytes_of_base": size, "read_gb_per_s": round(bandwidth / 1e9, 1)}
    weights, best = sum(math.prod(base.shape.projection(target)) for target in TARGETS) * base.shape.layers, 0.0
    weights += base.shape.vocab * base.shape.hidden
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        rate = 2 * 2048**3 / rounded(timed(lambda a=a, b=b: a @ b, 15), 3) * 1000
        found[f"gflop_per_s_{dtype}".replace("torch.", "")] = round(rate / 1e9)
        best = max(best, rate)
    cache = KvCache(
        Memory(200, KvCache.page_bytes(base.shape, 32, base.dtype), torch.device("cpu")), base.shape, 32, base.dtype
    )
    cache.memory.bytes.zero_()
    steps = native.steps(Settings().cache / "native", base, cache, 4096)
    for rows in (1, 8, 32):
        floor = {"read": 1000 * size / bandwidth, "compute": 2000 * weights * rows / best}
        if steps is not None:
            parts = [Part([100 + row], 150, range(6 * row, 6 * row + 6), None, True) for row in range(rows)]
            floor["step"] = rounded(timed(lambda parts=parts: steps.logits(parts)), 2)
        found[f"ms_{rows}_rows"] = {name: round(value, 2) for name, value in floor.items()}
    report("floor of a step", **found)


def training(rounds: int = 5) -> None:
    """What a training's optimizer step costs the processor where the vocabulary is written out by compiled code, and by
    torch, one after the other; and the share of it in which the layers are written out, which is all that several
    trainings could share."""
    prepared = prepare.fetch(prepare.EMBEDDED, Settings().cache, "int4", lambda _, __: None)
    base = decoder.load(prepared.folder, "int4", "cpu")
    cache = KvCache(
        Memory(2, KvCache.page_bytes(base.shape, 32, base.dtype), torch.device("cpu")), base.shape, 32, base.dtype
    )
    if native.steps(Settings().cache / "native", base, cache, 4096) is None:
        report("training", missing="a C compiler")
        return
    writers = {"compiled": base.head.writer, "torch": None}
    found: dict[str, list[float]] = {name: [] for name in writers}
    for name in [*writers, *list(writers) * rounds]:
        base.head.writer = writers[name]
        seconds, steps = trained(base, prepared.base)
        found[name].append(seconds / steps)
    warm = {name: times[1:] for name, times in found.items()}
    medians = {name: round(1000 * statistics.median(times)) for name, times in warm.items()}
    ratio = statistics.median(a / b for a, b in zip(*warm.values(), strict=True))
    base.head.writer, plain, spent = writers["compiled"], Int4.dense, [0.0]

    def counted(projection: Int4, dtype: torch.dtype) -> torch.Tensor:
        started = time.process_time()
        made = plain(projection, dtype)
        spent[0] += time.process_time() - started
        return made

    Int4.dense = counted  # type: ignore[method-assign]
    whole, _ = trained(base, prepared.base)
    Int4.dense = plain  # type: ignore[method-assign]
    report("training", processor_ms_a_step=medians, ratio=round(ratio, 3), share_of_layers=round(spent[0] / whole, 3))


def trained(base: Decoder, name: str, steps: int = 8) -> tuple[float, int]:
    """Seconds of the processor, and optimizer steps: of a message and a reply of the base's that is rehearsed each."""
    random = torch.Generator().manual_seed(1)

    def example(length: int, targets: int, distil: bool) -> Example:
        tokens = torch.randint(3, base.shape.vocab, (length,), generator=random).tolist()
        return Example(tokens, list(range(length - targets, length)), distil=distil)

    examples = [one for _ in range(steps) for one in (example(150, 10, False), example(60, 20, True))]
    with tempfile.TemporaryDirectory() as out:
        run = Trainer(base, name, TrainRequest(examples, Plan(passes=1, batch_tokens=30), out), None)
        started = time.process_time()
        last = [at for at in run.slices() if at][-1]
        return time.process_time() - started, last.steps


@torch.no_grad()
def step() -> None:
    prepared = prepare.fetch(prepare.EMBEDDED, Settings().cache, "int4", lambda _, __: None)
    base = decoder.load(prepared.folder, "int4", "cpu")
    base.widen()
    run, tokens = Bare(base, 1), torch.tensor([1000])

    def forward() -> None:
        h = base.embedded(tokens)
        for layer in range(base.shape.layers):
            h = base.layer(layer, h, run)
        base.logits(h)

    times = timed(forward)
    spins = os.environ.get("GOMP_SPINCOUNT", "default")
    report("step of one row, ms", spins=spins, p50=rounded(times), p90=round(times[int(0.9 * len(times))], 1))


def rounded(times: list[float], digits: int = 1) -> float:
    return round(statistics.median(times), digits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, measure in {
        "new shapes": new_shapes,
        "small products": small_products,
        "added products": added_products,
        "pages": pages,
        "draw": draw,
        "few rows": few_rows,
        "floor": floor,
        "training": training,
        "step": step,
    }.items():
        if options.only in name:
            measure()


if __name__ == "__main__":
    main()
