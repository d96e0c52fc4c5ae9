"""docs/DEPLOY.md, walked from its first command to its last in a sandbox with the paths of a machine.

A block that is marked needs what a sandbox has not; every other command runs for real, `systemctl` through a stand-in
that starts the units as they are written. A command that fails, a mark that is unknown or that hides a command which
could run, fails the test.
"""

import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from manager import Manager
from models import Models
from parts import program
from typer.testing import CliRunner

from persona.cli import app
from persona.errors import SchemaError
from persona.settings import Settings
from storage.database import Database

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/DEPLOY.md").read_text(encoding="utf-8")
# Mark → the commands that may hide behind it.
MARKS = {
    "root": ("apt-get", "useradd"),
    "gpu": ("apt-get", "echo nvidia-uvm", "reboot", "nvidia-smi", "persona model show", "persona doctor"),
    "hub": ("python3 -m venv", "/opt/persona/bin/pip", "persona model fetch", "git pull"),
    "mqtt": ("install", "head", "mosquitto_passwd", "printf", "systemctl"),
}
TINY = """
[model]
name = "{model}"
device = "cpu"
[engine]
context = 1024
memory_mb = 64
threads = 1
[learning]
enabled = false
"""
RUNUSER = '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n'
INSTALL = """#!/bin/bash
words=()
while [ $# -gt 0 ]; do case "$1" in -o|-g) shift 2;; *) words+=("$1"); shift;; esac; done
exec {install} "${{words[@]}}"
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what it is marked with, its text."""

    language: str
    mark: str
    text: str


BLOCKS = [Block(*found) for found in re.findall(r"(?m)^```(\w*) ?([\w ]*)\n((?:.*\n)*?)```$", PAGE)]


def test_every_block_is_commands_with_a_known_mark_or_plain_text() -> None:
    assert len(BLOCKS) == PAGE.count("```") / 2
    for block in BLOCKS:
        assert block.language in ("sh", "text"), block
        assert block.mark in ("", *MARKS), block


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.mark], ids=lambda block: block.text.split("\n")[0]
)
def test_a_mark_hides_no_command_that_could_run(block: Block) -> None:
    for line in block.text.splitlines():
        assert line.startswith(MARKS[block.mark]), line
        if line.startswith("persona "):
            assert CliRunner().invoke(app, [*line.split()[1:], "--help"]).exit_code == 0, line


async def test_threat_24_the_refusal_of_a_newer_database_is_quoted_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "persona.db"
    await (await Database.open(path)).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaError) as refusal:
        await Database.open(path)
    (quoted,) = (block.text.strip() for block in BLOCKS if block.language == "text")
    assert refusal.value.message.replace(str(path), "/var/lib/persona/persona.db") == quoted


class Sandbox:
    """The paths of a machine below one folder, and a port of its own."""

    def __init__(self, root: Path, manager: Manager) -> None:
        self.root = root
        self.systemd = Systemd(self, manager)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]

    def here(self, text: str) -> str:
        """`text` with the sandbox's paths and port."""
        inside = re.sub(r"(?<![\w./-])(/opt|/etc|/var|/usr/local)/", rf"{self.root}\1/", text)
        return inside.replace("8377", str(self.port))

    def path(self, name: str) -> Path:
        return Path(self.here(name))

    def furnish(self, models: Models) -> None:
        """What the marked blocks would have brought: the checkout, the program, a model."""
        for name in ("systemd", "configs"):
            for file in (path for path in (ROOT / name).rglob("*") if path.is_file()):
                target = self.root / "checkout" / file.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(self.here(file.read_text(encoding="utf-8")))
        install = program("install")
        self.script("shims/runuser", RUNUSER)
        self.script("shims/install", INSTALL.format(install=install))
        run = f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m persona "$@"\n'
        self.script("opt/persona/bin/persona", run)
        for folder in ("etc/systemd/system", "usr/local/bin", "var/backups", "etc/mosquitto/conf.d"):
            (self.root / folder).mkdir(parents=True)
        models.prepared()

    def script(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, block: Block) -> str:
        """Every command of a block; what they printed. Fails with the first that fails."""
        said, script = "", ""
        for line in [*block.text.splitlines(), "systemctl end"]:
            if line.startswith(("systemctl ", "journalctl ")):
                said += self.bash(script) if script else ""
                script = ""
                said += self.systemd.obey(shlex.split(line))
            else:
                script += f"{line}\n"
        return said

    def bash(self, script: str) -> str:
        own = {name: value for name, value in os.environ.items() if not name.startswith("PERSONA_")}
        path = f"{self.root}/shims:{self.root}/usr/local/bin:{own['PATH']}:/usr/sbin"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.here(script)],
            cwd=self.root / "checkout",
            env={**own, "PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def settle_in(self, models: Models) -> None:
        """Once the settings are installed: they are sound, and a tiny model takes the place of a large one."""
        file = self.path("/etc/persona/persona.toml")
        chosen = Settings.model_validate(tomllib.loads(file.read_text()))
        assert (chosen.model.weights, chosen.model.device) == ("nf4", "cuda")
        file.write_text(TINY.format(model=models.checkpoint()))
        self.path("/var/cache/persona/models").symlink_to(models.root / "cache/models")


class Systemd:
    """Starts and stops the two units as they are written, drop-ins included."""

    def __init__(self, sandbox: Sandbox, manager: Manager) -> None:
        self._sandbox, self._manager = sandbox, manager
        self._units: dict[str, dict[str, list[str]]] = {}
        self._listening: socket.socket | None = None
        self._running = False

    def obey(self, words: list[str]) -> str:
        """Carry out one systemctl or journalctl command."""
        log = self._sandbox.root / "log"
        match words:
            case ["journalctl", "-u", "persona.service", *_]:
                return log.read_text()
            case ["systemctl", "end"]:
                return ""
            case ["systemctl", "daemon-reload"]:
                self._units = {name: self._read(name) for name in ("persona.service", "persona.socket")}
            case ["systemctl", "status", "persona.service"]:
                assert self._running
                assert self._manager.process is not None
                assert self._manager.process.poll() is None
            case ["systemctl", verb, *rest]:
                for step in {"enable": ["start"], "disable": ["stop"], "restart": ["stop", "start"]}.get(verb, [verb]):
                    for unit in (word for word in rest if word != "--now"):
                        {"start": self._start, "stop": self._stop}[step](unit)
            case _:
                raise AssertionError(f"no such command: {words}")
        return ""

    def _read(self, name: str) -> dict[str, list[str]]:
        folder = self._sandbox.path("/etc/systemd/system")
        if not (folder / name).exists():
            return {}
        found: dict[str, list[str]] = {}
        for file in (folder / name, *sorted((folder / f"{name}.d").glob("*.conf"))):
            for key, value in re.findall(r"(?m)^(\w+)=(.*)$", file.read_text(encoding="utf-8")):
                found[key] = [*found.get(key, []), value] if value else []
        return found

    def _start(self, unit: str) -> None:
        if unit == "persona.socket" and self._listening is None:
            assert not self._running, "systemd refuses: Socket service persona.service already active"
            host, port = self._units[unit]["ListenStream"][-1].rsplit(":", 1)
            self._listening = socket.create_server((host, int(port)), backlog=128)
        elif unit == "persona.service" and not self._running:
            service = self._units[unit]
            watchdog = float(service["WatchdogSec"][-1])
            command, log = shlex.split(service["ExecStart"][-1]), self._sandbox.root / "log"
            self._manager.start(command, self._environ(service), listening=self._listening, watchdog=watchdog, log=log)
            self._manager.until("READY")
            self._running = True

    def _environ(self, service: dict[str, list[str]]) -> dict[str, str]:
        root = self._sandbox.root
        places = {"StateDirectory": "var/lib", "CacheDirectory": "var/cache", "RuntimeDirectory": "run"}
        found = {"PATH": os.environ["PATH"], "HOME": str(root)}
        for key, place in places.items():
            folder = root / place / service[key][-1]
            folder.mkdir(mode=int(service[f"{key}Mode"][-1], 8), parents=True, exist_ok=True)
            found[re.sub(r"(?<=.)Directory", "_DIRECTORY", key).upper()] = str(folder)
        for given in service.get("LoadCredential", []):
            name, source = given.split(":", 1)
            (root / "run/credentials").mkdir(exist_ok=True)
            shutil.copy(source, root / "run/credentials" / name)
        specifiers = {"%t": root / "run", "%C": root / "var/cache", "%d": root / "run/credentials"}
        for word in service["Environment"]:
            name, value = word.split("=", 1)
            found[name] = re.sub(r"%\w", lambda match: str(specifiers[match[0]]), value)
        return found

    def _stop(self, unit: str) -> None:
        if unit == "persona.service" and self._running:
            assert self._manager.stop(signal.SIGTERM) == 0
            self._running = False
            self._manager.until_end()
        elif unit == "persona.socket" and self._listening is not None:
            self._listening.close()
            self._listening = None

    def close(self) -> None:
        if self._listening is not None:
            self._listening.close()


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    root = Path(tempfile.mkdtemp(prefix="deploy-"))  # a socket's path has to be short
    with Manager() as manager:
        made = Sandbox(root, manager)
        try:
            yield made
        finally:
            made.systemd.close()
            shutil.rmtree(root)


def test_every_command_of_the_page_works_in_its_order(
    sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> None:
    program("curl")
    program("systemd-analyze")
    models = Models(tmp_path_factory.getbasetemp() / "models")
    sandbox.furnish(models)
    broker = (ROOT / "configs/mosquitto.conf").exists()
    if broker:
        program("mosquitto_passwd")
    said = {}
    for block in BLOCKS:
        if block.language == "sh" and (not block.mark or (block.mark == "mqtt" and broker)):
            said[block.text] = sandbox.run(block)
        if "configs/workstation.toml" in block.text:
            sandbox.settle_in(models)

    def printed(command: str) -> str:
        return next(out for text, out in said.items() if command in text)

    assert '"ready": true' in printed("systemctl enable --now")
    assert "ann" in printed("persona users list")
    assert '"chat.completion"' in printed("/v1/chat/completions")
    assert "manifest.json" in printed("persona backup /var/backups/persona/monday")
    assert "start persona" in printed("persona restore")
    assert "→ serving" in printed("journalctl")
    assert '"ready": true' in printed("journalctl")
    assert "Overall exposure level" in printed("--threshold=25")
    state = sandbox.path("/var/lib/persona")
    assert (state / "persona.db").exists()
    assert list(state.glob("before-restore-*/persona.db"))
    assert sorted(sandbox.path("/etc/systemd/system").iterdir()) == []


def test_a_command_that_fails_fails_the_walk(sandbox: Sandbox) -> None:
    (sandbox.root / "checkout").mkdir()
    for broken in ("install -m 644 configs/none.toml /etc/x", "persona users ad", "systemctl explode persona.service"):
        with pytest.raises((AssertionError, KeyError)):
            sandbox.run(Block("sh", "", f"{broken}\n"))
