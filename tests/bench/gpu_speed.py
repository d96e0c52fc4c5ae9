"""How quick the GPU path is: kernels beside the device's bandwidth, whole decode steps, and what others make of it."""

import time
from collections.abc import Callable

import torch
from gpu_bench import Bench, Figures
from gpu_model import PAGE, adapters, cache, cache_bytes, decoder, pages, projection, sequences

from persona.engine.attention import KvCache
from persona.engine.buckets import Layout
from persona.engine.decoder import Decoder
from persona.engine.graphs import DecodeGraphs
from persona.engine.kernels import reference
from persona.engine.kernels.reference import DecodeRows, Piece, PromptGroups, PromptRows
from persona.engine.lora import Blocks, Gathered, Resident, StepAdapters
from persona.engine.runner import Runner
from persona.engine.sequence import Plan
from persona.engine.shape import TARGETS
from persona.engine.weights import Nf4, Projection


def measures(bench: Bench) -> dict[str, Callable[[], None]]:
    def made(form: str) -> Decoder:
        return decoder(bench.size, form, bench.device)

    return {
        "products": lambda: products(bench),
        "attention": lambda: attention_speed(bench, made("nf4")),
        "attention of prompts": lambda: prompt_attention_speed(bench, made("nf4")),
        "adapters": lambda: adapter_speed(bench, made("nf4")),
        "adapters of prompts": lambda: prompt_adapter_speed(bench, made("nf4")),
        "decode nf4": lambda: decode(bench, made("nf4"), "nf4"),
        "decode int4": lambda: decode(bench, made("int4"), "int4"),
        "peft": lambda: peft(bench),
    }


def copy_bandwidth(bench: Bench) -> float:
    """Bytes per second that are read and written."""
    block = torch.empty((1 << 30) if bench.cuda else (1 << 20), dtype=torch.uint8, device=bench.device)
    other = torch.empty_like(block)
    return 2 * block.nbytes / bench.seconds(lambda: other.copy_(block))


def products(bench: Bench) -> None:
    """4-bit products over all layers beside the device's copy, and beside bitsandbytes on the same NF4 bytes."""
    copy, shape = copy_bandwidth(bench), bench.size.shape
    bench.report("device", copy_gb_per_s=round(copy / 1e9, 1))
    for form in ("nf4", "int4"):
        for target in TARGETS:
            matrices = [projection(form, *shape.projection(target), bench.device) for _ in range(shape.layers)]
            size = sum(matrix.nbytes() for matrix in matrices)
            for rows in bench.size.rows:
                x = bench.random(rows, shape.projection(target)[1])
                figures: Figures = {"form": form, "target": target, "rows": rows}
                ours = size / bench.seconds(lambda m=matrices, x=x: [one(x) for one in m][-1])  # type: ignore[misc]
                figures |= {"gb_per_s": round(ours / 1e9, 1), "of_copy": round(ours / copy, 3)}
                if form == "nf4":
                    figures["bitsandbytes_gb_per_s"] = round(size / bitsandbytes_seconds(bench, matrices, x) / 1e9, 1)
                bench.report("4-bit product", **figures)
            del matrices


def bitsandbytes_seconds(bench: Bench, matrices: list[Projection], x: torch.Tensor) -> float:
    import bitsandbytes

    def theirs() -> torch.Tensor:
        found = x
        for one in matrices:
            assert isinstance(one, Nf4)
            found = bitsandbytes.matmul_4bit(x, one._data.t(), quant_state=one._state(x.dtype))
        return found

    return bench.seconds(theirs)


def attention_speed(bench: Bench, base: Decoder) -> None:
    """All layers' attention for rows of one length: keys and values read per second, and torch's way beside it."""
    shape = bench.size.shape
    for length in bench.size.lengths:
        for rows in bench.size.rows:
            if not bench.fits(cache_bytes(bench.size, base, rows, length)):
                bench.report("attention", length=length, rows=rows, left_out="not enough memory")
                continue
            store = cache(bench.size, base, rows, length)
            table = torch.arange(rows * pages(length), device=bench.device).view(rows, -1)
            seen = DecodeRows.of(table, torch.full((rows,), length, device=bench.device), PAGE)
            q = torch.randn(rows, shape.heads, shape.head_dim, dtype=base.dtype, device=bench.device)

            def over(
                attend: Callable[..., torch.Tensor], q: torch.Tensor = q, store: KvCache = store,
                seen: DecodeRows = seen,
            ) -> torch.Tensor:  # fmt: skip
                return [attend(q, *store.layer(layer), seen) for layer in range(shape.layers)][-1]

            size = 2 * shape.layers * rows * length * shape.kv_heads * shape.head_dim * base.dtype.itemsize
            ours = bench.seconds(lambda over=over: over(bench.kernels.attend))  # type: ignore[misc]
            figures: Figures = {"ms": round(1000 * ours, 3), "gb_per_s": round(size / ours / 1e9, 1)}
            if bench.fits(size // shape.layers * 4):
                torchs = bench.seconds(lambda over=over: over(reference.attend))  # type: ignore[misc]
                figures["torch_ms"] = round(1000 * torchs, 3)
            bench.report("attention", length=length, rows=rows, **figures)
            del store


def prompt_attention_speed(bench: Bench, base: Decoder, tokens: int = 256) -> None:
    """All layers' attention of a step's prompts, behind so many tokens each: of one prompt, and of eight."""
    shape = bench.size.shape
    for length in bench.size.lengths:
        for count in (1, 8):
            rows, needed = tokens // count, pages(length + tokens // count)
            if not bench.fits(cache_bytes(bench.size, base, count, length + rows)):
                bench.report("attention of prompts", length=length, prompts=count, left_out="not enough memory")
                continue
            store = cache(bench.size, base, count, length + rows)
            pieces = [
                Piece(at * rows, at * rows + rows, length, list(range(at * needed, at * needed + needed)))
                for at in range(count)
            ]
            seen, plain = PromptRows.of(pieces, bench.device), PromptGroups.of(pieces, PAGE, bench.device)
            q = torch.randn(tokens, shape.heads, shape.head_dim, dtype=base.dtype, device=bench.device)

            def over(
                attend: Callable[..., torch.Tensor],
                rows: PromptRows | PromptGroups,
                q: torch.Tensor = q,
                store: KvCache = store,
            ) -> torch.Tensor:
                return [attend(q, *store.layer(layer), rows) for layer in range(shape.layers)][-1]

            ours = bench.seconds(lambda o=over, s=seen: o(bench.kernels.attend_prompts, s))  # type: ignore[misc]
            torchs = bench.seconds(lambda o=over, s=plain: o(reference.attend_prompts, s))  # type: ignore[misc]
            figures = {"ms": round(1000 * ours, 3), "torch_ms": round(1000 * torchs, 3)}
            bench.report("attention of prompts", length=length, prompts=count, tokens=tokens, **figures)
            del store


def adapter_speed(bench: Bench, base: Decoder) -> None:
    """What adapters of mixed ranks add to all projections of all layers."""
    shape, everyone = bench.size.shape, adapters(bench.size, base, max(bench.size.rows))
    for rows in bench.size.rows:
        gathered = Gathered(bench.kernels, shape.layers, rows, bench.device)
        gathered.put(everyone[:rows])
        places = {target: shape.projection(target) for target in TARGETS}
        x = {t: torch.randn(rows, inputs, dtype=base.dtype, device=bench.device) for t, (_, inputs) in places.items()}
        y = {t: torch.zeros(rows, out, dtype=base.dtype, device=bench.device) for t, (out, _) in places.items()}

        def work(
            gathered: Gathered = gathered, x: dict[str, torch.Tensor] = x, y: dict[str, torch.Tensor] = y
        ) -> torch.Tensor:
            for layer in range(shape.layers):
                for target in TARGETS:
                    gathered.add(layer, target, x[target], y[target])
            return y["o"]

        size = sum(one.nbytes() for one in everyone[:rows])
        spent = bench.seconds(work)
        figures = {} if bench.cached(size) else {"gb_per_s": round(size / spent / 1e9, 1)}
        bench.report("adapters", rows=rows, ms=round(1000 * spent, 3), **figures)


def prompt_adapter_speed(bench: Bench, base: Decoder, tokens: int = 256) -> None:
    """What adapters add to all projections of all layers: to a prompt of each rank alone, to eight of mixed ones."""
    shape, inputs = bench.size.shape, {target: bench.size.shape.projection(target)[1] for target in TARGETS}
    x = {target: bench.random(tokens, size) for target, size in inputs.items()}
    y = {target: bench.random(tokens, shape.projection(target)[0]) for target in TARGETS}
    each = adapters(bench.size, base, 8)
    alone = [(str(rank), [one]) for rank, one in zip(bench.size.ranks, each, strict=False)]
    for ranks, some in (*alone, ("mixed", each)):
        rows = tokens // len(some)
        parts = [(at * rows, (at + 1) * rows, one) for at, one in enumerate(some)]
        blocks = Blocks(bench.kernels, parts, bench.device)

        def kernels(blocks: Blocks = blocks) -> torch.Tensor:
            for layer in range(shape.layers):
                for target in TARGETS:
                    blocks.add(layer, target, x[target], y[target])
            return y["o"]

        stacked = StepAdapters()
        stacked.arrange([], parts)

        def plain(stacked: StepAdapters = stacked) -> torch.Tensor:
            for layer in range(shape.layers):
                for target in TARGETS:
                    stacked.add(layer, target, x[target], y[target])
            return y["o"]

        times = {"ms": bench.seconds(kernels), "plain_ms": bench.seconds(plain)}
        figures = {name: round(1000 * seconds, 3) for name, seconds in times.items()}
        bench.report("adapters of prompts", prompts=len(some), ranks=ranks, tokens=tokens, **figures)


def decode(bench: Bench, base: Decoder, form: str) -> None:
    """Whole steps, computed and replayed, bare and with everybody's own adapter."""
    size = bench.size
    room, most = size.length + size.steps + 2, max(size.rows)
    store, everyone = cache(size, base, most, room), adapters(size, base, most)
    layout = Layout(PAGE, store.stride, pages(room), scratch=most * pages(room))
    recordings = DecodeGraphs(base, store, layout, bench.kernels, bench.recorder())
    for rows in size.rows:
        figures: Figures = {}
        for way, made in (("launched", None), ("replayed", recordings)):
            for who, adapted in (("bare", False), ("adapters", True)):
                run = Runner(base, store, made)
                found = tokens_per_second(bench, run, rows, room, everyone if adapted else [None] * rows)
                figures[f"{way}_{who}"] = round(found, 1)
            figures[f"{way}_ratio"] = round(float(figures[f"{way}_adapters"]) / float(figures[f"{way}_bare"]), 3)  # type: ignore[arg-type]
        bench.report("decode, tokens/s", form=form, rows=rows, **figures)
    if not all(recordings.made.values()):
        raise RuntimeError("a step was not recorded, and what is called replayed was launched: the log says why")


def tokens_per_second(bench: Bench, run: Runner, rows: int, room: int, who: list[Resident | None]) -> float:
    some = sequences(rows, bench.size.length, room)
    adapted = {sequence.id: who[sequence.id] for sequence in some}
    for step in range(bench.size.steps + 1):
        if step == 1:  # the first compiles and records
            bench.synchronize()
            started = time.perf_counter()
        result = run.run(Plan(some, []), adapted)
        for sequence, token in zip(result.next, result.logits.argmax(-1).tolist(), strict=True):
            sequence.tokens.append(token)
    bench.synchronize()
    return rows * bench.size.steps / (time.perf_counter() - started)


def peft(bench: Bench) -> None:
    """Ours is `decode` with the form nf4."""
    import gpu_peers

    peer = gpu_peers.PeftBatch(bench.size, bench.dtype, bench.device)
    for rows in bench.size.rows:
        found = {who: peer.tokens_per_second(rows, who == "adapters") for who in ("bare", "adapters")}
        bench.report(
            "PEFT on Linear4bit, tokens/s", rows=rows, **{who: round(value, 1) for who, value in found.items()}
        )
