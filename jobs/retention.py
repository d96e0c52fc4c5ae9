"""What stays on disk and for how long: versions as far back as a user may roll back, receipts of events for some days.

The serving version always stays. A version that cannot be removed today is removed after the next run.
"""

from datetime import datetime, timedelta

import structlog

from persona.domain import User
from persona.errors import PersonaError
from storage.adapters import Adapters
from storage.events import Events

log = structlog.get_logger()


async def prune(adapters: Adapters, user: User, keep: int) -> None:
    """Remove published versions beyond the newest `keep`. A failure is logged: the run before it has succeeded."""
    try:
        removed = await adapters.prune(user.id, keep)
    except (OSError, PersonaError) as error:
        log.warning("old versions could not be removed", user=user.name, error=type(error).__name__)
        return
    if removed:
        log.info("old versions removed", user=user.name, versions=list(removed))


async def tidy(events: Events, now: datetime, keep: timedelta) -> None:
    """Remove receipts of events and dead letters older than `keep`. What became an entry or a fact stays."""
    if removed := await events.prune(now, keep):
        log.info("old receipts and dead letters removed", rows=removed)
