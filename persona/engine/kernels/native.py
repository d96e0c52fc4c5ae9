"""A step compiled for this CPU (step.c, draw.c): built once with the machine's C compiler, kept in the cache folder.

Nothing here is needed: without a compiler, on another system or for a network that step.c does not know, steps run in
plain torch. OpenMP is that of torch, so both share one set of threads. What a step reads stands in memory that is used
again: while the same sequences say one token after another, only their tokens and positions are written anew.
"""

import ctypes
import hashlib
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog
import torch

from persona.engine import device
from persona.engine.attention import KvCache
from persona.engine.decoder import Decoder
from persona.engine.lora import Resident
from persona.engine.shape import TARGETS
from persona.engine.weights import Int4, Projection, block
from persona.engine.words import Words

SOURCES = [Path(__file__).with_name(name) for name in ("step.c", "draw.c")]
HEADER = Path(__file__).with_name("vectors.h")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
SECONDS = 120  # for the compiler

log = structlog.get_logger()

_Pointer, _Int = ctypes.c_void_p, ctypes.c_int64


class _Matrix(ctypes.Structure):
    _fields_ = [(name, _Pointer) for name in ("codes", "scales", "bias")] + [
        (name, _Int) for name in ("out", "inputs", "padded")
    ]


class _Words(ctypes.Structure):
    _fields_ = [(name, _Pointer) for name in ("numbers", "codes", "scales")]


class _Layer(ctypes.Structure):
    _fields_ = [(name, _Pointer) for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm")] + [
        (target, _Matrix) for target in TARGETS
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("layers", "hidden", "heads", "kv_heads", "dim", "intermediate", "vocab")),
        ("layer", _Pointer),
        *((name, _Words) for name in ("embed", "head")),
        *((name, _Pointer) for name in ("norm", "cos", "sin", "cache")),
        ("size", _Int),
        ("eps", ctypes.c_double),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _Int) for name in ("rows", "sequences", "width", "room", "spoken")),
        *((name, _Pointer) for name in ("tokens", "positions", "sequence", "pages", "tables")),
        *((name, _Pointer) for name in ("speakers", "logits", "scratch")),
        ("threads", _Int),
    ]


class Part(NamedTuple):
    """Neighbouring tokens of one sequence: all before the first are in the cache.

    pages: of the sequence, from its beginning · speaks: whether the logits behind the last token are wanted.
    """

    tokens: Sequence[int]
    start: int
    pages: tuple[int, ...]
    adapter: Resident | None
    speaks: bool


def library(folder: Path, cell: torch.dtype, *flags: str) -> Path | None:
    """SOURCES compiled for this machine, in `folder`; None where that cannot be done.

    cell: type of a value in the cache and in adapters, fp32 or bf16 · flags: more of the compiler's.
    """
    command = device.c_compiler()
    if command is None or platform.system() != "Linux":
        return None
    options = [*FLAGS, *flags, f"-DBLOCK={block()}", f"-DCELL_BYTES={cell.itemsize}"]
    try:
        made = folder / f"step-{_fingerprint(command, options)}.so"
        if made.exists():
            return made
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as apart:
            out = Path(apart) / made.name
            asked = [*command, *options, *map(str, SOURCES), "-o", str(out), "-lm"]
            subprocess.run(asked, check=True, capture_output=True, text=True, timeout=SECONDS)
            out.replace(made)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("replies are slower: step.c was not compiled", reason=_reason(error))
        return None
    return made


def _fingerprint(command: list[str], options: list[str]) -> str:
    """Of all that the result depends on: source, options, compiler, CPU."""
    told = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    kind = [line for line in cpu if line.startswith(("model name", "flags", "Features", "CPU part"))]
    written = [path.read_text(encoding="utf-8") for path in (*SOURCES, HEADER)]
    parts = (*written, *options, *command, told, *kind)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _reason(error: Exception) -> str:
    told = getattr(error, "stderr", None) or str(error)
    return str(told).strip().splitlines()[-1] if told else type(error).__name__


class NativeSteps:
    """Steps of one decoder and one cache."""

    def __init__(self, path: Path, decoder: Decoder, cache: KvCache, context: int) -> None:
        """context: tokens of a sequence at most."""
        assert fits(decoder, cache)
        self._code = ctypes.CDLL(str(path))
        self._code.scratch_bytes.restype = _Int
        self.draw = Draw(self._code)
        self._decoder, self._cache, shape, self._dtype = decoder, cache, decoder.shape, decoder.dtype
        cos, sin = decoder.turns(torch.arange(context))
        self._kept: list[object] = [cos, sin, decoder.embed, decoder.head]  # what the model points to
        self._layers = (_Layer * shape.layers)(*(self._layer(decoder, index) for index in range(shape.layers)))
        self._model = _Model(
            shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate, shape.vocab,
            ctypes.addressof(self._layers), _words(decoder.embed), _words(decoder.head), decoder.norm.data_ptr(),
            cos.data_ptr(), sin.data_ptr(), cache.memory.bytes.data_ptr(), cache.size, shape.eps,
        )  # fmt: skip
        for layer, known in zip(decoder.layers, self._layers, strict=True):
            for target, projection in layer.projections.items():
                assert isinstance(projection, Int4)
                projection.writer = partial(self._written_out, getattr(known, target))
        decoder.head.writer = partial(self._written_words, self._model.head)
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0, shape.vocab)
        self._room = torch.empty(0, shape.hidden)
        self._tables = _Tables()

    def logits(self, parts: Sequence[Part]) -> torch.Tensor | None:
        """Those of the parts that speak: [parts, vocab] fp32, which the next step overwrites. None: an adapter is too
        wide, and nothing was done."""
        step = self._tables.filled(parts)
        step.width = max(-(-(part.start + len(part.tokens)) // self._cache.size) for part in parts)
        step.threads = torch.get_num_threads()
        if step.spoken > len(self._logits):
            self._logits = torch.empty(step.spoken, self._decoder.shape.vocab)
        needed = self._code.scratch_bytes(ctypes.byref(self._model), ctypes.byref(step))
        if needed > len(self._scratch):
            self._scratch = torch.empty(needed, dtype=torch.uint8)
        step.logits, step.scratch = self._logits.data_ptr(), self._scratch.data_ptr()
        failed = self._code.run(ctypes.byref(self._model), ctypes.byref(step))
        return None if failed else self._logits[: step.spoken]

    def forget(self) -> None:
        """Let go of the last step's adapters."""
        self._tables.forget()

    def _written_out(self, matrix: _Matrix, dtype: torch.dtype) -> torch.Tensor | None:
        """What `Int4.dense` gives; None in another dtype than the decoder's."""
        if dtype is not self._dtype:
            return None
        made = torch.empty(matrix.inputs, matrix.out, dtype=dtype)
        self._code.write_out(ctypes.byref(matrix), _Pointer(made.data_ptr()), _Int(torch.get_num_threads()))
        return made

    def _written_words(self, words: _Words, which: slice) -> torch.Tensor:
        """What `Words.floats` gives: in memory that is used again and again, as new pages cost more than the work."""
        if which.stop - which.start > len(self._room):
            self._room = torch.empty(which.stop - which.start, self._decoder.shape.hidden)
        made = self._room[: which.stop - which.start]
        numbers = (_Int(made.shape[1]), _Int(which.start), _Int(len(made)))
        threads = _Int(torch.get_num_threads())
        self._code.write_words(ctypes.byref(words), *numbers, _Pointer(made.data_ptr()), threads)
        return made

    def _layer(self, decoder: Decoder, index: int) -> _Layer:
        layer = decoder.layers[index]
        norms = (layer.attn_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)
        return _Layer(*map(self._address, norms), *(self._matrix(layer.projections[target]) for target in TARGETS))

    def _matrix(self, projection: Projection) -> _Matrix:
        assert isinstance(projection, Int4)
        packed, scales = projection.parts
        sizes = projection.rows, projection.columns, scales.shape[1]
        return _Matrix(packed.data_ptr(), scales.data_ptr(), self._address(projection.bias), *sizes)

    def _address(self, vector: torch.Tensor | None) -> int | None:
        """Of its values in fp32."""
        if vector is None:
            return None
        values = vector.float().contiguous()
        self._kept.append(values)
        return values.data_ptr()


class Draw:
    """draw.c: a sampler.Choose."""

    def __init__(self, code: ctypes.CDLL) -> None:
        self._code = code
        self._room = np.empty(0, np.uint64)

    def __call__(self, logits: torch.Tensor, wishes: np.ndarray) -> list[int]:
        logits, threads = logits.contiguous(), torch.get_num_threads()
        rows, vocab = logits.shape
        assert logits.dtype is torch.float32
        assert wishes.dtype == np.float64
        assert wishes.shape == (rows, 5)
        assert wishes.flags.c_contiguous
        tokens = np.empty(rows, np.int64)
        if len(self._room) < threads * vocab:
            self._room = np.empty(threads * vocab, np.uint64)
        numbers = (_Pointer(logits.data_ptr()), _Int(rows), _Int(vocab))
        memory = (_Pointer(array.ctypes.data) for array in (wishes, self._room, tokens))
        self._code.draw(*numbers, *memory, _Int(threads))
        found: list[int] = tokens.tolist()
        return found


class _Tables:
    """What a step reads of its rows. It grows to the largest step, and keeps what the next one has in common with it:
    pages and adapters are those of the same sequences, which have them from their first step to their last."""

    def __init__(self) -> None:
        self._step = _Step()
        self._rows = np.empty((3, 0), np.int64)  # tokens, positions, sequences
        self._pages = np.empty((0, 0), np.int64)
        self._adapters, self._speakers = np.empty(0, np.int64), np.empty(0, np.int64)
        self._whose = list[tuple[tuple[int, ...], Resident | None, int, bool]]()

    def forget(self) -> None:
        self._whose = []

    def filled(self, parts: Sequence[Part]) -> _Step:
        """With everything but `width`, `threads` and memory to write to."""
        step, count = self._step, [len(part.tokens) for part in parts]
        if (rows := sum(count)) > self._rows.shape[1]:
            self._rows, self._whose = np.empty((3, 2 * rows), np.int64), []
            step.tokens, step.positions, step.sequence = (column.ctypes.data for column in self._rows)
        tokens, positions, sequences = self._rows
        tokens[:rows] = list(chain.from_iterable(part.tokens for part in parts))
        places = (range(part.start, part.start + n) for part, n in zip(parts, count, strict=True))
        positions[:rows] = list(chain.from_iterable(places))
        # Pages never change, so the same tuple is the same pages, and an adapter is one object while it is here.
        whose = [(part.pages, part.adapter, n, part.speaks) for part, n in zip(parts, count, strict=True)]
        if whose != self._whose:
            self._whose = []  # should what follows fail
            sequences[:rows] = np.repeat(np.arange(len(parts)), count)
            self._fill(parts, list(accumulate(count)))
            self._whose = whose
        step.rows, step.sequences = rows, len(parts)
        return step

    def _fill(self, parts: Sequence[Part], ends: list[int]) -> None:
        step, (count, most) = self._step, self._pages.shape
        longest = max(len(part.pages) for part in parts)
        if len(parts) > count or longest > most:
            count = count if len(parts) <= count else 2 * len(parts)
            most = most if longest <= most else 2 * longest
            grown = [np.zeros(size, np.int64) for size in ((count, most), count, count)]
            self._pages, self._adapters, self._speakers = grown
        for number, part in enumerate(parts):
            self._pages[number, : len(part.pages)] = part.pages
            self._adapters[number] = 0 if part.adapter is None else _table(part.adapter)
        speakers = [end - 1 for end, part in zip(ends, parts, strict=True) if part.speaks]
        self._speakers[: len(speakers)] = speakers
        step.spoken, step.room = len(speakers), self._pages.shape[1]
        step.pages, step.tables = self._pages.ctypes.data, self._adapters.ctypes.data
        step.speakers = self._speakers.ctypes.data


def _words(words: Words) -> _Words:
    if words.scales is None:
        return _Words(words.values.data_ptr(), None, None)
    return _Words(None, words.values.data_ptr(), words.scales.data_ptr())


def _table(adapter: Resident) -> int:
    assert adapter.table is not None, "an adapter that was not promoted"
    return adapter.table.data_ptr()


def steps(folder: Path, decoder: Decoder, cache: KvCache, context: int) -> NativeSteps | None:
    """What computes rows in one piece, with code kept in `folder`; None where there is no such thing."""
    path = library(folder, decoder.dtype) if fits(decoder, cache) else None
    if path is None:
        return None
    try:
        return NativeSteps(path, decoder, cache, context)
    except OSError as error:  # damaged, or in a folder from which nothing may run: the next start compiles it again
        log.warning("replies are slower: the compiled step cannot be loaded", reason=str(error))
        path.unlink(missing_ok=True)
        return None


def fits(decoder: Decoder, cache: KvCache) -> bool:
    """Whether step.c knows such a network: int4, and sizes that fill vectors."""
    shape = decoder.shape
    sizes = (shape.hidden, shape.heads * shape.head_dim, shape.intermediate)
    return (
        decoder.device.type == "cpu"
        and all(size % 32 == 0 for size in sizes)
        and shape.head_dim % 16 == 0
        and decoder.embed.dtype == decoder.head.dtype == torch.bfloat16
        and all(isinstance(p, Int4) for layer in decoder.layers for p in layer.projections.values())
    )
