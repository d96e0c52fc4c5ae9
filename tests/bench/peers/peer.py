"""What is measured beside persona: one class a peer, which starts, answers a list of requests, and stops.

Everybody gets the same users and lengths (persona/workload.py), texts that make prompts of exactly that many tokens for
the base's own template, and the same adapters, written by persona's exporter as PEFT folders.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from persona.domain import Message, Role
from persona.engine import peft_folder, random_adapter
from persona.engine.prepare import Prepared
from persona.engine.protocol import Plan
from persona.engine.shape import Shape
from persona.engine.text import Text
from persona.settings import Settings
from persona.wording import Wording
from persona.workload import Request, Workload


@dataclass(frozen=True)
class Setup:
    """What a peer may use. `peft[i]` is the folder of user i's adapter."""

    settings: Settings
    prepared: Prepared
    checkpoint: Path  # the base as transformers reads it
    gguf: Path | None  # the base as llama.cpp reads it
    plan: Plan  # the form of the adapters
    peft: tuple[Path, ...]
    workload: Workload
    text: Text
    wording: Wording
    folder: Path  # for scratch

    @property
    def users(self) -> int:
        return self.workload.users

    def prompt(self, request: Request) -> str:
        """The user's message."""
        return self.wording.text(request.prompt, request.seed)

    def tokens(self, request: Request) -> list[int]:
        """The whole prompt under the base's template: [request.prompt]."""
        return list(self.text.render([Message(Role.USER, self.prompt(request))], reply=True).tokens)


class Peer(Protocol):
    """One way to answer."""

    name: str

    async def start(self, setup: Setup) -> None:
        """Load base and adapters."""
        ...

    async def run(self, requests: Sequence[Request], workload: Workload) -> list[int]:
        """Answer all, which are the first of `workload`, as fast as it can: the number of tokens of each reply."""
        ...

    async def stop(self) -> None: ...


async def wording(text: Text) -> Wording:
    """Texts for prompts without a system message."""

    async def count(message: str) -> int:
        return len(text.render([Message(Role.USER, message)], reply=True).tokens)

    return await Wording.measure(count)


def adapters(folder: Path, prepared: Prepared, plan: Plan, users: int) -> tuple[Path, ...]:
    """The users' adapters as PEFT folders: those of persona/app_bench.py, by the same seeds."""
    shape = Shape.read(prepared.folder)
    made = []
    for user in range(users):
        stored, exported = folder / "stored" / str(user), folder / "peft" / str(user)
        stored.mkdir(parents=True)
        random_adapter.write(stored, shape, prepared.base, plan, user)
        peft_folder.write(stored, exported, prepared)
        made.append(exported)
    return tuple(made)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
