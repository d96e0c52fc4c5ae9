"""A model of random numbers in the shape of a real one: it can be timed, and says nothing."""

from dataclasses import dataclass

import torch

from persona.engine import lora, quantize
from persona.engine.attention import KvCache
from persona.engine.decoder import Decoder, Layer
from persona.engine.lora import Resident
from persona.engine.memory import Memory
from persona.engine.sequence import Sequence
from persona.engine.shape import TARGETS, Shape
from persona.engine.weights import Nf4, Projection, StoredInt4, compute_dtype
from persona.engine.words import Words

PAGE = 32


@dataclass(frozen=True)
class Service:
    """users: that are registered, and how many of them where ranks are mixed · requests: of a run · repeats: runs a
    side · seconds: of an open loop · flips: of versions · parts: of engine.py · memory_mb: for context and adapters."""

    users: int
    mixed: int
    requests: int
    repeats: int
    seconds: float
    flips: int
    parts: tuple[str, ...]
    memory_mb: int


@dataclass(frozen=True)
class Size:
    """What is measured. ranks: of the rows' adapters, in turn · length: tokens of the sequences that decode.

    service: what is measured of the whole service.
    """

    name: str
    shape: Shape
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    lengths: tuple[int, ...]
    length: int
    steps: int
    rounds: int
    service: Service


def _shape(layers: int, hidden: int, heads: int, kv_heads: int, dim: int, intermediate: int, vocab: int) -> Shape:
    inv_freq = tuple(500_000.0 ** (-2 * i / dim) for i in range(dim // 2))
    return Shape(
        layers, hidden, heads, kv_heads, dim, intermediate, vocab, 1e-5, False, inv_freq, 1.0, 8192, eos=(vocab - 1,)
    )


EIGHT_B = Size(
    "8B",
    _shape(32, 4096, 32, 8, 128, 14_336, 128_256),
    rows=(1, 8, 32),
    ranks=(2, 8, 16, 64),
    lengths=(512, 2048, 8192),
    length=512,
    steps=48,
    rounds=5,
    service=Service(
        users=2000,
        mixed=500,
        requests=320,
        repeats=3,
        seconds=60.0,
        flips=10_000,
        parts=("first token", "flip", "training alone", "gaps", "kept", "cold"),
        memory_mb=8192,
    ),
)
TINY = Size(
    "tiny",
    _shape(1, 64, 4, 2, 16, 128, 41_000),
    rows=(2,),
    ranks=(2, 17),
    lengths=(40,),
    length=33,
    steps=1,
    rounds=0,
    service=Service(users=4, mixed=4, requests=8, repeats=1, seconds=1.0, flips=32, parts=("flip",), memory_mb=64),
)


def projection(form: str, outputs: int, inputs: int, device: torch.device) -> Projection:
    """Weights of about the size of in^-½."""
    if form == "nf4":
        data = torch.randint(0, 256, (outputs * inputs // 2, 1), dtype=torch.uint8, device=device)
        absmax = torch.full((outputs * inputs // quantize.NF4_BLOCK,), 2 * inputs**-0.5, device=device)
        return Nf4(data, absmax, (outputs, inputs), None)
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scales = torch.zeros(inputs // quantize.GROUP, outputs, 2, dtype=torch.bfloat16, device=device)
    scales[..., 0] = inputs**-0.5 / 5
    return StoredInt4(codes, scales, None)


def decoder(size: Size, form: str, device: torch.device) -> Decoder:
    shape, dtype = size.shape, torch.float32 if device.type == "cpu" else compute_dtype(device.type)
    norm = torch.ones(shape.hidden, device=device)

    def layer() -> Layer:
        made = {target: projection(form, *shape.projection(target), device) for target in TARGETS}
        return Layer(norm, norm, made, None, None)

    numbers = (torch.randn(shape.vocab, shape.hidden, device=device, dtype=dtype) / 50 for _ in range(2))
    embed, head = map(Words, numbers)
    made = Decoder(shape, [layer() for _ in range(shape.layers)], embed, norm, head)
    made.dtype = dtype
    return made


def adapters(size: Size, base: Decoder, count: int) -> list[Resident]:
    """One for each row, on every projection."""
    return [_adapter(size.shape, size.ranks[number % len(size.ranks)], base) for number in range(count)]


def _adapter(shape: Shape, rank: int, base: Decoder) -> Resident:
    factors: lora.Factors = {}
    for layer in range(shape.layers):
        for target in TARGETS:
            outputs, inputs = shape.projection(target)
            a = torch.randn(inputs, rank, dtype=base.dtype, device=base.device) * inputs**-0.5
            factors[layer, target] = a, torch.randn(rank, outputs, dtype=base.dtype, device=base.device) / 50
    return lora.resident(factors, shape.layers)


def cache(size: Size, base: Decoder, rows: int, length: int) -> KvCache:
    """Filled with random keys and values; the last page is for scratch."""
    page_bytes = KvCache.page_bytes(size.shape, PAGE, base.dtype)
    made = KvCache(Memory(rows * pages(length) + 1, page_bytes, base.device), size.shape, PAGE, base.dtype)
    for layer in range(size.shape.layers):
        for part in made.layer(layer):
            part.normal_()
    return made


def cache_bytes(size: Size, base: Decoder, rows: int, length: int) -> int:
    return (rows * pages(length) + 1) * KvCache.page_bytes(size.shape, PAGE, base.dtype)


def pages(length: int) -> int:
    """That hold so many tokens."""
    return -(-length // PAGE)


def sequences(rows: int, length: int, room: int) -> list[Sequence]:
    """Each with `length` tokens in the cache, one that is not, and pages for `room` tokens."""
    each = pages(room)
    return [
        Sequence(
            row, [1] * (length + 1), length, room, computed=length, pages=tuple(range(row * each, (row + 1) * each))
        )
        for row in range(rows)
    ]
