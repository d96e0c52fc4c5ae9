"""The command line: every failure is one sentence on stderr and exit code 1, every answer can be read by a script."""

import asyncio
import json
import os
import queue
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner, Result

from persona import doctor
from persona.app import House, build, serve
from persona.cli import app
from persona.cli_screen import plain, sentence
from persona.cli_serve import welcome
from persona.domain import UserId
from persona.engine.protocol import ScoreRequest
from persona.engine.scripted import ScriptedEngine, ScriptedText
from persona.errors import PersonaError
from persona.events import Delivery
from persona.settings import Settings, load

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of the test's own, and no setting from outside."""
    for name in [name for name in os.environ if name.startswith("PERSONA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PERSONA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "home"


def run(*words: str, text: str | None = None) -> Result:
    return CliRunner().invoke(app, words, input=text)


def refused(result: Result, named: str) -> None:
    """One sentence on stderr that names the trouble, nothing on stdout, exit code 1."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert named in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("users", "add", "ann"),
        ("users", "list", "--json"),
        ("users", "forget", "ann", "--yes"),
        ("keys", "add", "ann"),
        ("keys", "list", "ann"),
        ("keys", "revoke", "ann", "1"),
        ("history", "list", "--user", "ann"),
        ("history", "delete", "1", "--user", "ann"),
        ("train", "--user", "ann", "--wait", "--json"),
        ("adapters", "list", "--user", "ann"),
        ("adapters", "export", "out", "--user", "ann"),
        ("adapters", "import", "in", "--user", "ann"),
        ("adapters", "rollback", "--user", "ann"),
        ("forget", "ann", "--yes"),
        ("backup", "copy"),
        ("events", "list", "--user", "ann"),
        ("events", "dead"),
        ("events", "facts", "--user", "ann"),
        ("events", "send", "fact", "{}", "--user", "ann"),
        ("events", "replay", "--all"),
        ("events", "drop", "1"),
        ("eval", "--live"),
        ("chat", "--user", "ann", "hello"),
        ("chat", "hello"),
    ],
    ids=" ".join,
)
def test_without_a_service_a_command_says_how_to_start_it(words: tuple[str, ...]) -> None:
    refused(run(*words), "start it with `persona serve`")


def test_a_socket_that_nobody_serves_counts_as_no_service(home: Path) -> None:
    (home / "run").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as abandoned:
        abandoned.bind(str(home / "run/admin.sock"))
    refused(run("users", "list"), "start it with `persona serve`")


def test_eval_says_what_it_can_evaluate() -> None:
    refused(run("eval"), "--live")


def test_a_misspelt_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_HTTP__PROT", "1")
    refused(run("users", "list"), "did you mean http.port?")
    refused(run("serve"), "did you mean http.port?")
    refused(run("doctor"), "did you mean http.port?")


def test_a_configuration_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.toml")
    refused(run("--config", missing, "users", "list"), "none.toml does not exist")
    refused(run("serve", "--config", missing), "none.toml does not exist")


def test_a_user_name_that_no_header_can_carry_is_unknown() -> None:
    refused(run("history", "list", "--user", "ann\r\nx-persona-user: ben"), "no user of that name")


def test_forget_asks_and_a_no_ends_it() -> None:
    result = run("forget", "ann", text="n\n")
    assert result.exit_code == 1
    assert "cannot be undone" in result.stderr


def test_model_show_says_how_to_fetch_it() -> None:
    refused(run("model", "show"), "persona model fetch")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"ts": 1, "text": "a"}\nnot json\n', "Line 2 of"),
        (b"[1]\n", "Line 1 of"),
        (b"[" * 100_000 + b"\n", "Line 1 of"),
        (b'{"user": "ben", "text": "a"}\n{"user": "cat", "text": "b"}\n', "choose one with --author"),
    ],
    ids=["broken", "array", "deep", "authors"],
)
def test_a_file_that_cannot_be_imported_is_refused_before_anything_is_sent(
    tmp_path: Path, content: bytes, named: str
) -> None:
    file = tmp_path / "history.jsonl"
    file.write_bytes(content)
    refused(run("history", "import", str(file), "--user", "ann"), named)


def test_a_history_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    refused(run("history", "import", str(tmp_path / "none.jsonl"), "--user", "ann"), "none.jsonl cannot be read")


def test_text_cannot_drive_the_terminal() -> None:
    assert plain("a\x1b[2Jb\x07\x9bc\nd\te\u202e") == "a[2Jbc\nd\te"


def test_doctor_says_whether_there_is_a_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSONA_MQTT__ENABLED", "true")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("PERSONA_MQTT__PORT", str(listening.getsockname()[1]))
        assert broker_finding()["state"] == "ok"
    assert broker_finding()["state"] == "warn"
    assert "mqtt.port" in broker_finding()["advice"]
    monkeypatch.setenv("PERSONA_MQTT__EMBEDDED", "true")
    assert broker_finding()["state"] == "ok"


def test_doctor_says_whether_the_step_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings()
    monkeypatch.setattr(doctor.device, "c_compiler", lambda: ["/usr/bin/cc"])
    assert doctor._compiled(settings).found == "compiled for this CPU with /usr/bin/cc"
    monkeypatch.setattr(doctor.device, "c_compiler", lambda: None)
    finding = doctor._compiled(settings)
    assert finding.state == "warn"
    assert "apt-get install gcc" in finding.advice
    assert doctor._compiled(Settings.model_validate({"engine": {"native": False}})).state == "ok"


def test_doctor_says_what_the_kernels_of_a_gpu_lack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert "not installed" in doctor._kernels().found
    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "python3-dev" in doctor._kernels().advice
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "gcc" in doctor._kernels().advice
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    monkeypatch.setattr(doctor, "version", lambda name: "3.9.0")
    assert doctor._kernels().state == "ok"


def broker_finding() -> dict[str, str]:
    findings = json.loads(run("doctor", "--json").stdout)
    (found,) = [finding for finding in findings if finding["name"] == "broker"]
    return found


def test_doctor_finds_a_fresh_machine_fit_and_a_model_missing() -> None:
    result = run("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert {"python", "torch", "device", "weights", "model", "database", "disk", "memory"} <= findings.keys()
    assert findings["model"]["state"] == "warn"
    assert "model fetch" in findings["model"]["advice"]
    assert findings["database"]["state"] == "ok"
    assert all(finding["advice"] for finding in findings.values() if finding["state"] == "warn")


def test_doctor_reports_a_damaged_database_and_fails(home: Path) -> None:
    home.mkdir()
    (home / "persona.db").write_bytes(b"this is no database" * 100)
    result = run("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)}
    assert findings["database"]["state"] == "fail"
    assert result.exit_code == 1


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("PERSONA_HTTP__PORT", str(port))
        yield port


def test_doctor_reports_a_taken_port(taken: int) -> None:
    result = run("doctor")
    assert f"{taken} is taken" in result.stdout
    assert result.exit_code == 1


def prefers_candidates(request: ScoreRequest) -> list[float]:
    """Scores as if every adapter predicted its user better than the base."""
    return [-0.5 if request.adapter else -1.0] * len(request.targets)


@dataclass
class Running:
    """A service in a thread of its own, as the command line finds it: behind its admin socket."""

    house: House
    engine: ScriptedEngine
    loop: asyncio.AbstractEventLoop

    def accept(self, *deliveries: Delivery) -> None:
        """Have messages arrive as from a broker."""
        done = asyncio.run_coroutine_threadsafe(self.house.services.intake.accept(deliveries), self.loop)
        done.result(timeout=10)

    def check(self, rounds: int) -> None:
        """Have so many rounds of the live check made."""

        async def interrupt(user_id: UserId) -> None:
            """No run is under way."""

        async def made() -> None:
            for _ in range(rounds):
                await self.house.services.live.round(interrupt)

        asyncio.run_coroutine_threadsafe(made(), self.loop).result(timeout=30)


@pytest.fixture
def service(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("PERSONA_HTTP__PORT", "0")
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # a real service logs elsewhere
    engine = ScriptedEngine(lambda request: f"Reply {len(engine.requests)}.", score=prefers_candidates)
    started: queue.Queue[House | Exception] = queue.Queue()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        try:
            async with build(load(), engine=engine, tokenizer=ScriptedText()) as house:
                started.put(house)
                await stop.wait()
        except Exception as error:
            started.put(error)

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    house = started.get(timeout=30)
    try:
        assert not isinstance(house, Exception), house
        yield Running(house, engine, loop)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=30)
        loop.close()
        structlog.reset_defaults()


def answered(*words: str) -> Any:
    """What a command with --json prints."""
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_users_add_prints_user_and_key_for_a_script(service: Running) -> None:
    made = answered("users", "add", "ann")
    assert made == {"user": "ann", "key": made["key"]}
    assert made["key"].startswith("pk-")
    assert [user["name"] for user in answered("users", "list")] == ["ann"]
    refused(run("users", "add", "ann"), "exists already")
    refused(run("users", "add", "../b"), "name")


def test_a_key_can_be_added_listed_and_revoked(service: Running) -> None:
    answered("users", "add", "ann")
    made = answered("keys", "add", "ann", "--label", "laptop", "--no-learn")
    assert made["key"].startswith("pk-")
    run("keys", "revoke", "ann", str(made["id"]))
    rows = {row["label"]: row for row in answered("keys", "list", "ann")}
    assert rows["laptop"]["revoked"]
    assert not rows["laptop"]["learn"]
    assert not any("key" in row for row in rows.values())
    assert "laptop" in run("keys", "list", "ann").stdout
    refused(run("keys", "revoke", "ann", "999"), "no such key")
    refused(run("keys", "list", "ben"), "no user of that name")


def test_a_device_that_several_people_speak_to_does_not_learn_unless_told(service: Running) -> None:
    assert "not recorded" in run("users", "add", "kitchen", "--device").stdout
    assert [user["learn"] for user in answered("users", "list")] == [False]
    answered("users", "add", "ann")
    assert answered("keys", "add", "ann", "--device")["learn"] is False
    assert answered("keys", "add", "ann", "--device", "--learn")["learn"] is True
    assert "not recorded" not in run("keys", "add", "ann").stdout


def test_history_is_imported_once_however_often_the_command_runs(service: Running) -> None:
    answered("users", "add", "eric")
    words = ("history", "import", str(DATA / "eric.jsonl"), "--user", "eric")
    assert answered(*words) == {"stored": 420, "duplicates": 0, "skipped": 0}
    assert answered(*words) == {"stored": 0, "duplicates": 420, "skipped": 0}
    rows = answered("history", "list", "--user", "eric", "--limit", "1000")
    lines = (DATA / "eric.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row["text"] for row in rows] == [json.loads(line)["text"] for line in lines]


def test_only_the_named_author_of_a_log_is_imported(service: Running, tmp_path: Path) -> None:
    answered("users", "add", "ben")
    both = tmp_path / "both.jsonl"
    both.write_bytes((DATA / "eric.jsonl").read_bytes() + (DATA / "dr_willis.jsonl").read_bytes())
    words = ("history", "import", str(both), "--user", "ben")
    refused(run(*words), "choose one with --author")
    refused(run(*words, "--author", "nobody"), "none is nobody")
    assert answered(*words, "--author", "Dr_Willis") == {"stored": 420, "duplicates": 0, "skipped": 420}


def test_a_line_that_the_service_refuses_is_named(service: Running, tmp_path: Path) -> None:
    answered("users", "add", "ann")
    file = tmp_path / "history.jsonl"
    lines = ['{"ts": 3, "text": "fine"}', "", '{"ts": "yesterday", "text": "not fine"}', '{"ts": 1, "text": "fine"}']
    file.write_text("\n".join(lines))
    refused(run("history", "import", str(file), "--user", "ann"), f"{file}: Line 3: ts")


def test_history_is_imported_in_the_order_of_time(service: Running, tmp_path: Path) -> None:
    answered("users", "add", "ann")
    file = tmp_path / "newest-first.jsonl"
    file.write_text("".join(f'{{"ts": {1200 - at}, "text": "at {1200 - at}"}}\n' for at in range(1200)))
    assert answered("history", "import", str(file), "--user", "ann")["stored"] == 1200
    texts = [row["text"] for row in answered("history", "list", "--user", "ann", "--limit", "1000")]
    assert texts == [f"at {number}" for number in range(1, 1001)]


def test_an_entry_is_deleted(service: Running) -> None:
    answered("users", "add", "ann")
    run("chat", "hello there", "--user", "ann")
    entry = answered("history", "list", "--user", "ann")[0]["id"]
    assert answered("history", "delete", str(entry), "--user", "ann")["versions"] == []
    refused(run("history", "delete", "999", "--user", "ann"), "no such")


def test_eval_reports_what_new_messages_say_of_a_version(service: Running) -> None:
    assert answered("eval", "--live") == {"object": "list", "enabled": True, "data": []}
    assert "No message has judged a version yet" in run("eval", "--live").stdout
    answered("users", "add", "eric")
    answered("history", "import", str(DATA / "eric.jsonl"), "--user", "eric")
    assert answered("train", "--user", "eric", "--wait")["state"] == "kept"
    answered("history", "import", str(DATA / "dr_willis.jsonl"), "--user", "eric", "--author", "Dr_Willis")
    service.check(1)
    (item,) = answered("eval", "--live")["data"]
    assert (item["user"], item["version"], item["against"], item["messages"]) == ("eric", 1, 0, 8)
    assert (item["verdict"], item["gain"], item["rolled_back"]) == ("better", 0.5, None)
    shown = run("eval", "--live", "--user", "eric").stdout
    assert "+0.500" in shown
    assert shown.endswith("8 messages judged, gain in nats per token: 1 better.\n")
    refused(run("eval", "--live", "--user", "ben"), "no user of that name")


def test_eval_reports_a_version_that_was_rolled_back(service: Running) -> None:
    answered("users", "add", "eric")
    answered("history", "import", str(DATA / "eric.jsonl"), "--user", "eric")
    assert answered("train", "--user", "eric", "--wait")["state"] == "kept"
    answered("history", "import", str(DATA / "dr_willis.jsonl"), "--user", "eric", "--author", "Dr_Willis")
    service.engine.predicts = lambda request: [-1.0 if request.adapter else -0.5] * len(request.targets)
    service.check(3)
    (item,) = answered("eval", "--live")["data"]
    assert item["active"] is False
    assert item["rolled_back"].startswith("Rolled back by the live check")
    shown = run("eval", "--live").stdout
    assert "worse: rolled back" in shown
    assert "1 worse: rolled back." in shown
    assert "eric@1: Rolled back by the live check" in shown


def test_events_are_told_listed_refused_and_tried_again(service: Running) -> None:
    run("users", "add", "ann")
    tell = ("events", "send", "fact", '{"id": 1, "key": "diet", "value": "vegan"}', "--user", "ann")
    assert "stored" in run(*tell).stdout
    assert "already" in run(*tell).stdout
    assert "vegan" in run("events", "facts", "--user", "ann").stdout
    listed = json.loads(run("events", "list", "--user", "ann", "--json").stdout)
    assert [event["kind"] for event in listed["data"]] == ["fact"]
    refused(run("events", "send", "fact", '{"key": 1}', "--user", "ann"), "key (text)")
    refused(run("events", "send", "a/b", "1", "--user", "ann"), "A kind has")
    refused(run("events", "replay"), "say --all")
    assert "No message was refused" in run("events", "dead").stdout
    early = Delivery("bob", "message", b'{"text": "early"}')
    service.accept(early, Delivery("ann", "fact", b"{}"))
    assert [letter["user"] for letter in json.loads(run("events", "dead", "--json").stdout)] == ["bob", "ann"]
    assert "unknown_user" in run("events", "dead").stdout
    run("users", "add", "bob")
    assert run("events", "replay", "--all").stdout.startswith("1 stored, 0 known already, 1 refused again")
    assert "1 dead letters are gone" in run("events", "drop", "--all", "--user", "ann").stdout
    assert json.loads(run("events", "dead", "--json").stdout) == []
    assert "early" in run("history", "list", "--user", "bob").stdout


def test_chat_prints_the_reply_of_the_only_user(service: Running) -> None:
    answered("users", "add", "ann")
    result = run("chat", "hello there")
    assert (result.exit_code, result.stdout) == (0, "Reply 1.\n")
    assert [row["role"] for row in answered("history", "list", "--user", "ann")] == ["user", "assistant"]
    answered("users", "add", "ben")
    refused(run("chat", "hello there"), "name one with --user")


def test_a_conversation_keeps_its_thread(service: Running) -> None:
    answered("users", "add", "ann")
    result = run("chat", "--user", "ann", text="first question\n\nsecond question\n")
    assert result.stdout == "Reply 1.\nReply 2.\n"
    last = ScriptedText().decode(service.engine.requests[-1].tokens)
    assert "first question" in last
    assert "Reply 1." in last
    assert len(answered("history", "list", "--user", "ann")) == 4


def test_an_unknown_model_is_refused_in_words(service: Running) -> None:
    answered("users", "add", "ann")
    refused(run("chat", "hello", "--model", "persona@9"), "does not exist")


def test_train_waits_for_the_verdict_and_a_version_can_be_rolled_back(service: Running) -> None:
    answered("users", "add", "eric")
    assert answered("train", "--user", "eric", "--wait")["state"] == "deferred"
    answered("history", "import", str(DATA / "eric.jsonl"), "--user", "eric")
    done = answered("train", "--user", "eric", "--wait")
    assert (done["state"], done["version"]) == ("kept", 1), done["reason"]
    versions = answered("adapters", "list", "--user", "eric")
    assert [(version["number"], version["active"]) for version in versions] == [(1, True)]
    assert "published" in run("adapters", "list", "--user", "eric").stdout
    assert answered("adapters", "rollback", "--user", "eric", "--version", "0") == {"version": None}
    refused(run("adapters", "rollback", "--user", "eric", "--version", "7"), "no such version")


def test_a_failed_run_tells_its_reason_and_fails_the_command(service: Running) -> None:
    answered("users", "add", "eric")
    answered("history", "import", str(DATA / "eric.jsonl"), "--user", "eric")
    service.engine.trainable = None
    result = run("train", "--user", "eric", "--wait")
    assert result.exit_code == 1
    assert "not finite" in result.stdout


def test_an_export_without_a_version_is_refused(service: Running, tmp_path: Path) -> None:
    answered("users", "add", "ann")
    refused(run("adapters", "export", str(tmp_path / "out"), "--user", "ann"), "no version yet")
    refused(run("adapters", "import", str(tmp_path / "none"), "--user", "ann"), "")


@pytest.mark.parametrize("words", [("forget", "ann"), ("users", "forget", "ann")], ids=" ".join)
def test_forget_removes_the_user(service: Running, words: tuple[str, ...]) -> None:
    answered("users", "add", "ann")
    run("chat", "hello there")
    assert answered(*words, "--yes")
    assert answered("users", "list") == []


def test_a_backup_is_made_once_and_not_restored_under_a_running_service(service: Running, tmp_path: Path) -> None:
    answered("users", "add", "ann")
    target = tmp_path / "copy"
    assert answered("backup", str(target))["folder"] == str(target)
    with closing(sqlite3.connect(target / "persona.db")) as copy:
        assert copy.execute("SELECT name FROM users").fetchall() == [("ann",)]
    refused(run("backup", str(target)), "exists already")
    refused(run("backup", str(tmp_path / "none" / "copy")), "folder that exists")
    refused(run("restore", str(target)), "already running")
    refused(run("restore", str(target), "--replace"), "already running")


def test_a_backup_is_restored_into_an_empty_home_and_replaces_another_when_told_to(
    service: Running, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered("users", "add", "ann")
    target = tmp_path / "copy"
    answered("backup", str(target))
    monkeypatch.setenv("PERSONA_HOME", str(tmp_path / "fresh"))
    refused(run("restore", str(tmp_path)), "is no backup")
    assert answered("restore", str(target)) == {
        "home": str(tmp_path / "fresh"),
        "aside": None,
        "forgotten_before": [],
        "deleted_before": 0,
    }
    refused(run("restore", str(target)), "--replace")
    result = run("restore", str(target), "--replace")
    assert "moved aside" not in result.stdout
    (aside,) = (tmp_path / "fresh").glob("before-restore-*")
    assert str(aside) in result.stdout
    assert (aside / "persona.db").exists()


def test_threat_32_forget_names_the_backups_that_still_hold_the_user(service: Running, tmp_path: Path) -> None:
    answered("users", "add", "ann")
    answered("backup", str(tmp_path / "copy"))
    assert f"{tmp_path / 'copy'}" in run("forget", "ann", "--yes").stdout


def test_a_home_of_another_account_is_not_restored_into(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    try:
        os.chown(home, 12345, 12345)
    except PermissionError:
        pytest.skip("only root can give a folder away")
    refused(run("restore", str(tmp_path)), "account 12345")


def test_doctor_sees_the_running_service(service: Running) -> None:
    findings = {finding["name"]: finding for finding in answered("doctor")}
    assert findings["service"]["state"] == "ok"
    assert "sound" in findings["database"]["found"]


def test_the_lines_that_the_demo_prints_work_as_they_stand(service: Running) -> None:
    printed = asyncio.run_coroutine_threadsafe(welcome(service.house), service.loop).result(timeout=30)
    code = printed.split(".venv/bin/python -c '\n")[1].split("'\n")[0]
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert said == "Reply 1.\n"


def test_serve_names_a_taken_port(taken: int) -> None:
    with pytest.raises((PersonaError, OSError)) as caught:
        asyncio.run(serve(load(), engine=ScriptedEngine(), tokenizer=ScriptedText()))
    assert "taken" in sentence(caught.value) or str(taken) in sentence(caught.value)
    assert "Errno" not in sentence(caught.value)
