"""`persona bench`, as typed: the real service with a real small engine is measured, each mistake is a sentence."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from live import Start
from models import Models
from typer.testing import CliRunner, Result

from persona.cli import app
from persona.engine.client import LocalEngine
from persona.engine.text import Text
from persona.settings import Settings
from persona.workload import Range, Workload, requests

SETTINGS = """
[model]
name = "{model}"
device = "cpu"
[engine]
context = 512
memory_mb = 64
threads = 1
"""
SMALL = ("--prompt", "70:90", "--reply", "2:6")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration for a tiny model."""
    folder = tmp_path_factory.mktemp("bench")
    model = Models(folder).checkpoint()
    (folder / "persona.toml").write_text(SETTINGS.format(model=model), encoding="utf-8")
    return folder


@pytest.fixture
def persona(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Command"]:
    monkeypatch.setenv("PERSONA_CACHE", str(home / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield Command(home)
    assert not list(tmp_path.glob("persona-*")), "a private service left its home behind"


class Command:
    """Types `persona bench`."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __call__(self, *words: object) -> Result:
        return CliRunner().invoke(app, ["--config", str(self.home / "persona.toml"), "bench", *map(str, words)])

    def lines(self, *words: object) -> list[dict[str, Any]]:
        result = self(*words, *SMALL, "--json")
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_request_is_answered_with_exactly_the_tokens_of_the_workload(persona: Command) -> None:
    (told,) = persona.lines("--users", 3, "--ranks", "1,4", "--clients", 2, "--requests", 9, "--seed", 5)
    drawn = list(islice(requests(Workload(3, Range(70, 90), Range(2, 6), seed=5)), 9))
    assert told["errors"] == {}
    assert (told["sent"], told["answered"], told["ended_early"]) == (9, 9, False)
    assert told["prompt_tokens"] == sum(request.prompt for request in drawn)
    assert told["reply_tokens"] == sum(request.reply for request in drawn)
    assert told["users_seen"] == len({request.user for request in drawn})
    assert told["slo"]["attained"] == 1.0
    assert told["engine"]["adapters"] == len({0, *(request.user for request in drawn)})
    assert told["engine"]["steps"] > 0
    assert told["workload"]["ranks"] == [1, 4]
    assert (told["device"], told["weights"]) == ("cpu", "int4")


def test_sides_are_measured_in_turn_and_compared(persona: Command, tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    told = persona.lines(
        "--users", 2, "--turns", "--compare", "base", "--rounds", 2, "--requests", 4, "--slo", 60, "--out", out
    )
    assert [line.get("side") for line in told] == ["2 users", "base", "2 users", "base", None]
    assert [line.get("round") for line in told] == [1, 1, 2, 2, None]
    assert [line["workload"]["model"] for line in told[:4]] == ["persona", "base", "persona", "base"]
    assert len({(line["prompt_tokens"], line["reply_tokens"]) for line in told[:4]}) == 1
    assert told[4]["compared"] == ["2 users", "base"]
    assert told[4]["ratio_tokens_per_s"] > 0
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == told


def test_a_flood_and_corrupt_adapters_are_told_of_apart_and_hurt_nobody_else(persona: Command) -> None:
    words = ("--users", 4, "--turns", "--rate", 200, "--cv", 2, "--flood", 200, "--compare", "alone")
    told, alone, compared = persona.lines(*words, "--corrupt", 0.25, "--requests", 16)
    assert "light_users" not in alone
    assert (alone["sent"], alone["errors"]) == (16, {})
    assert compared["compared"] == ["beside the flood", "alone"]
    assert told["light_users"]["sent"] + told["flooding_user"]["sent"] == 16
    assert told["corrupt_users"]["sent"] + told["sound_users"]["sent"] == 16
    assert (told["sound_users"]["errors"], told["sound_users"]["refused"]) == ({}, 0)
    assert told["corrupt_users"]["errors"] == {}, "who loses an adapter is answered by the base"


def test_a_time_in_which_nobody_asks_is_no_measurement(persona: Command) -> None:
    result = persona("--users", 2, "--rate", 0.001, "--seconds", 0.2, *SMALL, "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Nobody asked within --seconds" in result.stderr


def test_the_bare_base_is_measured_without_adapters_and_people_read_a_table(persona: Command) -> None:
    result = persona("--base", "--users", 2, "--requests", 3, *SMALL)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "tokens of those replies" in shown
    assert "first token p50, ms" in shown


async def test_a_service_that_runs_is_measured_with_its_own_users(home: Path, tmp_path: Path, start: Start) -> None:
    prepared = Models(home).prepared()
    engine = LocalEngine(Settings.model_validate({"engine": {"context": 512, "memory_mb": 64, "threads": 1}}), prepared)
    await engine.start()
    try:
        live = await start(engine, tokenizer=Text.load(prepared.folder), prepared=prepared)
        file = tmp_path / "keys"
        file.write_text(f"{await live.key('ann')}\n{await live.key('bob')}\n", encoding="utf-8")
        words = ("bench", "--url", live.url, "--keys", str(file), "--turns", "--requests", "4", *SMALL, "--json")
        async with live.http.get(live.url + "/health") as answer:
            assert answer.status == 200
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "persona", *words), stdout=subprocess.PIPE, env=environment(home, tmp_path)
        )
        out, _ = await process.communicate()
    finally:
        await engine.stop()
    told = json.loads(out)
    assert (told["answered"], told["errors"], told["users_seen"], told["url"]) == (4, {}, 2, live.url)


def environment(home: Path, folder: Path) -> dict[str, str]:
    return {**os.environ, "PERSONA_CACHE": str(home / "cache"), "TMPDIR": str(folder)}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_measured_is_told_when_the_measurement_is_ended(home: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "lines.jsonl"
    words = ["--config", str(home / "persona.toml"), "bench", "--users", "2", "--requests", "4", "--rounds", "100000"]
    with subprocess.Popen(
        [sys.executable, "-m", "persona", *words, *SMALL, "--json", "--out", str(out)],
        env=environment(home, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while (not out.exists() or not out.read_text(encoding="utf-8")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors
    told = [json.loads(line) for line in said.splitlines()]
    assert told[0]["answered"] == 4
    assert len(told) < 100_000
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("persona-*"))


MISTAKES = [
    (("--rate", 1, "--clients", 2), "--rate for an open loop, or --clients"),
    (("--requests", 1, "--seconds", 2), "after --requests, or after --seconds"),
    (("--cv", 2), "name its --rate"),
    (("--rate", 0), "rate has to be above 0"),
    (("--alpha", 0), "alpha has to be above 0"),
    (("--flood", 3), "flood is a rate"),
    (("--seed", -1), "seed has to be"),
    (("--slo", "inf"), "finite numbers"),
    (("--seconds", "inf"), "finite numbers"),
    (("--rate", "nan"), "rate has to be above 0"),
    (("--url", "http://127.0.0.1:1", "--key", "pk-1", "--rate", 1, "--flood", 2), "name another key"),
    (("--ranks", "2,65"), "are no ranks"),
    (("--ranks", "two"), "are no ranks"),
    (("--prompt", "many"), "no range of lengths"),
    (("--reply", "9:8"), "no range of lengths"),
    (("--compare", "nothing"), "--compare nothing"),
    (("--compare", 8), "--compare 8"),
    (("--compare", "alone"), "--compare alone"),
    (("--base", "--compare", "base"), "--compare base"),
    (("--base", "--corrupt", 0.5), "leave out one of them"),
    (("--key", "pk-1"), "name it with --url"),
    (("--url", "http://127.0.0.1:1"), "Name the users"),
    (("--url", "http://127.0.0.1:1", "--keys", "nowhere"), "nowhere cannot be read"),
    (("--url", "http://127.0.0.1:1", "--key", "pk\n1"), "plain characters"),
    (("--url", "http://127.0.0.1:1", "--key", "pk-1", "--users", 3), "leave out --url"),
    (("--url", "http://127.0.0.1:1", "--key", "pk-1"), "Nobody answers at http://127.0.0.1:1"),
    (("--url", "nonsense", "--key", "pk-1"), "Nobody answers at nonsense"),
    (("--out", "nowhere/lines.jsonl"), "nowhere/lines.jsonl cannot be written"),
    (("--prompt", 5), "at least"),
    (("--prompt", 500, "--reply", 100), "shorten --prompt or --reply"),
    (("--reply", 2000), "prompt.max_reply_tokens (1024)"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_a_mistake_is_one_sentence(persona: Command, words: tuple[object, ...], said: str) -> None:
    result = persona(*words)
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_too_little_memory_or_disk_is_told_before_users_are_made(
    persona: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as short:
        short.setattr("persona.app_private.available_memory", lambda: 1 << 20)
        result = persona()
        assert result.exit_code == 1
        assert "1 MiB are available" in " ".join(result.output.split())
    result = persona("--users", 999_999_999, *SMALL)
    assert result.exit_code == 1
    assert "measure with fewer users" in " ".join(result.output.split())
