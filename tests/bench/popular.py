"""Which adapters leave when memory is full: what loading costs by size, and what each way to choose then costs.

    .venv/bin/python tests/bench/popular.py

First, per rank, the milliseconds of reading an adapter from disk (out of the page cache) with its checks, and of
expanding it from RAM, medians. Then a count with these costs: 12,000 requests of 2,000 users by S-LoRA's popularity,
ranks 2, 8 and 64 in turn, and a device and a RAM that hold so many adapters of the mean size. Per request, in
milliseconds of loading: by the engine's `Popularity`; with what is on disk only no dearer than what is in RAM; with a
use counted for less the larger the adapter is; and with no memory of use at all (the oldest leaves).
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persona.engine import adapter_file, lora, prepare, random_adapter, weights
from persona.engine.popularity import FROM_DISK, FROM_HOST, Popularity
from persona.engine.protocol import AdapterRef, Plan, replace
from persona.engine.shape import Shape
from persona.settings import Settings

RANKS, FILES, ROUNDS = (2, 8, 64), 8, 3
USERS, REQUESTS, SEED = 2000, 12_000, 42
ROOMS = ((60, 200), (200, 600))  # adapters on the device, in RAM
ALPHAS = (1.0, 0.5, 0.2)  # of power(alpha): 1 asks for everybody alike
BASE = "0" * 12

Costs = dict[int, tuple[float, float]]  # by rank: from disk to RAM, from RAM to the device
Worth = Callable[[float, int], float]  # of a use: what getting it back costs, the adapter's rank


def report(measure: str, **figures: object) -> None:
    sys.stdout.write(json.dumps({"measure": measure, **figures}) + "\n")
    sys.stdout.flush()


def costs() -> Costs:
    """Measured in one thread, as the loader works."""
    prepared = prepare.fetch(prepare.EMBEDDED, Settings().cache, "int4", lambda _, __: None)
    shape, dtype, found = Shape.read(prepared.folder), weights.compute_dtype("cpu"), Costs()
    for rank in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            files = [_file(Path(folder) / str(number), shape, rank, number) for number in range(FILES)]
            times = [_loaded(file, shape, dtype) for _ in range(ROUNDS) for file in files]
            size = files[0].stat().st_size
        read, expand = (statistics.median(side) for side in zip(*times, strict=True))
        found[rank] = read, expand
        report("loading", rank=rank, bytes=size, read_ms=round(read, 2), expand_ms=round(expand, 2))
    return found


def _file(folder: Path, shape: Shape, rank: int, seed: int) -> Path:
    folder.mkdir()
    return random_adapter.write(folder, shape, BASE, replace(Plan(passes=1), rank=rank), seed)


def _loaded(file: Path, shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    sha256 = prepare.sha256(file)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    adapter = adapter_file.read(file.parent, sha256, BASE, shape)
    read = time.perf_counter()
    memory = torch.zeros(lora.nbytes(adapter, shape, dtype), dtype=torch.uint8)
    cleared = time.perf_counter()
    lora.expand(adapter, shape, dtype, memory)
    return 1000 * (read - started), 1000 * (time.perf_counter() - cleared)


class Room:
    """A tier that holds adapters of so many ranks together."""

    def __init__(self, ranks: int, worth: Worth | None) -> None:
        self._ranks, self._worth, self._popularity = ranks, worth, Popularity()
        self._held: dict[AdapterRef, int] = {}  # ranks, the oldest first

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._held

    def use(self, ref: AdapterRef, cost: float) -> None:
        self._popularity.use(ref, self._worth(cost, self._held[ref]) if self._worth else 1.0)
        self._held[ref] = self._held.pop(ref)

    def add(self, ref: AdapterRef, rank: int, cost: float) -> None:
        self._held[ref] = rank
        self.use(ref, cost)
        while sum(self._held.values()) > self._ranks:
            others = [other for other in self._held if other != ref]
            leaving = min(others, key=self._popularity.worth) if self._worth else others[0]
            self._popularity.gave_way(leaving)
            self._popularity.forget(leaving)
            del self._held[leaving]


def counted(asked: list[int], costs: Costs, rooms: tuple[int, int], worth: Worth | None) -> float:
    """Milliseconds of loading a request, in the mean."""
    mean, spent = sum(RANKS) / len(RANKS), 0.0
    device, host = (Room(round(room * mean), worth) for room in rooms)
    for user in asked:
        ref, rank = AdapterRef(user, 1, "", ""), RANKS[user % len(RANKS)]
        if ref in device:
            device.use(ref, FROM_HOST if ref in host else FROM_DISK)
            continue
        if ref in host:
            host.use(ref, FROM_DISK)
        else:
            spent += costs[rank][0]
            host.add(ref, rank, FROM_DISK)
        spent += costs[rank][1]
        device.add(ref, rank, FROM_HOST)
    return spent / len(asked)


WAYS: dict[str, Worth | None] = {
    "as the engine": lambda cost, _: cost,
    "disk no dearer": lambda _, __: 1.0,
    "by size": lambda cost, rank: cost / rank,
    "the oldest": None,
}


def main() -> None:
    torch.set_num_threads(1)
    found = costs()
    for alpha in ALPHAS:
        asked: list[int] = (np.random.default_rng(SEED).power(alpha, REQUESTS) * USERS).astype(int).tolist()
        for rooms in ROOMS:
            told: dict[str, Any] = {way: round(counted(asked, found, rooms, worth), 2) for way, worth in WAYS.items()}
            report("loading a request, ms", alpha=alpha, device=rooms[0], host=rooms[1], **told)


if __name__ == "__main__":
    main()
