"""The whole service and the engine's process on a model of the measured shape: every measure that `persona bench` and
the benchmarks beside this file take on the embedded model.

The model is a prepared one like any other but for its weights, which are random, in a cache folder of its own.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gpu_bench import Bench
from gpu_model import Size, projection
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from persona import wording
from persona.engine import prepare
from persona.engine.shape import TARGETS, Shape

HERE = Path(__file__).parent
SLO = 6.0  # seconds in which a first token should come
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prepared(size: Size, cache: Path, device: torch.device) -> prepare.Prepared:
    """A prepared model in NF4 of that shape."""
    name = f"random-{size.name}"
    folder = prepare._folder(name, cache, "nf4")
    folder.mkdir(parents=True)
    save_file(dict(_weights(size.shape, device)), folder / "weights.safetensors")
    (folder / "tokenizer.json").write_text(_tokenizer(size.shape.vocab), encoding="utf-8")
    chat = {"template": TEMPLATE, "special": {"eos_token": SPECIAL[2]}}
    (folder / "chat.json").write_text(json.dumps(chat), encoding="utf-8")
    about = asdict(size.shape) | {"eos": [2], "family": "llama", "source": name, "weights": "nf4"}
    (folder / "model.json").write_text(json.dumps(about), encoding="utf-8")
    prepare._finish(folder, prepare._FORMAT)
    found = prepare.ready(name, cache, "nf4")
    assert found is not None
    return found


def _weights(shape: Shape, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("embed", "head"):
        yield name, (torch.randn(shape.vocab, shape.hidden, device=device) / 50).bfloat16().cpu()
    yield "norm", torch.ones(shape.hidden)
    for layer in range(shape.layers):
        for norm in ("attn_norm", "mlp_norm"):
            yield f"layers.{layer}.{norm}", torch.ones(shape.hidden)
        for target in TARGETS:
            made: Any = projection("nf4", *shape.projection(target), device)
            yield f"layers.{layer}.{target}.bytes", made._data.cpu()
            yield f"layers.{layer}.{target}.absmax", made._absmax.cpu()


def _tokenizer(vocab: int) -> str:
    """A byte-level BPE for which the words of `persona bench` are one token each, filled up with words that no text
    has: what a reply of random weights consists of."""
    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?\w+| ?[^\s\w]+|\s+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    made.train_from_iterator([" ".join(("", *wording.WORDS))], trainer)
    about = json.loads(made.to_str())
    known = about["model"]["vocab"]
    known |= {f"Ġ{number}": number for number in range(len(known), vocab)}
    return json.dumps(about)


class Service:
    """Runs programs of this project on the prepared model, each in a process of its own: nothing else has the GPU."""

    def __init__(self, bench: Bench, scratch: Path) -> None:
        self._bench, self._size, self._scratch = bench, bench.size, scratch

    def measures(self) -> dict[str, Callable[[], None]]:
        size = self._size
        crowd = min(32, size.users)
        many = f"--users {size.users} --compare 1 --clients {crowd} --requests {size.requests} --prompt 64:256"
        many += f" --reply 16:64 --rounds {size.repeats}"
        corrupt = f"--users {size.requests} --turns --corrupt 0.01 --clients {crowd} --requests {size.requests}"
        return {
            "M1 equal": lambda: self._service("M1, equal ranks", many),
            "M1 mixed": lambda: self._service("M1, ranks 2, 8 and 16", f"{many} --ranks 2,8,16"),
            "M2": lambda: [self._decode(rows) for rows in size.rows][-1],
            "M3": self._beside_peft,
            "M15": self._overload,
            "M17": lambda: self._service("M17", f"{corrupt} --prompt 64 --reply 8"),
            "M7": self._swaps,
            "engine": self._engine,
        }

    def _decode(self, rows: int) -> None:
        work = f"--users {rows} --clients {rows} --turns --compare base --requests {3 * rows} --prompt 64 --reply 192"
        self._service("M2", f"{work} --rounds {self._size.repeats}")

    def _beside_peft(self) -> None:
        """Everybody asks once, 128 tokens and a reply of 64, from the first request until the last reply has ended."""
        import gpu_peers

        rows = max(self._size.rows)
        work = f"--users {rows} --clients {rows} --turns --requests {rows} --prompt 128 --reply 64"
        ours = self._service("M3", f"{work} --rounds {self._size.repeats + 1}")[1:]  # the first loads every adapter
        peer = gpu_peers.PeftBatch(self._size, self._bench.dtype, self._bench.device)
        theirs = statistics.median(rows / peer.seconds(rows, 128, 64) for _ in range(self._size.repeats + 1))
        found = statistics.median(line["requests_per_s"] for line in ours)
        self._bench.report("M3", side="PEFT's mixed batch", requests_per_s=round(theirs, 2))
        self._bench.report("M3", side="persona over PEFT", ratio_requests_per_s=round(found / theirs, 2))

    def _overload(self) -> None:
        """M15 at 1.5 times what the service manages, and M16 with a flood of twice that."""
        lengths, seconds = "--prompt 64:512 --reply 8:512", f"--seconds {self._size.seconds:g}"
        crowd = f"--users {min(32, self._size.users)}"
        (line,) = self._service(
            "M15: capacity", f"{crowd} --clients {2 * min(32, self._size.users)} {seconds} {lengths}"
        )
        most = max(line["requests_per_s"], 0.1)
        over = f"{crowd} --rate {1.5 * most:.2f} {seconds} {lengths} --slo {SLO:g}"
        for seed in range(42, 42 + self._size.repeats):
            self._service("M15", f"{over} --seed {seed}", patience=SLO - 1)
        light = max(most / 8, 4 / self._size.seconds)  # so that somebody asks at all
        flood = f"--users 8 --turns --rate {light:.3f} {seconds} --flood {2 * most:.2f} --compare alone"
        self._service("M16", flood)

    def _swaps(self) -> None:
        self._program("swaps.py", "--flips", str(self._size.flips), "--users", "4", "--versions", "2")

    def _engine(self) -> None:
        for part in self._size.parts:
            self._program("engine.py", "--only", part)

    def _service(self, measure: str, work: str, patience: float = 60.0) -> list[dict[str, Any]]:
        """`persona bench` with these options: a figure for each run, and how two sides compare."""
        lines = self._lines(
            "-m", "persona", "bench", *work.split(), "--json", PERSONA_ENGINE__PATIENCE_SECONDS=patience
        )
        for line in lines:
            self._bench.report(measure, **(_short(line) if "side" in line else {"side": "compared", **_ratios(line)}))
        return [line for line in lines if "side" in line]

    def _program(self, name: str, *options: str) -> None:
        """One of the benchmarks beside this file: its lines, as they are."""
        for line in self._lines(str(HERE / name), *options):
            self._bench.report(line.pop("measure"), **line)

    def _lines(self, *command: str, **settings: object) -> list[dict[str, Any]]:
        """What a program writes. Ends this one where that fails: what was measured before is kept."""
        self._bench.let_go()
        done = subprocess.run(
            [sys.executable, *command], env=self._environment | {name: str(value) for name, value in settings.items()},
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"`{' '.join(command)}` ended with {done.returncode}.")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # not what is logged

    @cached_property
    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "PERSONA_CACHE": str(self._scratch),
            "PERSONA_MODEL__NAME": prepared(self._size, self._scratch, self._bench.device).name,
            "PERSONA_MODEL__WEIGHTS": "nf4",
            "PERSONA_MODEL__DEVICE": self._bench.device.type,
            "PERSONA_ENGINE__MEMORY_MB": str(self._size.memory_mb),
            "PERSONA_ENGINE__HOST_MB": str(self._size.memory_mb),
            "PERSONA_ENGINE__START_SECONDS": "900",
        }


def measures(bench: Bench, scratch: Path) -> dict[str, Callable[[], None]]:
    """The model is written, below `scratch`, when the first of them begins."""
    return Service(bench, scratch).measures()


def _short(line: dict[str, Any]) -> dict[str, object]:
    """Of a run, what a table has room for."""
    engine, first, between = (line[name] or {} for name in ("engine", "first_token_ms", "between_tokens_ms"))
    told = {name: line[name] for name in ("side", "round", "requests_per_s", "tokens_per_s", "refused")}
    told |= {"errors": sum(line["errors"].values())}
    told |= {"first_p50_ms": first.get("p50"), "first_p95_ms": first.get("p95")}
    told |= {"between_p50_ms": between.get("p50"), "between_p99_ms": between.get("p99")}
    told |= {"in_time": line["slo"]["attained"], "worst_user": line["slo"]["worst_user"]}
    if light := line.get("light_users"):
        told["light_p95_ms"] = (light["first_token_ms"] or {}).get("p95")
    if sound := line.get("sound_users"):
        told["sound_errors"] = sum(sound["errors"].values())
    return told | {"resident": engine.get("adapters"), "loads": engine.get("adapter_loads")}


def _ratios(line: dict[str, Any]) -> dict[str, object]:
    return {name: value for name, value in line.items() if name != "compared"}
