"""What may come of one training, and which of it serves: at most one, and the others lose their files.

What was trained is judged first. Where the gate refuses it, half of the way there is judged: what a training costs the
assistant fades on the way back, as what it has taught does. A prior that a first version starts from has a say of its
own (docs/DECISIONS.md).
"""

import asyncio
from dataclasses import replace
from types import TracebackType
from typing import Self

import structlog

from jobs.evaluate import Gate, Verdict
from persona.domain import Version
from persona.engine.faces import Engine
from persona.engine.protocol import ref
from persona.errors import PersonaError
from storage.adapters import Adapters

log = structlog.get_logger()


class Candidates:
    """The candidates of one run, as a context: at its end, whatever is not `spared` is rejected."""

    def __init__(self, adapters: Adapters, engine: Engine, gate: Gate) -> None:
        self._adapters, self._engine, self._gate = adapters, engine, gate
        self._versions: list[Version] = []
        self._judged: list[tuple[Version, Verdict, str]] = []
        self._spared: Version | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.shield(self._reject())

    async def judge(self, candidate: Version, what: str) -> Verdict:
        """The gate's verdict on it, which `best` remembers. `what` it is, as the beginning of a sentence."""
        self._versions.append(candidate)
        await self._engine.stage(ref(candidate))
        verdict = await self._gate.verdict(candidate)
        self._judged.append((candidate, verdict, what))
        return verdict

    def best(self) -> tuple[Version, Verdict]:
        """Of those that the gate keeps the one that predicts best, else the first; the verdict says why."""
        first, verdict, _ = self._judged[0]
        kept = [one for one in self._judged if one[1].keep]
        if not kept or (best := min(kept, key=lambda one: one[1].loss_after))[0] is first:
            return first, verdict
        chosen, its, what = best
        return chosen, replace(its, reason=f"{what} serves. {its.reason} What was trained: {verdict.reason}")

    def spare(self, candidate: Version) -> None:
        self._spared = candidate

    async def _reject(self) -> None:
        for candidate in self._versions:
            if candidate is not self._spared:
                await reject(self._adapters, candidate)


async def reject(adapters: Adapters, candidate: Version) -> None:
    """Take its files away; whatever stands in the way is told and no error."""
    try:
        await adapters.reject(candidate.user_id, candidate.number)
    except PersonaError as error:  # it is no candidate any more, or the start will repair it: never serving
        log.warning("candidate could not be rejected", version=candidate.number, error=type(error).__name__)
