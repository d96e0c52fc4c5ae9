"""`persona eval --data` and `persona prior train`, as typed: a real small engine, each mistake a sentence."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import people as files
import pytest
from models import Models
from typer.testing import CliRunner, Result

from jobs import trial
from persona.cli import app
from persona.errors import StorageFull

SETTINGS = """
[model]
name = "{model}"
device = "cpu"
[engine]
context = 1024
memory_mb = 64
threads = 1
[learning]
held_out_messages = 6
held_out_tokens = 30
min_aged_tokens = 20
learning_rate = 0.02
passes = 4
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration for a tiny model, and a file of three people."""
    folder = tmp_path_factory.mktemp("eval")
    model = Models(folder).checkpoint()
    (folder / "persona.toml").write_text(SETTINGS.format(model=model), encoding="utf-8")
    files.write(folder / "all.jsonl")
    return folder


@pytest.fixture
def persona(home: Path, monkeypatch: pytest.MonkeyPatch) -> "Command":
    monkeypatch.setenv("PERSONA_CACHE", str(home / "cache"))
    return Command(home)


class Command:
    """Types commands."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __call__(self, *words: object) -> Result:
        return CliRunner().invoke(app, ["--config", str(self.home / "persona.toml"), *map(str, words)])

    def told(self, *words: object) -> dict[str, object]:
        result = self(*words)
        assert result.exit_code == 0, result.output
        answer: dict[str, object] = json.loads(result.stdout)
        return answer


EVAL = ("eval", "--contexts", "recent:256,found:256", "--rounds", 1, "--probes", 3)


def test_an_experiment_is_told_drawn_and_leaves_nothing_behind(persona: Command, home: Path, tmp_path: Path) -> None:
    plot = tmp_path / "gain.svg"
    how = ("--users", 2, "--questions", 2, "--seed", 5, "--no-gate")
    said = persona.told(*EVAL, "--data", home / "all.jsonl", *how, "--plot", plot, "--json")
    users, summary = said["users"], said["summary"]
    assert [user["user"] for user in users] == ["ann", "bob"]  # type: ignore[attr-defined]
    for user in users:  # type: ignore[attr-defined]
        assert {"base", "context", "adapter", "adapter_context", "wrong_user"} <= set(user["conditions"])
        assert set(user["reference"]) == {"base", "adapter"}
        assert user["bytes"] > 0
        assert user["seconds"] > 0
    assert summary["adapter_over_wrong_user"]["better"] == 1.0  # type: ignore[index]
    assert summary["adapter_context_over_context"]["people"] == 2  # type: ignore[index]
    contexts = [{"kind": "recent", "tokens": 256}, {"kind": "found", "tokens": 256}]
    asked = {"tokens": None, "rounds": 1, "contexts": contexts, "probes": 3, "questions": 2, "seed": 5, "gate": False}
    assert said["options"] == asked
    ElementTree.fromstring(plot.read_text(encoding="utf-8"))


def test_people_read_it_as_a_table(persona: Command, home: Path) -> None:
    result = persona(*EVAL, "--data", home / "all.jsonl", "--only", "bob,ann")
    assert result.exit_code == 0, result.output
    assert "adapter context over context" in result.output
    assert re.search(r"rounds kept: whole [012], half [012], nothing [012]", result.output)
    assert result.output.index("bob") < result.output.index("ann")


def test_a_prior_is_trained_and_started_from(persona: Command, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prior"
    told = persona.told(
        "prior", "train", folder, "--data", home / "all.jsonl", "--only", "eve", "--tokens", 9000, "--json"
    )
    assert told["people"] == 1
    assert (folder / "adapter.safetensors").stat().st_size == told["bytes"]
    assert -0.5 < told["drift"] < 0.5  # type: ignore[operator]
    assert 0.0 < told["forgetting"] < 1.0  # type: ignore[operator]
    assert bool(told["objection"]) == (told["drift"] > 0.01 or told["forgetting"] > 0.1)  # type: ignore[operator]
    known = persona("eval", "--data", home / "all.jsonl", "--prior", folder)
    assert known.exit_code == 1
    assert f"The prior {folder} has learned from eve: leave them out (--without eve)" in known.stderr
    said = persona.told(*EVAL, "--data", home / "all.jsonl", "--users", 2, "--prior", folder, "--json")
    assert "adapter_context_over_prior_context" in said["summary"]  # type: ignore[operator]
    again = persona("prior", "train", folder, "--data", home / "all.jsonl")
    assert again.exit_code == 1
    assert "not empty" in again.output


MISTAKES = [
    ((), "Say what to evaluate"),
    (("--live", "--data", "all.jsonl"), "Say what to evaluate"),
    (("--data", "none.jsonl"), "none.jsonl cannot be read"),
    (("--data", "all.jsonl", "--only", "zoe"), "nobody called zoe"),
    (("--data", "all.jsonl", "--contexts", "best:256"), "best:256"),
    (("--data", "all.jsonl", "--contexts", "recent:many"), "recent:many"),
    (("--data", "all.jsonl", "--prior", "nowhere"), "The prior"),
    (("--data", "all.jsonl", "--plot", "nowhere/gain.svg"), "nowhere/gain.svg cannot be drawn into: No such file"),
    (("--data", "all.jsonl", "--plot", "."), ". cannot be drawn into: Is a directory"),
    (("--data", "all.jsonl", "--rounds", "30"), "too short"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES)
def test_a_mistake_is_one_sentence(
    persona: Command, home: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(home)
    result = persona("eval", *words) if "--rounds" not in words else persona("eval", *words[:-1], 20)
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_too_little_memory_is_told_before_anything_is_loaded(
    persona: Command, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona.app_private.available_memory", lambda: 1 << 20)
    result = persona("eval", "--data", home / "all.jsonl")
    assert result.exit_code == 1
    assert "1 MiB are available" in " ".join(result.output.split())


def test_a_prior_that_does_not_say_whom_it_knows_is_taken_with_a_warning(
    persona: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"an adapter")
    ending(monkeypatch, lambda: None)
    words = ("eval", "--data", home / "all.jsonl", "--prior", tmp_path, "--json")
    unknown = persona(*words)
    assert unknown.exit_code == 0
    assert "people.json is missing" in unknown.stderr
    assert json.loads(unknown.stdout)["users"]
    (tmp_path / "people.json").write_bytes(b"{}")
    damaged = persona(*words)
    assert damaged.exit_code == 1
    assert "people.json cannot be read" in damaged.stderr


def measured(name: str) -> trial.Result:
    """Somebody of whom the report needs nothing that was not measured."""
    made = trial.Result(name, 1000, [10, 12], reference={"base": 2.0, "adapter": 2.0}, chosen="context_recent_256")
    made.nats = {condition: [20.0, 30.0] for condition in ("base", "context", "adapter", "adapter_context")}
    made.curve = [{"tokens": 1000, "base": 3.0, "context": 2.0, "adapter": 1.9, "adapter_context": 1.8}]
    return made


def ending(monkeypatch: pytest.MonkeyPatch, end: Callable[[], object]) -> None:
    """Experiments measure ann and end so."""

    async def run(*parts: object) -> str:
        done = parts[-1]
        assert isinstance(done, list)
        done.append(measured("ann"))
        end()
        return "base-hash"

    monkeypatch.setattr("persona.cli_trial._run", run)


def test_a_picture_that_fails_costs_no_report(
    persona: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    ending(monkeypatch, folder.rmdir)
    result = persona("eval", "--data", home / "all.jsonl", "--plot", folder / "gain.svg", "--json")
    assert result.exit_code == 1
    assert "gain.svg cannot be drawn into: No such file" in result.stderr
    said = json.loads(result.stdout)
    assert [user["user"] for user in said["users"]] == ["ann"]
    assert said["ended_early"] is False


@pytest.mark.parametrize("how", [OSError(5, "Input/output error"), AssertionError(), StorageFull("The disk is full.")])
def test_an_experiment_that_fails_reports_whom_it_measured(
    persona: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Exception
) -> None:
    def end() -> None:
        raise how

    ending(monkeypatch, end)
    plot = tmp_path / "gain.svg"
    result = persona("eval", "--data", home / "all.jsonl", "--plot", plot, "--json")
    assert result.exit_code == 1
    said = json.loads(result.stdout)
    assert [user["user"] for user in said["users"]] == ["ann"]
    assert said["ended_early"] is True
    ElementTree.fromstring(plot.read_text(encoding="utf-8"))


def test_a_picture_of_before_stays_until_there_is_a_new_one(
    persona: Command, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persona.app_private.available_memory", lambda: 1 << 20)
    old, new = tmp_path / "old.svg", tmp_path / "new.svg"
    old.write_text("before", encoding="utf-8")
    for plot in (old, new):
        assert persona("eval", "--data", home / "all.jsonl", "--plot", plot).exit_code == 1
    assert old.read_text(encoding="utf-8") == "before"
    assert not new.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_experiment_that_is_ended_leaves_no_history_behind(home: Path, tmp_path: Path, number: int) -> None:
    environ = {**os.environ, "PERSONA_CACHE": str(home / "cache"), "TMPDIR": str(tmp_path)}
    words = ["--config", str(home / "persona.toml"), *map(str, EVAL), "--data", str(home / "all.jsonl")]
    with subprocess.Popen([sys.executable, "-m", "persona", *words], env=environ) as process:
        while not list(tmp_path.glob("persona-*/adapters/*")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=60) != 0
    assert not list(tmp_path.glob("persona-*"))


UNHEARD = """
import os, signal
from persona.app_private import _ended_properly

class Last:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        sum(range(100_000))

with _ended_properly():
    Last()
print("nobody heard it")
"""


def test_an_end_that_comes_where_nothing_can_be_raised_is_obeyed_later() -> None:
    ended = subprocess.run([sys.executable, "-c", UNHEARD], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (128 + signal.SIGTERM, "")


def test_what_was_measured_is_told_at_once_and_not_lost_when_the_experiment_is_ended(
    home: Path, tmp_path: Path
) -> None:
    environ = {**os.environ, "PERSONA_CACHE": str(home / "cache"), "TMPDIR": str(tmp_path)}
    words = ["--config", str(home / "persona.toml"), *map(str, EVAL), "--data", str(home / "all.jsonl"), "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "persona", *words],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        first = next(line for line in process.stderr if line.startswith("1/3 ann: base "))
        assert " adapter + context " in first
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
    said = json.loads(out)
    assert said["ended_early"] is True
    assert said["users"][0]["user"] == "ann"
    assert len(said["users"]) < 3
    assert said["summary"]["adapter_over_base"]["people"] == len(said["users"])
