"""`persona serve` as a service manager starts it: a real process with a real engine on a tiny model."""

import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from manager import Manager
from models import Models

ROOT = Path(__file__).parent.parent
SETTINGS = """
home = "{home}"
[http]
port = {port}
shutdown_seconds = 0.5
[model]
name = "{model}"
device = "cpu"
[engine]
context = 1024
memory_mb = 64
threads = 1
hang_seconds = 2.0
start_seconds = 30.0
[log]
json_lines = true
"""
# The service, with limits short enough for a test to wait for their end.
HASTY = """
import persona.engine.client as client
client.MAX_BACKOFF = 1.0
from persona.__main__ import main
main()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Service:
    """A service to be started, and what it says."""

    manager: Manager
    folder: Path
    port: int

    @property
    def environ(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("PERSONA_")}
        return {**own, "PYTHONPATH": str(ROOT), "PERSONA_CACHE": str(self.folder / "cache")}

    def start(self, *, program: str = "from persona.__main__ import main; main()", **options: object) -> None:
        command = [sys.executable, "-c", program, "serve", "--config", str(self.folder / "persona.toml")]
        self.manager.start(command, self.environ, log=self.folder / "log", **options)  # type: ignore[arg-type]

    def get(self, path: str, status: int = 200) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
                found, body = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                found, body = error.code, error.read()
        assert found == status, body
        return str(body.decode())

    def log(self) -> list[dict[str, object]]:
        lines = (self.folder / "log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def engines(self) -> list[psutil.Process]:
        assert self.manager.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.manager.process.pid).children()
        return []


@pytest.fixture
def service(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    models = Models(tmp_path_factory.getbasetemp() / "models")
    models.prepared()
    (tmp_path / "cache").symlink_to(models.root / "cache")
    port = free_port()
    text = SETTINGS.format(home=tmp_path / "home", port=port, model=models.checkpoint())
    (tmp_path / "persona.toml").write_text(text)
    with Manager() as manager:
        yield Service(manager, tmp_path, port)


def test_ready_comes_after_a_token_was_generated_and_the_address_answers(service: Service) -> None:
    service.start()
    heard = service.manager.until("READY")
    assert "persona_engine_generated 1.0" in service.get("/metrics")
    assert json.loads(service.get("/ready"))["degraded"] == []
    before = [message["STATUS"] for message in heard[:-1] if "STATUS" in message]
    assert [status.split()[1] for status in before] == ["looking", "opening", "loading", "generating"]
    assert all(int(message["EXTEND_TIMEOUT_USEC"]) >= 10e6 for message in heard[:-1])
    assert heard[-1]["STATUS"] == f"Serving at http://127.0.0.1:{service.port}"
    assert service.manager.stop(signal.SIGTERM) == 0
    assert "STOPPING" in service.manager.until_end()


def test_who_connects_to_the_managers_socket_before_the_model_is_loaded_waits_and_is_answered(
    service: Service,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        service.port = listening.getsockname()[1]
        service.start(listening=listening)
        assert json.loads(service.get("/ready"))["ready"] is True
        assert f":{service.port}" in service.manager.until("READY")[-1]["STATUS"]
        assert service.manager.stop(signal.SIGTERM) == 0
        with socket.create_connection(listening.getsockname(), timeout=5):
            pass  # the manager's own copy still listens: nobody is refused while it starts again


def test_threat_26_a_stop_while_the_model_loads_is_obeyed_at_once_and_leaves_nobody_behind(service: Service) -> None:
    service.start()
    while "loading" not in service.manager.until("STATUS")[-1]["STATUS"]:
        pass
    deadline = time.monotonic() + 30
    while not (engines := service.engines()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engines
    time.sleep(1.0)  # it imports torch now, and could not end by itself
    assert service.manager.stop(signal.SIGTERM) == 0
    assert [engine for engine in engines if engine.is_running()] == []
    assert [line["event"] for line in service.log()] == ["stopped before it served", "← stopped"]


def test_threat_27_a_stopped_loop_and_an_engine_that_no_restart_helps_end_the_beats(service: Service) -> None:
    text = (service.folder / "persona.toml").read_text()
    (service.folder / "persona.toml").write_text(text.replace("start_seconds = 30.0", "start_seconds = 8.0"))
    service.start(program=HASTY, watchdog=2.0)
    service.manager.until("READY")
    assert service.manager.beats(3.0) >= 2
    assert service.manager.process is not None
    service.manager.process.send_signal(signal.SIGSTOP)
    service.manager.beats(0.3)
    assert service.manager.beats(4.0) == 0
    service.manager.process.send_signal(signal.SIGCONT)
    assert service.manager.beats(4.0) >= 1

    deadline = time.monotonic() + 60
    heard = time.monotonic()
    stopped: set[int] = set()
    while time.monotonic() < heard + 2.5:
        assert time.monotonic() < deadline, "it went on beating"
        for engine in service.engines():  # looked for often: it could load and answer within a second or two
            if engine.pid not in stopped:
                engine.send_signal(signal.SIGSTOP)
                stopped.add(engine.pid)
        if service.manager.beats(0.1):
            heard = time.monotonic()
    assert len(stopped) > 1, "its own keeper had its chance first"
    trouble = json.loads(service.get("/ready", 503))
    assert trouble["degraded"] == ["engine"]
    assert "restarted" in trouble["checks"]["engine"]
    for engine in service.engines():
        engine.kill()


def test_threat_27_one_restart_of_the_engine_is_within_the_limits_and_ready_says_how_long_it_takes(
    service: Service,
) -> None:
    service.start(watchdog=2.0)
    service.manager.until("READY")
    (engine,) = service.engines()
    engine.kill()
    engine.wait()
    time.sleep(0.2)
    trouble = json.loads(service.get("/ready", 503))
    assert trouble["checks"]["engine"].startswith("The engine is being restarted; it has been away for ")
    assert service.manager.beats(3.0) >= 2
    deadline = time.monotonic() + 60
    while "503" in str(health := _status(service)) and time.monotonic() < deadline:
        time.sleep(0.3)
    assert health == 200
    assert service.manager.stop(signal.SIGTERM) == 0


def _status(service: Service) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/ready", timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
