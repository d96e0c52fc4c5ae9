"""persona itself: the whole service, over HTTP, as `persona bench` measures it."""

from collections.abc import Sequence
from contextlib import AsyncExitStack

from peer import Setup

from persona.app_bench import populate, private_service
from persona.cli_bench_client import Limit, Run, Target
from persona.workload import Request, Workload


class Persona:
    """Every user asks at once and streams."""

    name = "persona"

    async def start(self, setup: Setup) -> None:
        self._stack = AsyncExitStack()
        house = await self._stack.enter_async_context(private_service(setup.settings, setup.prepared))
        keys, _ = await populate(house, setup.users, [setup.plan.rank], lambda done: None)
        self._target = await self._stack.enter_async_context(Target.open(house.url, keys))
        self._wording = await self._target.wording("persona", setup.workload)

    async def run(self, requests: Sequence[Request], workload: Workload) -> list[int]:
        run = Run(self._target, "persona", self._wording, workload, workload.users)
        await run.go(Limit(requests=len(requests)))
        failures = {outcome.failure for outcome in run.found.outcomes} - {""}
        assert not failures, failures
        return [outcome.tokens for outcome in run.found.outcomes]

    async def stop(self) -> None:
        await self._stack.aclose()
