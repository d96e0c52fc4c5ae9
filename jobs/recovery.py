"""What a hard stop, or a full disk, left of the runs: before the next begins, each goes on, or has ended, and says so.

A run waits in the queue again and goes on from its checkpoint, if it still has one. One whose version serves already
was kept; one under which the service stops again and again may be the cause, and ends as interrupted.
"""

from collections import Counter
from collections.abc import Mapping
from datetime import datetime

import structlog

from persona.domain import Run, RunState, Version, VersionState
from storage.adapters import Adapters
from storage.runs import Runs

log = structlog.get_logger()

HARD_STOPS = 3  # of the service under one run, before the run is given up
WAITS = "The service stopped under this run; it is taken up again."
_GIVEN_UP = f"The service stopped under this run more than {HARD_STOPS} times; the serving version is unchanged."
_KEPT = "The service stopped when the new version had begun to serve."
_UNSTORED = "What came of this run could not be stored; it is taken up again."
_KEPT_UNSTORED = "The new version serves; what else came of this run could not be stored."


async def recover(runs: Runs, adapters: Adapters, now: datetime, *, stopped: bool = True) -> Mapping[RunState, int]:
    """Put every run right that is called running and is not: how many there are now in which state.

    stopped: the service was, and each run counts it; else it only could not store how its run ended.
    """
    running = await runs.running()
    found = Counter([(await _right(runs, adapters, run, now, stopped)).state for run in running])
    if found:
        event = "runs after a stop" if stopped else "runs whose end was not stored"
        log.warning(event, **{state.value: count for state, count in found.items()})
    return found


async def _right(runs: Runs, adapters: Adapters, run: Run, now: datetime, stopped: bool) -> Run:
    if (version := await _served(adapters, run)) is not None:
        metrics, reason = {**run.metrics, "base": version.base}, _KEPT if stopped else _KEPT_UNSTORED
        ended = await runs.end(run.id, RunState.KEPT, reason, now, version=version.number, metrics=metrics)
    elif not stopped:
        return await runs.requeue(run.id, _UNSTORED)
    elif run.metrics.get("hard_stops", 0) < HARD_STOPS:
        return await runs.requeue(run.id, WAITS, hard=True)
    else:
        ended = await runs.end(run.id, RunState.INTERRUPTED, _GIVEN_UP, now, metrics=run.metrics)
    await adapters.drop_checkpoint(run.user_id, run.id)
    return ended


async def _served(adapters: Adapters, run: Run) -> Version | None:
    """The version of this run that was put into service."""
    versions = await adapters.list(run.user_id)
    return next((v for v in versions if v.run_id == run.id and v.state is VersionState.PUBLISHED), None)
