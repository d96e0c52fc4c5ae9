"""What the engine costs on this machine: adapters beside the bare base, training beside serving, a flip.

    .venv/bin/python tests/bench/engine.py [--rounds 5] [--tokens 48] [--ranks 4,64] [--only PART]

Runs the real engine process on the configured model and prints one JSON line a measure. Two things that are compared
run in turn, in one process; figures are medians. Nothing else should use the machine meanwhile.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import numpy as np

from persona.engine import adapter_file, checkpoint_file, device, prepare, random_adapter
from persona.engine.client import LocalEngine
from persona.engine.protocol import (
    AdapterRef,
    Example,
    GenerateRequest,
    Plan,
    Sampling,
    ScoreRequest,
    TrainRequest,
    replace,
)
from persona.engine.shape import TARGETS, Shape
from persona.settings import Settings, load

PROMPT = 128
STREAM = 640  # tokens of a reply whose gaps are looked at
PLAN = Plan(passes=1)


def report(measure: str, **figures: object) -> None:
    sys.stdout.write(json.dumps({"measure": measure, **figures}) + "\n")
    sys.stdout.flush()


def prompt(seed: int, length: int = PROMPT) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(1000, 40000, length)]


def adapter(folder: Path, prepared: prepare.Prepared, number: int, rank: int = PLAN.rank) -> AdapterRef:
    """A trained adapter's form with random values."""
    out = folder / str(number)
    out.mkdir()
    plan = replace(PLAN, rank=rank)
    file = random_adapter.write(out, Shape.read(prepared.folder), prepared.base, plan, number)
    return AdapterRef(number, 1, str(out), prepare.sha256(file))


async def stream(engine: LocalEngine, tokens: int, seed: int, ref: AdapterRef | None = None) -> list[float]:
    """When each chunk of one reply of exactly `tokens` tokens came, in seconds."""
    request = GenerateRequest(prompt(seed), Sampling(max_tokens=tokens, temperature=1.0, seed=seed), ref)
    async with aclosing(engine.generate(request)) as chunks:  # type: ignore[type-var]
        return [time.perf_counter() async for _ in chunks]


async def throughput(engine: LocalEngine, tokens: int, refs: list[AdapterRef | None]) -> float:
    """Tokens per second of decoding, from when every row has its first token to when the first row ends."""
    runs = await asyncio.gather(*(stream(engine, tokens, seed, ref) for seed, ref in enumerate(refs)))
    start, end = max(times[0] for times in runs), min(times[-1] for times in runs)
    produced = sum(sum(start < at <= end for at in times) for times in runs)
    return produced / (end - start)


async def adapters_beside_the_base(engine: LocalEngine, refs: list[AdapterRef], rounds: int, tokens: int) -> None:
    for rows in (1, 8, 32):
        own: list[AdapterRef | None] = list(refs[:rows])
        pairs = []
        for _ in range(rounds + 1):
            base = await throughput(engine, tokens, [None] * rows)
            pairs.append((base, await throughput(engine, tokens, own)))
        base, with_adapters = (statistics.median(side) for side in zip(*pairs[1:], strict=True))
        ratio = statistics.median(b / a for a, b in pairs[1:])
        report("M2 decode", rows=rows, base=round(base, 1), own_adapters=round(with_adapters, 1), ratio=round(ratio, 3))


async def while_adapters_load(settings: Settings, prepared: prepare.Prepared, refs: list[AdapterRef]) -> None:
    """Gaps of one stream while another user's first token needs an adapter from disk, or one that is there."""
    small = settings.engine.model_copy(update={"memory_mb": 64, "host_mb": 1})
    engine = LocalEngine(settings.model_copy(update={"engine": small}), prepared)
    await engine.start()

    async def beside(others: list[AdapterRef]) -> tuple[list[float], int]:
        before = (await engine.health()).disk_loads
        times = asyncio.create_task(stream(engine, STREAM, 1))
        for number, ref in enumerate(itertools.cycle(others)):
            if times.done():
                break
            await stream(engine, 1, number, ref)
            await asyncio.sleep(0.05)
        return differences(await times), (await engine.health()).disk_loads - before

    cold, warm, loads = list[float](), list[float](), 0
    for _ in range(3):
        gaps_of, some = await beside(refs)
        cold += gaps_of
        loads += some
        gaps_of, none = await beside(refs[:1])
        warm += gaps_of
        assert none <= 1, "one adapter has to stay"
    with_loads, without = gaps(cold), gaps(warm)
    ratios = {name: round(with_loads[name] / without[name], 2) for name in without}
    report("gaps in ms while adapters load", loading=with_loads, resident=without, ratios=ratios, loads=loads)
    await engine.stop()


async def first_token(engine: LocalEngine, refs: list[AdapterRef], rounds: int) -> None:
    """Warm adapter, 128 prompt tokens."""
    times = []
    for seed in range(rounds + 1):
        started = time.perf_counter()
        times.append((await stream(engine, 2, seed, refs[0]))[0] - started)
    report("first token", prompt=PROMPT, ms=round(1000 * statistics.median(times[1:]), 1))


def examples(count: int) -> list[Example]:
    return [Example(prompt(seed, 64), list(range(48, 64))) for seed in range(count)]


@asynccontextmanager
async def training(engine: LocalEngine, out: Path, count: int) -> AsyncIterator[None]:
    """A training under way, past its first optimizer step."""
    begun = asyncio.Event()

    async def follow() -> None:
        async for _ in engine.train(TrainRequest(examples(count), PLAN, str(out), checkpoint=str(out))):
            begun.set()

    task = asyncio.create_task(follow())
    try:
        await begun.wait()
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def training_alone(engine: LocalEngine, out: Path) -> None:
    started = time.perf_counter()
    async for progress in engine.train(TrainRequest(examples(128), PLAN, str(out))):
        last = progress
    seconds = time.perf_counter() - started
    size = (out / adapter_file.FILE).stat().st_size
    report("training alone", tokens=last.tokens, tokens_per_s=round(last.tokens / seconds, 1), adapter_bytes=size)


async def keeping_the_state(engine: LocalEngine, prepared: prepare.Prepared, out: Path) -> None:
    """What a checkpoint costs after each optimizer step: its pieces, without what the engine does between them."""
    shape = Shape.read(prepared.folder)
    layers = round(shape.layers * PLAN.layers)
    size = layers * PLAN.rank * sum(sum(shape.projection(target)) for target in TARGETS)
    vector = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    head = checkpoint_file.Header("r" * 64, 1, 1.0, 1.0, 1.0, 1, 1.0, 0, 1)
    state = checkpoint_file.State(head, dict.fromkeys(("values", "mean", "square"), vector))
    whole, longest = [], []
    for _ in range(20):
        times = [time.perf_counter(), *(time.perf_counter() for _ in checkpoint_file.write(out, state))]
        pieces = [1000 * (b - a) for a, b in itertools.pairwise(times)]
        whole.append(sum(pieces))
        longest.append(max(pieces))
    steps = [progress.seconds async for progress in engine.train(TrainRequest(examples(64), PLAN, str(out)))]
    step = 1000 * statistics.median(b - a for a, b in itertools.pairwise(steps[:-1]))
    report(
        "state of a training",
        bytes=(out / checkpoint_file.FILE).stat().st_size,
        ms=round(statistics.median(whole), 1),
        longest_piece_ms=round(max(longest), 1),
        step_ms=round(step),
        share=round(statistics.median(whole) / step, 4),
    )


def differences(times: list[float]) -> list[float]:
    """Milliseconds between neighbours of `times`, in seconds."""
    return [1000 * (b - a) for a, b in itertools.pairwise(times)]


def gaps(milliseconds: list[float]) -> dict[str, float]:
    found = sorted(milliseconds)
    pick = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(found[min(len(found) - 1, int(share * len(found)))], 1) for name, share in pick.items()}


async def training_beside_serving(engine: LocalEngine, out: Path, rounds: int) -> None:
    """One user streams without a pause: the hardest case. Alone and beside a training in turn."""
    alone, beside = list[float](), list[float]()
    done = 0
    async with training(engine, out, 4000):
        for seed in range(rounds):
            await engine.pause()
            alone += differences(await stream(engine, STREAM, seed))
            await engine.resume()
            before = (await engine.health()).slices
            beside += differences(await stream(engine, STREAM, seed))
            done += (await engine.health()).slices - before
    without, trained = gaps(alone), gaps(beside)
    ratios = {name: round(trained[name] / without[name], 2) for name in without}
    report("M8 gaps in ms, engine always busy", alone=without, training=trained, ratios=ratios, slices=done)


async def training_kept(engine: LocalEngine, out: Path, rounds: int) -> None:
    """Slices a second beside a stream that is busy half of the time, or always, over those of training alone."""

    async def serve(seed: int, rest: float) -> float:
        """Busy seconds of a stream that rests for so long after each busy second."""
        busy = 0.0
        for part in range(8):
            started = time.perf_counter()
            await stream(engine, 64, 100 * seed + part)
            busy += time.perf_counter() - started
            await asyncio.sleep(rest * (time.perf_counter() - started))
        return busy

    async def measured(work: Awaitable[float]) -> tuple[float, float]:
        """Slices a second, busy share."""
        before, started = (await engine.health()).slices, time.perf_counter()
        busy = await work
        seconds = time.perf_counter() - started
        return ((await engine.health()).slices - before) / seconds, busy / seconds

    found: dict[str, list[float]] = {"half": [], "always": []}
    async with training(engine, out, 4000):
        for seed in range(rounds):
            alone, _ = await measured(asyncio.sleep(8, 0.0))
            for name, rest in (("half", 1.0), ("always", 0.0)):
                kept, busy = await measured(serve(seed, rest))
                found[name].append(kept / alone / (1 - busy + 0.09 * busy))
    told = {name: round(statistics.median(values), 2) for name, values in found.items()}
    report("M9 training kept, of what M8 leaves", busy=told, spread={k: [min(v), max(v)] for k, v in found.items()})


async def memory(engine: LocalEngine, out: Path) -> None:
    """What the engine has in RAM after a stream, and what a training adds to that."""
    await stream(engine, STREAM, 1)
    before, most = await engine.health(), 0
    async with training(engine, out, 400):
        for _ in range(200):
            most = max(most, (await engine.health()).memory)
            await asyncio.sleep(0.05)
    grown = most - before.memory
    report("M14 memory", base_bytes=before.base_bytes, serving=before.memory, training=most, grown=grown)


async def beside_a_flood(engine: LocalEngine, streams: int = 60) -> None:
    """First tokens of one user, alone and beside `streams` of another: prompts of 64 to 256 tokens, replies of 40."""
    seeds, lengths = itertools.count(), np.random.default_rng(3)

    async def one(user: int, reply: int) -> float:
        started = time.perf_counter()
        sampling = Sampling(max_tokens=reply, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(prompt(next(seeds), int(lengths.integers(64, 257))), sampling, None, user)
        async with aclosing(engine.generate(request)) as chunks:  # type: ignore[type-var]
            times = [time.perf_counter() - started async for _ in chunks]
        return times[0]

    async def ever() -> None:
        while True:
            await one(1, 40)

    await one(2, 8)
    alone = [await one(2, 8) for _ in range(30)]
    flood = [asyncio.create_task(ever()) for _ in range(streams)]
    await asyncio.sleep(8)
    beside = []
    for _ in range(30):
        beside.append(await one(2, 8))
        await asyncio.sleep(1)
    for task in flood:
        task.cancel()
    await asyncio.wait(flood)
    told = {"alone_ms": [1000 * value for value in alone], "beside_ms": [1000 * value for value in beside]}
    marks = {
        name: {"p50": np.percentile(v, 50).round(), "p95": np.percentile(v, 95).round()} for name, v in told.items()
    }
    report(
        "first token beside a flood", **marks, ratio_p95=round(marks["beside_ms"]["p95"] / marks["alone_ms"]["p95"], 2)
    )


async def cold_adapters(settings: Settings, prepared: prepare.Prepared, refs: list[AdapterRef]) -> None:
    """First token of an adapter that is on disk, or only in RAM, over a second one of the same: in pairs."""
    small = settings.engine.model_copy(update={"memory_mb": 64, "host_mb": 1024})
    engine = LocalEngine(settings.model_copy(update={"engine": small}), prepared)
    await engine.start()
    seeds = itertools.count()

    async def first(ref: AdapterRef) -> float:
        started = time.perf_counter()
        return (await stream(engine, 1, next(seeds), ref))[0] - started

    for place in ("disk", "RAM"):
        before, pairs = await engine.health(), []
        for ref in refs:
            if place == "disk":
                _out_of_the_page_cache(Path(ref.path) / adapter_file.FILE)
            pairs.append((await first(ref), await first(ref)))
        after = await engine.health()
        assert after.loads - before.loads == len(refs), "they have to leave the device: use more"
        assert after.disk_loads - before.disk_loads == (len(refs) if place == "disk" else 0)
        cold, warm = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(a / b for a, b in pairs)
        edge = int(len(ratios) / 2 - 0.98 * len(ratios) ** 0.5)  # of the median's 95 % interval, by order statistics
        report(
            f"M4 first token, adapter {'on disk' if place == 'disk' else 'in RAM'}",
            cold_ms=round(1000 * cold, 1),
            warm_ms=round(1000 * warm, 1),
            ratio=round(statistics.median(ratios), 3),
            interval=[round(ratios[edge], 3), round(ratios[-1 - edge], 3)],
            pairs=len(pairs),
        )
    await engine.stop()


def _out_of_the_page_cache(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def scoring(engine: LocalEngine, refs: list[AdapterRef]) -> None:
    """A gate's work: 21 messages behind one beginning of 400 tokens, one at a time, together, and beside a stream."""
    start = prompt(0, 400)
    some = [ScoreRequest([*start, *prompt(seed, 80)], list(range(455, 480)), refs[0]) for seed in range(1, 22)]
    await engine.score_all(some[:2])

    async def singly() -> None:
        for request in some:
            await engine.score(request)

    async def timed(work: Awaitable[object]) -> float:
        started = time.perf_counter()
        await work
        return round(time.perf_counter() - started, 2)

    one_by_one, together = await timed(singly()), await timed(engine.score_all(some))
    alone = gaps(differences(await stream(engine, 192, 1)))
    task = asyncio.create_task(timed(engine.score_all(some)))
    beside = gaps(differences(await stream(engine, 192, 1)))
    task.cancel()
    report("scoring, s", one_by_one=one_by_one, together=together, gaps_alone=alone, gaps_beside=beside)


async def flip(engine: LocalEngine, refs: list[AdapterRef], rounds: int) -> None:
    """The flip of a staged version, until the engine says that it serves."""
    times = []
    for number in range(rounds):
        ref = refs[number % len(refs)]
        await engine.stage(ref)
        started = time.perf_counter()
        await engine.flip(ref)
        times.append(time.perf_counter() - started)
    report("M6 flip", ms=round(1000 * statistics.median(times), 2))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="part of a measure's name")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--ranks", type=_ranks, default=[PLAN.rank], help="of the adapters, in turn")
    options = parser.parse_args()
    settings = load()
    weights = device.choose(settings.model).weights
    prepared = prepare.fetch(settings.model.name, settings.cache, weights, lambda _, __: None)
    engine = LocalEngine(settings, prepared)
    started = time.perf_counter()
    await engine.start()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ranks = itertools.cycle(options.ranks)
        refs = [adapter(folder, prepared, number, next(ranks)) for number in range(1, 33)]
        health = await engine.health()
        report("start", seconds=round(time.perf_counter() - started, 2), weights=weights, base_bytes=health.base_bytes)
        measures = {
            "first token": first_token(engine, refs, options.rounds),
            "decode": adapters_beside_the_base(engine, refs, options.rounds, options.tokens),
            "flip": flip(engine, refs, options.rounds),
            "training alone": training_alone(engine, folder),
            "state": keeping_the_state(engine, prepared, folder),
            "scoring": scoring(engine, refs),
            "flood": beside_a_flood(engine),
            "kept": training_kept(engine, folder, options.rounds),
            "memory": memory(engine, folder),
            "gaps": training_beside_serving(engine, folder, options.rounds),
        }
        for name, measure in measures.items():
            if options.only in name:
                await measure
            else:
                measure.close()
        await engine.stop()
        if options.only in "cold":
            more = [adapter(folder, prepared, number, next(ranks)) for number in range(101, 221)]
            await cold_adapters(settings, prepared, more)
        if options.only in "loads":
            more = [adapter(folder, prepared, number) for number in range(301, 421)]
            await while_adapters_load(settings, prepared, more)


def _ranks(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    asyncio.run(main())
