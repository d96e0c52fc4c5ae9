"""`persona doctor`: what this machine has, what persona needs, and what to do about the difference.

It looks and changes nothing. A check never raises: what it cannot find out is a finding of its own.
"""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from persona.cli_link import Link, NotRunning
from persona.engine import device, prepare
from persona.errors import PersonaError
from persona.settings import Settings
from storage import database

_GIB = 1 << 30
_SOCKET_PATH = 107  # bytes that Linux allows
_PREPARING = 2 * _GIB  # free space with which the embedded model can be fetched and converted
_NVIDIA = (Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))


class State(StrEnum):
    """How a check ended: warn works, but not as well as it could; fail stops persona."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found and, unless all is well, what to do."""

    name: str
    state: State
    found: str
    advice: str = ""


Check = Callable[[Settings], Iterator[Finding]]


def examine(settings: Settings) -> Iterator[Finding]:
    """Every finding about this machine under `settings`, one after another."""
    for check in (_python, _packages, _torch, _device, _model, _folders, _database, _memory, _broker, _service):
        try:
            yield from check(settings)
        except (PersonaError, OSError, PackageNotFoundError) as error:
            told = error.message if isinstance(error, PersonaError) else f"{type(error).__name__}: {error}"
            yield Finding(check.__name__.strip("_"), State.FAIL, told)


def _python(settings: Settings) -> Iterator[Finding]:
    yield Finding("python", State.OK, f"{sys.version.split()[0]} at {sys.executable}")


def _packages(settings: Settings) -> Iterator[Finding]:
    found, missing = [], []
    for name in ("transformers", "bitsandbytes", "safetensors", "aiohttp", "sqlalchemy", "apscheduler"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        yield Finding("packages", State.FAIL, f"missing: {', '.join(missing)}", "Install persona again.")
    else:
        yield Finding("packages", State.OK, ", ".join(found))


def _torch(settings: Settings) -> Iterator[Finding]:
    cuda = device.cuda_version()
    build = f"{version('torch')}, " + (f"built for CUDA {cuda}" if cuda else "the CPU build")
    if cuda is None and any(path.exists() for path in _NVIDIA):
        yield Finding(
            "torch",
            State.WARN,
            build,
            "Install the build for the GPU: `make run TORCH=cuda`, or as docs/DEPLOY.md has it.",
        )
    else:
        yield Finding("torch", State.OK, build)


def _device(settings: Settings) -> Iterator[Finding]:
    choice = device.choose(settings.model)
    if choice.device == "cpu":
        yield Finding("device", State.OK, f"CPU with {os.cpu_count()} cores")
        if choice.weights == "int4":
            yield _compiled(settings)
    else:
        yield Finding("device", State.OK, _cards() or "CUDA")
        yield _kernels()
    yield Finding("weights", State.OK, f"{choice.weights} on {choice.device}")


def _compiled(settings: Settings) -> Finding:
    """Whether the engine can compile its step for this CPU; it does without if not."""
    slower = "plain torch, and replies take about twice as long"
    if not settings.engine.native:
        return Finding("kernels", State.OK, f"{slower}: engine.native is off")
    if (command := device.c_compiler()) is None:
        return Finding(
            "decode step", State.WARN, f"{slower}: there is no C compiler", "Debian: `apt-get install gcc libc6-dev`."
        )
    return Finding("kernels", State.OK, f"compiled for this CPU with {command[0]}")


def _kernels() -> Finding:
    """Whether Triton has what it needs to compile our kernels; the engine does without them if not."""
    if find_spec("triton") is None:
        advice = "The build of torch for CUDA brings it: `make run TORCH=cuda`, or as docs/DEPLOY.md has it."
        return Finding("kernels", State.WARN, "none, and replies are slower: Triton is not installed", advice)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists() or not any(map(shutil.which, (os.environ.get("CC") or "gcc", "clang"))):
        advice = "Debian: `apt-get install gcc python3-dev`."
        return Finding("kernels", State.WARN, "none, and replies are slower: Triton has no C compiler", advice)
    return Finding("kernels", State.OK, f"Triton {version('triton')}")


def _cards() -> str:
    """The NVIDIA devices as their driver names them; empty if it does not answer."""
    query = ["nvidia-smi", "--query-gpu=name,memory.free,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    cards = (line.split(", ") for line in answer.splitlines() if line.count(", ") == 2)
    return "; ".join(f"{name}, {free} of {total} free" for name, free, total in cards)


def _model(settings: Settings) -> Iterator[Finding]:
    form = device.choose(settings.model).weights
    name = settings.model.name
    if found := prepare.ready(name, settings.cache, form):
        size = sum(file.stat().st_size for file in found.folder.iterdir())
        yield Finding("model", State.OK, f"{name}, {size / 2**20:.0f} MiB in {found.folder}")
        return
    advice = "`persona model fetch` brings it now; `persona serve` does so at its start."
    yield Finding("model", State.WARN, f"{name} is not prepared as {form} yet", advice)
    yield _space("cache", settings.cache, _PREPARING)


def _folders(settings: Settings) -> Iterator[Finding]:
    yield _space("disk", settings.home, _GIB)
    if len(os.fsencode(settings.admin_socket)) > _SOCKET_PATH:
        found = f"{settings.admin_socket} is too long for a socket"
        yield Finding("home", State.FAIL, found, "Choose a shorter PERSONA_HOME.")


def _space(name: str, folder: Path, enough: int) -> Finding:
    """Free space where `folder` is or will be, and whether this account may write there."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    found = f"{free / _GIB:.1f} GiB free at {folder}"
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, State.FAIL, f"{there} cannot be written", "Choose another folder, or mend its owner.")
    if free < enough // 20:
        return Finding(name, State.FAIL, found, "The disk is as good as full: free some space.")
    if free < enough:
        return Finding(name, State.WARN, found, f"Less than {enough / _GIB:.0f} GiB: free some space soon.")
    return Finding(name, State.OK, found)


def _database(settings: Settings) -> Iterator[Finding]:
    file = settings.database
    if not file.exists():
        yield Finding("database", State.OK, f"{file} is made at the first start")
        return
    schema, newest = database.examine(file)
    size = f"{file.stat().st_size / 2**20:.1f} MiB"
    if schema == newest:
        yield Finding("database", State.OK, f"{size}, sound, schema {schema}")
    else:
        yield Finding("database", State.OK, f"{size}, sound, schema {schema} becomes {newest} at the next start")


def available_memory() -> int:
    """Bytes that programs may still take."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


def _memory(settings: Settings) -> Iterator[Finding]:
    available = available_memory()
    wanted = settings.engine.memory_mb << 20
    found = f"{available / _GIB:.1f} GiB available, {wanted / _GIB:.1f} GiB wanted for cache and adapters"
    if available < wanted:
        yield Finding("memory", State.WARN, found, "Lower engine.memory_mb or end other programs.")
    else:
        yield Finding("memory", State.OK, found)


def _broker(settings: Settings) -> Iterator[Finding]:
    """Whether somebody listens where the broker should be; who may come in is told by the service's log."""
    mqtt = settings.mqtt
    if not mqtt.enabled:
        return
    if mqtt.embedded:
        yield Finding("broker", State.OK, f"inside, amqtt {version('amqtt')}: for trying out only")
        return
    try:
        with socket.create_connection((mqtt.host, mqtt.port), timeout=5):
            yield Finding("broker", State.OK, f"{mqtt.host}:{mqtt.port} answers")
    except OSError:
        advice = "Start Mosquitto, or check mqtt.host and mqtt.port; until then no event and no chat comes over MQTT."
        yield Finding("broker", State.WARN, f"nobody listens at {mqtt.host}:{mqtt.port}", advice)


def _service(settings: Settings) -> Iterator[Finding]:
    try:
        status = Link(settings).ask("GET", "/admin/status")
        if status["engine"] is None:
            yield Finding("service", State.WARN, "running, its engine does not answer yet", "Its log says why.")
        else:
            yield Finding("service", State.OK, f"running, users: {status['users']}")
    except NotRunning:
        yield from _port(settings)


def _port(settings: Settings) -> Iterator[Finding]:
    place = f"{settings.http.host}:{settings.http.port}"
    try:
        with socket.create_server((settings.http.host, settings.http.port)):
            yield Finding("service", State.OK, f"not running; {place} is free for it")
    except OSError:
        advice = "If persona.socket holds it, start persona.service; else set PERSONA_HTTP__PORT."
        yield Finding("service", State.FAIL, f"not running, and {place} is taken", advice)
