"""Decode steps recorded once and replayed: a step is hundreds of launches, which cost more than few rows compute.

There is one recording for each size of persona/engine/buckets.py that steps may have, with and without adapters, made
before anybody is served: that compiles the kernels, which no step shall wait for. A size that cannot be recorded is
launched. A recording reads one static table of integers and one of adapters' addresses, which are filled before each
replay, and leaves its logits in one static tensor. It needs kernels that take everything from memory: without them
there are no recordings. Steps with prompts are never replayed.

Not run on CUDA yet: the tests replay by computing again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
import torch

from persona.engine import attention, buckets, lora
from persona.engine.attention import KvCache
from persona.engine.buckets import HEAD, Layout, Row, Table
from persona.engine.decoder import Decoder
from persona.engine.kernels.choice import Kernels
from persona.engine.kernels.reference import FEW, DecodeRows
from persona.engine.lora import Gathered, Resident
from persona.engine.refusals import fatal, starved
from persona.engine.weights import Projection

log = structlog.get_logger("engine")
Work = Callable[[], torch.Tensor]
Record = Callable[[Work], tuple[Callable[[], None], torch.Tensor]]  # what to call for a replay, and where its result is


class Recorder:
    """Makes CUDA graphs that are replayed one at a time: all share one pool of memory and one stream's workspaces.

    What a replay computes on its way may stand where another's did; results have places of their own.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> tuple[Callable[[], None], torch.Tensor]:
        """A CUDA graph of `work`. Other threads (the loader's) may go on using the device meanwhile."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()  # compiles kernels and fills their tables, which cannot be recorded
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The outer one: a recording that fails may leave its own stream behind.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            result = work()
        return graph.replay, result


class DecodeGraphs:
    """The recordings of one decoder and one cache, whose last page is the scratch page."""

    def __init__(
        self, decoder: Decoder, cache: KvCache, layout: Layout, kernels: Kernels, record: Record | None = None
    ) -> None:
        """record: CUDA graphs, if nothing else is given."""
        self._decoder, self._cache, self._layout, self._kernels = decoder, cache, layout, kernels
        self._record = record or Recorder()
        cache.clear([layout.scratch])  # rows that are none read it, too
        self._made: dict[tuple[int, bool], _Recording | None] = {}  # None: it cannot be recorded
        self._last: _Recording | None = None
        self._broken = False  # a recording came to nothing: torch may be left in the middle of it

    @property
    def made(self) -> dict[tuple[int, bool], bool]:
        """By rows, and whether with adapters: whether such a step is replayed."""
        return {key: recording is not None for key, recording in self._made.items()}

    def prepare(self, rows: int) -> None:
        """Record every size for steps of up to so many rows, the largest first. What prompts need is compiled, too."""
        decoder = self._decoder
        lora.compile_ahead(self._kernels, decoder.shape, decoder.dtype, decoder.device)
        attention.compile_ahead(self._cache, self._kernels, decoder.shape, decoder.dtype)
        for target, projection in decoder.layers[0].projections.items():
            inputs = decoder.shape.projection(target)[1]
            projection(torch.zeros(FEW, inputs, dtype=decoder.dtype, device=decoder.device))
        for size in reversed(buckets.up_to(rows)):
            for adapted in (True, False):
                self._recording(size, adapted)

    def logits(self, rows: Sequence[Row], adapters: Sequence[Resident | None]) -> torch.Tensor | None:
        """The step of these rows: [rows, vocab] fp32, or None if there is no recording for so many or so long ones."""
        size = buckets.bucket(len(rows))
        if size is None or not self._layout.fits(rows):
            return None
        recording = self._recording(size, any(adapter is not None for adapter in adapters))
        if self._last is not recording:
            self.forget()
            self._last = recording
        if recording is None:
            return None
        return recording.run(rows, adapters)[: len(rows)].clone()

    def forget(self) -> None:
        """Let go of the last step's adapters."""
        if self._last is not None:
            self._last.adapters = ()

    def _recording(self, size: int, adapted: bool) -> "_Recording | None":
        if (key := (size, adapted)) not in self._made:
            self._made[key] = None
            if self._broken:
                return None
            try:
                self._made[key] = self._new(size, adapted)
            except RuntimeError as error:  # memory, mostly
                if fatal(error):
                    raise
                self._broken = not starved(error)
                told = {"kind": type(error).__name__, "reason": str(error).partition("\n")[0]}
                log.warning("steps are slower: one size is not recorded", rows=size, **told)
        return self._made[key]

    def _new(self, size: int, adapted: bool) -> "_Recording":
        decoder, layout = self._decoder, self._layout
        table = Table(layout, size)
        inputs = torch.tensor(table.lines, device=decoder.device)
        gathered = Gathered(self._kernels, decoder.shape.layers, size, decoder.device) if adapted else None

        def step() -> torch.Tensor:
            tokens, positions, slots, lengths = inputs[:, :HEAD].unbind(1)
            rows = DecodeRows.of(inputs[:, HEAD:], lengths, layout.size)
            run = _Step(decoder.rotary(positions), slots, rows, self._cache, gathered)
            h = decoder.embedded(tokens)
            for layer in range(decoder.shape.layers):
                h = decoder.layer(layer, h, run)
            return decoder.logits(h)

        replay, result = self._record(step)
        return _Recording(table, inputs, gathered, replay, result)


@dataclass(slots=True)
class _Recording:
    """One step of one size. `adapters`: whose addresses stand in its table, kept alive as long as they do."""

    table: Table
    inputs: torch.Tensor
    gathered: Gathered | None
    replay: Callable[[], None]
    result: torch.Tensor
    adapters: tuple[Resident | None, ...] = ()

    def run(self, rows: Sequence[Row], adapters: Sequence[Resident | None]) -> torch.Tensor:
        self.inputs.copy_(torch.from_numpy(self.table.filled(rows)))
        mine = tuple(adapters)
        if self.gathered is not None and not _same(mine, self.adapters):
            self.gathered.put(mine)
            self.adapters = mine
        self.replay()
        return self.result


def _same(rows: Sequence[Resident | None], others: Sequence[Resident | None]) -> bool:
    return len(rows) == len(others) and all(a is b for a, b in zip(rows, others, strict=True))


@dataclass(frozen=True, slots=True)
class _Step:
    """The state of a recorded forward: implements decoder.Pass."""

    rotary: tuple[torch.Tensor, torch.Tensor]
    slots: torch.Tensor
    rows: DecodeRows
    cache: KvCache
    gathered: Gathered | None

    def project(self, layer: int, target: str, base: Projection, x: torch.Tensor) -> torch.Tensor:
        y = base(x)
        if self.gathered is not None:
            self.gathered.add(layer, target, x, y)
        return y

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.write(layer, self.slots, k, v)
        return attention.decode(q, self.cache, layer, self.rows)
