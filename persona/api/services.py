"""What the routes work with: built once by the composition root, found in the application under one key.

Protocols stand where the concrete class lives beside this package, so that imports only point down.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from aiohttp import web

from jobs.finetune import Finetune
from jobs.live import LiveCheck
from persona.api.metrics import Metrics
from persona.chat import Chat
from persona.domain import Caller, ChatTokenizer, Run, UserId
from persona.engine.faces import Engine
from persona.engine.prepare import Prepared
from persona.events import Intake
from persona.pulse import Pulse
from persona.settings import Settings
from storage.adapters import Adapters
from storage.backup import Backups
from storage.database import Database
from storage.events import Events
from storage.history import History
from storage.runs import Runs
from storage.users import Users

# Of a part whose trouble degrades the service without stopping chat: (name, what is wrong or None).
Check = Callable[[], tuple[str, str | None]]


class Training(Protocol):
    """The scheduler, as far as the routes use it."""

    def wake(self) -> None:
        """Look at the queue of runs now."""
        ...

    async def wait(self, user_id: UserId, run_id: int) -> Run:
        """The run, once it has ended."""
        ...

    async def cancel(self, user_id: UserId) -> None:
        """End the user's run and live check, if one is under way, and wait until they have ended."""
        ...

    async def cancel_run(self, user_id: UserId) -> bool:
        """End the user's run, if one is under way, and wait until it has ended. Whether there was one."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """Everything a route may need. `base` is the hash of the engine's weights."""

    settings: Settings
    database: Database
    users: Users
    history: History
    adapters: Adapters
    runs: Runs
    events: Events
    intake: Intake
    backups: Backups
    engine: Engine
    tokenizer: ChatTokenizer
    chat: Chat
    finetune: Finetune
    live: LiveCheck
    schedule: Training
    clock: Callable[[], datetime]
    base: Callable[[], str]
    metrics: Metrics
    prepared: Prepared | None  # the base's folder; None where the engine keeps it to itself
    pulse: Pulse
    checks: list[Check] = field(default_factory=list)


SERVICES: web.AppKey[Services] = web.AppKey("services")
CALLER: web.RequestKey[Caller] = web.RequestKey("caller")


def services(request: web.Request) -> Services:
    return request.app[SERVICES]


def caller(request: web.Request) -> Caller:
    """Who asks: the middleware put it there, or the request never came this far."""
    return request[CALLER]
