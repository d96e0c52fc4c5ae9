"""Libraries that hold a reply to a JSON schema, side by side, on the embedded model's tokenizer.

    .venv/bin/python tests/bench/peers/grammars.py [--rounds 5]

persona depends on llguidance alone; the others are measured where they are installed, best in an environment of their
own (`pip install . xgrammar outlines-core`). One JSON line each: how long reading the tokenizer took and, for a flat
schema and a nested one, from the schema's text to the first mask, then mask and token on the way through a document
that follows it (median and longest). All masks let that document pass, or the script fails.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from persona.engine import prepare, schema
from persona.engine.text import Text
from persona.settings import Settings

FLAT = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "tame": {"type": "boolean"},
    },
    "required": ["name", "age", "kind", "tame"],
    "additionalProperties": False,
}
PET = {"name": "Tom", "age": 7, "kind": "cat", "tame": True}
NESTED = {
    "$defs": {
        "line": {
            "type": "object",
            "properties": {
                "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
                "amount": {"type": "integer", "minimum": 1, "maximum": 99},
                "note": {"type": "string", "maxLength": 40},
            },
            "required": ["code", "amount", "note"],
            "additionalProperties": False,
        }
    },
    "type": "object",
    "properties": {
        "customer": {"type": "string", "maxLength": 60},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}, "minItems": 1, "maxItems": 5},
        "paid": {"type": "boolean"},
    },
    "required": ["customer", "lines", "paid"],
    "additionalProperties": False,
}
LINES = [{"code": "AB-1234", "amount": 12, "note": "two of them blue"}, {"code": "ZZ-0001", "amount": 99, "note": ""}]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "flat": (FLAT, PET),
    "nested": (NESTED, {"customer": "A. Customer", "lines": LINES, "paid": False}),
}


class Guide(Protocol):
    """One reply under way."""

    def mask(self) -> np.ndarray:
        """One bit a token, the lowest first, as bytes."""

    def take(self, token: int) -> None: ...


Compile = Callable[[str], Guide]


def llguidance(folder: Path, vocab: int, eos: int) -> Compile:
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), n_vocab=vocab, eos_token=eos)

    class Here:
        def __init__(self, text: str) -> None:
            self._matcher = schema.compiled(schema.grammar(json.loads(text)), tokenizer)

        def mask(self) -> np.ndarray:
            return np.frombuffer(self._matcher.compute_bitmask(), np.uint8)

        def take(self, token: int) -> None:
            self._matcher.consume_token(token)

    return Here


def xgrammar(folder: Path, vocab: int, eos: int) -> Compile:
    import transformers
    import xgrammar as library  # type: ignore[import-not-found]

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    about = library.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab, stop_token_ids=[eos])
    compiler = library.GrammarCompiler(about, cache_enabled=False)

    class Here:
        def __init__(self, text: str) -> None:
            self._matcher = library.GrammarMatcher(compiler.compile_json_schema(text, any_whitespace=True))
            self._bits = library.allocate_token_bitmask(1, vocab)

        def mask(self) -> np.ndarray:
            self._matcher.fill_next_token_bitmask(self._bits)
            bits: np.ndarray = self._bits.numpy().view(np.uint8).reshape(-1)
            return bits

        def take(self, token: int) -> None:
            assert self._matcher.accept_token(token)

    return Here


def outlines_core(folder: Path, vocab: int, eos: int) -> Compile:
    from outlines_core import Guide as Automaton  # type: ignore[import-not-found]
    from outlines_core import Index, Vocabulary, json_schema

    text, words = Text.load(folder), dict[bytes, list[int]]()
    for token in range(vocab):
        if token != eos and (piece := text.piece(token)):
            words.setdefault(piece, []).append(token)
    vocabulary = Vocabulary(eos, words)

    class Here:
        def __init__(self, text: str) -> None:
            self._guide = Automaton(Index(json_schema.build_regex_from_schema(text), vocabulary))
            self._bits = np.zeros(-(-vocab // 32), np.uint32)

        def mask(self) -> np.ndarray:
            self._guide.write_mask_into(self._bits.ctypes.data, len(self._bits), 4)
            return self._bits.view(np.uint8)

        def take(self, token: int) -> None:
            self._guide.advance(token, return_tokens=False)

    return Here


LIBRARIES = {"llguidance": llguidance, "xgrammar": xgrammar, "outlines_core": outlines_core}


def first(compile_: Compile, text: str) -> tuple[float, Guide]:
    """Seconds to the first mask."""
    started = time.perf_counter()
    guide = compile_(text)
    guide.mask()
    return time.perf_counter() - started, guide


def walk(guide: Guide, tokens: list[int]) -> list[float]:
    """Seconds of each mask with its token."""
    times = []
    for token in tokens:
        started = time.perf_counter()
        bits = guide.mask()
        allowed = bits[token // 8] >> token % 8 & 1
        guide.take(token)
        times.append(time.perf_counter() - started)
        assert allowed, "a document that follows the schema is refused"
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    prepared = prepare.fetch(prepare.EMBEDDED, Settings().cache, "int4", lambda _, __: None)
    text = Text.load(prepared.folder)
    eos = json.loads((prepared.folder / "model.json").read_text(encoding="utf-8"))["eos"][0]
    for name, library in LIBRARIES.items():
        if find_spec(name) is None:
            sys.stderr.write(f"{name} is not installed: left out\n")
            continue
        started = time.perf_counter()
        compile_ = library(prepared.folder, text.vocab, eos)
        found: dict[str, object] = {"tokenizer_seconds": round(time.perf_counter() - started, 2)}
        for case, (asked, document) in CASES.items():
            tokens = text.encode(json.dumps(document))
            firsts, times = [], list[float]()
            for _ in range(options.rounds):
                seconds, guide = first(compile_, json.dumps(asked))
                firsts.append(seconds)
                times += walk(guide, tokens)[1:]  # the first mask was told before
            found[f"{case}_first_ms"] = round(1000 * statistics.median(firsts), 1)
            found[f"{case}_mask_us"] = round(1e6 * statistics.median(times))
            found[f"{case}_mask_max_us"] = round(1e6 * max(times))
        sys.stdout.write(json.dumps({"measure": "grammars", "library": name, **found}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
