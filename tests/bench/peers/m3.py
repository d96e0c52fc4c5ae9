"""M3: many users, each with an adapter of their own, answered by persona and by its peers on this machine.

    .venv/bin/python tests/bench/peers/m3.py [--users 32] [--prompt 128] [--reply 64] [--rounds 3]
                                             [--peers persona,peft-batch,peft-swap]

All are loaded at once and measured in turn, end to end: from the first request until everybody has the whole reply. One
JSON line a round and peer, then the medians and by how much persona is ahead. Nothing else should use the machine
meanwhile. `llama.cpp` and `vllm` are peers too where they are installed: name their programs.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

import msgspec
import torch
import transformers
from peer import Peer, Setup, adapters, wording
from peer_peft import PeftBatch, PeftSwap
from peer_persona import Persona
from peer_servers import LlamaCpp, Vllm

from jobs import plans
from persona.engine import device, prepare
from persona.engine.text import Text
from persona.settings import load
from persona.workload import Range, Workload, requests


def report(**figures: object) -> None:
    sys.stdout.write(json.dumps({"measure": "M3", **figures}) + "\n")
    sys.stdout.flush()


def checkpoint(cache: Path, folder: Path) -> tuple[Path, Path]:
    """The embedded model's GGUF file, and the same dequantized in a folder that transformers and vLLM read."""
    (gguf,) = (cache / "downloads").glob("*.gguf")
    out = folder / "checkpoint"
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del model.config.quantization_config, model.hf_quantizer  # the weights are dequantized
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    return gguf, out


async def timed(peer: Peer, workload: Workload) -> tuple[float, int]:
    """Seconds and tokens of one round, in which every user asks once."""
    some = list(islice(requests(workload), workload.users))
    started = time.perf_counter()
    made = await peer.run(some, workload)
    seconds = time.perf_counter() - started
    assert sorted(made) == sorted(request.reply for request in some), "a reply has another length than was asked for"
    return seconds, sum(made)


async def measure(peers: list[Peer], setup: Setup, rounds: int) -> dict[str, float]:
    """Median seconds a peer, all of them in turn. A round before them warms, and each asks something else: no cache
    has seen it."""
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    async with AsyncExitStack() as stack:
        for peer in peers:
            await peer.start(setup)
            stack.push_async_callback(peer.stop)
            await timed(peer, setup.workload)
        for number in range(1, rounds + 1):
            for peer in peers:
                seconds, tokens = await timed(peer, replace(setup.workload, seed=setup.workload.seed + number))
                times[peer.name].append(seconds)
                rate = round(tokens / seconds, 2)
                report(peer=peer.name, round=number, seconds=round(seconds, 2), tokens=tokens, tokens_per_s=rate)
    return {name: statistics.median(found) for name, found in times.items()}


def conclude(medians: dict[str, float]) -> None:
    """By how much persona is ahead of each, and of the best of them."""
    for name, seconds in medians.items():
        report(peer=name, median_seconds=round(seconds, 2))
    if "persona" in medians and len(medians) > 1:
        ahead = {name: round(seconds / medians["persona"], 2) for name, seconds in medians.items() if name != "persona"}
        report(persona_over=ahead, over_the_best=min(ahead.values()))


def chosen(options: argparse.Namespace) -> list[Peer]:
    known = {
        "persona": Persona,
        "peft-batch": lambda: PeftBatch(getattr(torch, options.peft_dtype)),
        "peft-swap": lambda: PeftSwap(getattr(torch, options.peft_dtype)),
        "llama.cpp": lambda: LlamaCpp(options.llama_server, options.llama_convert, sys.executable),
        "vllm": lambda: Vllm(options.vllm, options.vllm_dtype),
    }
    names = options.peers.split(",")
    if unknown := set(names) - set(known):
        raise SystemExit(f"There is no peer {unknown.pop()}: name some of {', '.join(known)}.")
    return [known[name]() for name in names]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--reply", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=0, help="of the adapters; as configured without")
    parser.add_argument("--peers", default="persona,peft-batch,peft-swap")
    parser.add_argument("--peft-dtype", choices=("float32", "bfloat16"), default="float32", help="the quicker one")
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--llama-convert", default="convert_lora_to_gguf.py")
    parser.add_argument("--vllm", default="vllm")
    parser.add_argument("--vllm-dtype", choices=("float32", "bfloat16"), default="bfloat16", help="the quicker one")
    options = parser.parse_args()
    peers, settings = chosen(options), load()
    form = device.choose(settings.model).weights
    prepared = await asyncio.to_thread(prepare.fetch, prepare.EMBEDDED, settings.cache, form, lambda _, __: None)
    plan = plans.plan(settings.learning, 1)
    plan = msgspec.structs.replace(plan, rank=options.rank or plan.rank)
    text = Text.load(prepared.folder)
    lengths = Range(options.prompt, options.prompt), Range(options.reply, options.reply)
    with tempfile.TemporaryDirectory(prefix="persona-peers-") as scratch:
        folder = Path(scratch)
        gguf, base = await asyncio.to_thread(checkpoint, settings.cache, folder)
        setup = Setup(
            settings=settings,
            prepared=prepared,
            checkpoint=base,
            gguf=gguf,
            plan=plan,
            peft=adapters(folder, prepared, plan, options.users),
            workload=Workload(options.users, *lengths, turns=True),
            text=text,
            wording=await wording(text),
            folder=folder,
        )
        conclude(await measure(peers, setup, options.rounds))


if __name__ == "__main__":
    asyncio.run(main())
