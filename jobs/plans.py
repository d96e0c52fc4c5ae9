"""From settings to what the trainer is told: the form of an adapter, how it is trained, and what it starts from."""

import hashlib
from pathlib import Path

from persona.engine import adapter_file
from persona.engine.protocol import AdapterRef, Plan
from persona.errors import ConfigurationError
from persona.settings import Learning
from storage import files

NOBODY = 0  # user id of a prior


def plan(learning: Learning, passes: int, start: AdapterRef | None = None) -> Plan:
    """How the settings want a run of so many passes from `start`, or from nothing."""
    from_prior = start is not None and start.user_id == NOBODY
    return Plan(
        rank=learning.rank,
        alpha=learning.alpha,
        layers=learning.layers,
        passes=passes,
        batch_tokens=learning.batch_tokens,
        least_steps=learning.least_steps,
        slice_tokens=learning.slice_tokens,
        learning_rate=learning.prior_rate if from_prior else learning.learning_rate,
        max_tokens=learning.max_run_tokens,
    )


def shape(plan: Plan) -> list[float]:
    """What two versions must share so that one can go on from the other."""
    return [plan.rank, plan.alpha, plan.layers, plan.seed]


def prior(learning: Learning) -> AdapterRef | None:
    """The adapter from which users start. Raises ConfigurationError if its folder holds none."""
    return folder(Path(learning.prior)) if learning.prior else None


def folder(path: Path) -> AdapterRef:
    """An adapter that is nobody's version. Raises ConfigurationError if the folder holds none."""
    return AdapterRef(NOBODY, 0, str(path.absolute()), hashlib.sha256(_read(path)).hexdigest())


def copy(adapter: AdapterRef, folder: Path) -> None:
    """Put the file of `adapter` into `folder`. Raises ConfigurationError if that is gone or changed, StorageFull."""
    found = _read(Path(adapter.path))
    if hashlib.sha256(found).hexdigest() != adapter.sha256:
        raise ConfigurationError(f"The prior {adapter.path} was changed; start the service again.")
    with files.full_disk():
        (folder / adapter_file.FILE).write_bytes(found)


def _read(folder: Path) -> bytes:
    try:
        return (folder / adapter_file.FILE).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"The prior {folder / adapter_file.FILE} cannot be read: {error.strerror}.") from None
