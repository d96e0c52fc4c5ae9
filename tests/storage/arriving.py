"""Events as they arrive, in short words."""

import json
from datetime import UTC, datetime
from typing import Any

from persona import event
from persona.domain import User
from persona.event import Reason
from storage.events import Arrived, Events, Letter, Outcome

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
STORED, DUPLICATE, DEAD = Outcome.STORED, Outcome.DUPLICATE, Outcome.DEAD


def told(
    user: User,
    kind: str = "message",
    /,
    *,
    received: datetime = NOW,
    delivery: bytes | None = None,
    again: bool = False,
    **body: Any,
) -> Arrived:
    """`told(ann, text="hi", id=1)`: an event with that payload."""
    payload = json.dumps(body).encode()
    one = event.read(user.name, kind, payload, received, 65_536)
    return Arrived(user.id, one, user.name, payload, delivery, again)


def refused(user: User | None, reason: Reason = Reason.BAD_JSON, /, *, name: str = "", **more: Any) -> Arrived:
    """A letter that is dead on arrival."""
    values: dict[str, Any] = {"kind": "message", "source": "", "payload": b"{", "last": NOW, **more}
    detail = "The body is not valid JSON."
    whose = user.id if user else None
    letter = Letter(whose, user.name if user else name, reason=reason, detail=detail, **values)
    return Arrived(whose, letter, letter.name)


async def store(events: Events, *arrived: Arrived, now: datetime = NOW, kept: int | None = 100) -> list[Outcome]:
    return await events.store(arrived, count=len, now=now, kept=kept)
