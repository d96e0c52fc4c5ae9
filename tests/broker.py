"""A real Mosquitto with the configuration that we ship, started, killed and started again by tests."""

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

ROOT = Path(__file__).parent.parent
PASSWORD = "secret-of-{}"
ACCOUNTS = ("persona", "homeassistant", "ann", "bob")


def installed(name: str) -> str:
    """The path of a program of Mosquitto's. Without it the test is skipped by name; with CI=true it fails."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        reason = f"{name} is not installed (Debian: the package mosquitto)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Mosquitto:
    """One broker with its own folder; what it stores survives `kill` and `start`."""

    def __init__(self, folder: Path, *, changes: str = "", accounts: tuple[str, ...] = ACCOUNTS) -> None:
        self.folder = folder
        self.port = free_port()
        self._child: asyncio.subprocess.Process | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "store").mkdir(exist_ok=True)
        passwords = folder / "persona.passwd"
        passwords.touch(0o600)
        for name in accounts:
            subprocess.run(
                [installed("mosquitto_passwd"), "-b", str(passwords), name, PASSWORD.format(name)],
                check=True,
                capture_output=True,
            )
        shutil.copy(ROOT / "configs/mosquitto.acl", folder / "persona.acl")
        (folder / "persona.acl").chmod(0o600)
        self._config = folder / "mosquitto.conf"
        self._config.write_text(self._shipped() + changes)

    def _shipped(self) -> str:
        """configs/mosquitto.conf with the paths and the port of this broker, and nothing else changed."""
        text = (ROOT / "configs/mosquitto.conf").read_text()
        for old, new in (
            ("listener 1883 127.0.0.1", f"listener {self.port} 127.0.0.1"),
            ("/etc/mosquitto/", f"{self.folder}/"),
            ("\npersistence true\n", f"\npersistence true\npersistence_location {self.folder}/store/\n"),
        ):
            assert old in text
            text = text.replace(old, new)
        return f"user root\n{text}" if os.getuid() == 0 else text

    async def start(self) -> None:
        self._child = await asyncio.create_subprocess_exec(
            *(installed("mosquitto"), "-c", str(self._config)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        for _ in range(100):
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return
        pytest.fail("mosquitto does not start")

    async def kill(self) -> None:
        """As a power cut would end it."""
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()

    async def restart(self) -> None:
        await self.kill()
        await self.start()

    def settings(self, **changes: Any) -> dict[str, Any]:
        """The section [mqtt] with which persona reaches this broker."""
        file = self.folder / "password"
        file.write_text(PASSWORD.format("persona"))
        return {
            "enabled": True,
            "port": self.port,
            "username": "persona",
            "password_file": str(file),
            "state_seconds": 0.2,
            **changes,
        }

    def client(self, name: str = "ann", **options: Any) -> aiomqtt.Client:
        """A device or program with that account."""
        values = {"username": name, "password": PASSWORD.format(name), "protocol": aiomqtt.ProtocolVersion.V5}
        return aiomqtt.Client("127.0.0.1", self.port, **{**values, **options})


@asynccontextmanager
async def mosquitto(folder: Path, **options: Any) -> AsyncIterator[Mosquitto]:
    broker = Mosquitto(folder, **options)
    await broker.start()
    try:
        yield broker
    finally:
        await broker.kill()
