"""How many versions stay on disk: the newest published ones, as far back as a user may roll back.

The serving version always stays. A version that cannot be removed today is removed after the next run.
"""

import structlog

from persona.domain import User
from persona.errors import PersonaError
from storage.adapters import Adapters

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
