"""Back to an earlier version, by its user's hand or by the live check: stage → commit the pointer → flip.

The engine loads and verifies the version first; a failure before the commit leaves what served serving.
"""

import structlog

from persona.domain import UserId, Version, VersionState
from persona.engine.faces import Versions
from persona.engine.protocol import ref
from persona.errors import AdapterError, PersonaError
from storage.adapters import Adapters, Leaving

log = structlog.get_logger()


def can_serve(version: Version, base: str) -> bool:
    """Whether it is published and of that base."""
    return version.state is VersionState.PUBLISHED and version.base == base


async def go_back(
    engine: Versions, adapters: Adapters, user_id: UserId, target: Version | None, *, leaving: Leaving | None = None
) -> None:
    """Let `target` serve, or the bare base; `leaving` says which version has to serve until then, and its fault.

    Raises AdapterError if the file of `target` is damaged (it is quarantined then), Busy if the engine cannot stage
    now, NotFound if `target` cannot serve any more or `leaving` does not.
    """
    if target is not None:
        await stage(engine, adapters, target)
    await adapters.rollback(user_id, target.number if target else 0, leaving=leaving)
    if target is not None:
        await flip(engine, target)


async def stage(engine: Versions, adapters: Adapters, version: Version) -> None:
    """Have the engine load and verify it. Raises AdapterError after it was quarantined."""
    try:
        await engine.stage(ref(version))
    except AdapterError:
        await adapters.quarantine(version.user_id, version.number, "The engine refused its file.")
        raise


async def flip(engine: Versions, version: Version) -> None:
    """Tell the engine what the pointer says already. One that misses it loads the version with the next request."""
    try:
        await engine.flip(ref(version))
    except PersonaError as error:
        log.warning("flip failed", user_id=version.user_id, version=version.number, kind=type(error).__name__)
