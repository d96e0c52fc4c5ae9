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


class Programs:
    """Runs programs of this project on the prepared model, each in a process of its own: nothing else has the GPU."""

    def __init__(self, bench: Bench, scratch: Path) -> None:
        self._bench, self._size, self._scratch = bench, bench.size, scratch
        self._asked, self._crowd = bench.size.service, min(32, bench.size.service.users)

    def measures(self) -> dict[str, Callable[[], None]]:
        asked = self._asked
        many = f"--compare 1 --clients {self._crowd} --requests {asked.requests} --prompt 64:256 --reply 16:64"
        many += f" --rounds {asked.repeats}"
        mixed = f"--users {asked.mixed} {many} --ranks 2,8,16"
        corrupt = f"--users {asked.requests} --turns --corrupt 0.01 --clients {self._crowd} --requests {asked.requests}"
        return {
            "M1 equal": lambda: self._service("M1, equal ranks", f"--users {asked.users} {many}"),
            "M1 mixed": lambda: self._service("M1, ranks 2, 8 and 16", mixed),
            "M2": self._decode,
            "M3": self._beside_peft,
            "M15": self._overload,
            "M17": lambda: self._service("M17", f"{corrupt} --prompt 64 --reply 8"),
            "M7": lambda: self._program("swaps.py", "--flips", str(asked.flips), "--users", "4", "--versions", "2"),
            "engine": self._engine,
        }

    def _decode(self) -> None:
        for rows in self._size.rows:
            work = f"--users {rows} --clients {rows} --turns --compare base --requests {3 * rows}"
            self._service("M2", f"{work} --prompt 64 --reply 192 --rounds {self._asked.repeats}")

    def _beside_peft(self) -> None:
        """Everybody asks once, 128 tokens and a reply of 64, from the first request until the last reply has ended."""
        import gpu_peers

        rows, ranks = max(self._size.rows), ",".join(map(str, self._size.ranks))
        work = f"--users {rows} --clients {rows} --turns --requests {rows} --prompt 128 --reply 64 --ranks {ranks}"
        ours = self._service("M3", f"{work} --rounds {self._asked.repeats + 1}")[1:]  # the first loads every adapter
        peer = gpu_peers.PeftBatch(self._size, self._bench.dtype, self._bench.device)
        theirs = [rows / peer.seconds(rows, 128, 64) for _ in range(self._asked.repeats + 1)][1:]
        self._bench.report("M3", side="PEFT's mixed batch", requests_per_s=round(statistics.median(theirs), 2))
        if ours:
            ratio = statistics.median(line["requests_per_s"] for line in ours) / statistics.median(theirs)
            self._bench.report("M3", side="persona over PEFT", ratio_requests_per_s=round(ratio, 2))

    def _overload(self) -> None:
        """M15 at 1.5 times what the service manages, and M16 with a flood of twice that."""
        lengths, seconds = "--prompt 64:512 --reply 8:512", f"--seconds {self._asked.seconds:g}"
        users, least = f"--users {self._crowd}", 4 / self._asked.seconds  # so that somebody asks at all
        lines = self._service("M15: capacity", f"{users} --clients {2 * self._crowd} {seconds} {lengths}")
        if not lines:
            return
        most = lines[0]["requests_per_s"]
        over = f"{users} --rate {max(1.5 * most, least):.2f} {seconds} {lengths} --slo {SLO:g}"
        for seed in range(42, 42 + self._asked.repeats):
            self._service("M15", f"{over} --seed {seed}", patience=SLO - 1)
        light = f"--users 8 --turns --rate {max(most / 8, least):.3f} {seconds} {lengths}"
        flood = f"--flood {max(2 * most, least):.2f} --compare alone --rounds {self._asked.repeats}"
        self._service("M16", f"{light} {flood}")

    def _engine(self) -> None:
        for part in self._asked.parts:
            self._program("engine.py", "--only", part)

    def _service(self, measure: str, work: str, patience: float = 60.0) -> list[dict[str, Any]]:
        """`persona bench` with these options: a figure for each run, and how two sides compare."""
        command = ("-m", "persona", "bench", *work.split(), "--json")
        lines = self._lines(measure, *command, PERSONA_ENGINE__PATIENCE_SECONDS=patience)
        for line in lines:
            self._bench.report(measure, **(_short(line) if "side" in line else {"side": "compared", **_ratios(line)}))
        return [line for line in lines if "side" in line]

    def _program(self, name: str, *options: str) -> None:
        """One of the benchmarks beside this file: its lines, as they are."""
        for line in self._lines(name, str(HERE / name), *options):
            self._bench.report(line.pop("measure"), **line)

    def _lines(self, measure: str, *command: str, **settings: object) -> list[dict[str, Any]]:
        """What a program writes. Where it fails that is told, beside what it has measured before."""
        environment = self._environment | {name: str(value) for name, value in settings.items()}
        self._bench.let_go()
        done = subprocess.run(
            [sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            self._bench.report("failed", what=measure, command=" ".join(command[1:]), code=done.returncode)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]  # not what is logged

    @cached_property
    def _environment(self) -> dict[str, str]:
        """With a first token in mind that waits for libraries of the device: a step may take its time."""
        return os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
            "PERSONA_CACHE": str(self._scratch),
            "PERSONA_MODEL__NAME": prepared(self._size, self._scratch, self._bench.device).name,
            "PERSONA_MODEL__WEIGHTS": "nf4",
            "PERSONA_MODEL__DEVICE": self._bench.device.type,
            "PERSONA_ENGINE__MEMORY_MB": str(self._asked.memory_mb),
            "PERSONA_ENGINE__HOST_MB": str(self._asked.memory_mb),
            "PERSONA_ENGINE__START_SECONDS": "900",
            "PERSONA_ENGINE__HANG_SECONDS": "120",
        }


def measures(bench: Bench, scratch: Path) -> dict[str, Callable[[], None]]:
    """The model is written, below `scratch`, when the first of them begins."""
    return Programs(bench, scratch).measures()


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
