"""From settings to what the trainer is told: the form of an adapter, how it is trained, and what it starts from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from persona.engine import adapter_file
from persona.engine.protocol import AdapterRef, Example, Plan
from persona.errors import AdapterError, ConfigurationError
from persona.settings import Learning
from storage import files

NOBODY = 0  # user id of a prior
SHORT = 32  # own words of a message; the settings' rates are for messages of at most so many


def plan(
    learning: Learning, passes: int, start: AdapterRef | None = None, own: Sequence[Example] = (), *, seed: int = 0
) -> Plan:
    """How the settings want a run of so many passes over `own` from `start`, or from nothing."""
    rate = learning.learning_rate if start is None else learning.warm_rate
    return Plan(
        rank=learning.rank,
        alpha=learning.alpha,
        layers=learning.layers,
        seed=seed,
        passes=passes,
        batch_tokens=learning.batch_tokens,
        least_steps=learning.least_steps,
        slice_tokens=learning.slice_tokens,
        learning_rate=rate * pace(own),
        max_tokens=learning.max_run_tokens,
    )


def pace(own: Sequence[Example]) -> float:
    """Of a rate, for examples of such length: the longer a message, the fewer of them in an optimizer step.

    Words of one message say much the same of the direction to go, so that a step's noise is that of so many messages;
    an adaptive optimizer's rate goes with their root (Malladi and others, 2022, arXiv:2205.10287).
    """
    words = sum(len(example.targets) for example in own)
    return min(1.0, (SHORT * len(own) / words) ** 0.5) if words else 1.0


def shape(plan: Plan) -> list[float]:
    """What two versions must share so that one can go on from the other."""
    return [plan.rank, plan.alpha, plan.layers, plan.seed]


def prior(learning: Learning) -> AdapterRef | None:
    """The adapter from which users start. Raises ConfigurationError if its folder holds none."""
    return folder(Path(learning.prior)) if learning.prior else None


def check_prior(learning: Learning, base: str) -> None:
    """Raises ConfigurationError if users cannot start from the prior on this base, in the form of their adapters."""
    if not learning.prior:
        return
    what = f"The prior {Path(learning.prior) / adapter_file.FILE}"
    try:
        header = adapter_file.parse(_read(Path(learning.prior))).header
    except AdapterError as error:
        raise ConfigurationError(f"{what} cannot be used: {error.message}") from None
    if header.base != base:
        do = "make one for this base (persona prior train), or leave learning.prior empty"
        raise ConfigurationError(f"{what} was trained on another base: {do}.")
    layers = max(1, round(learning.layers * (header.first + header.layers)))
    if (header.form, header.rank, header.alpha, header.layers) != ("sparse", learning.rank, learning.alpha, layers):
        do = "set learning.rank, alpha and layers to what it was trained with, or make another (persona prior train)"
        raise ConfigurationError(f"{what} has another form than users' adapters: {do}.")


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
