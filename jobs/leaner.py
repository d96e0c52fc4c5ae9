"""A training for which memory runs out starts anew in slices of half the size, and is put off when even small ones
do not fit: nothing is wrong with its text then."""

from collections.abc import Callable, Generator, Iterator

import structlog

from persona.engine import protocol
from persona.engine.protocol import Plan, Progress
from persona.engine.refusals import starved
from persona.errors import Busy

SMALLEST = 32  # tokens of a slice that are worth a try
log = structlog.get_logger("engine")


def slices(training: Callable[[Plan], Iterator[Progress | None]], plan: Plan) -> Generator[Progress | None, None, None]:
    """The slices of `training` under `plan`, or with less memory. Raises Busy when there is too little for any."""
    while True:
        try:
            yield from training(plan)
            return
        except Exception as error:
            if not starved(error):
                raise
            if plan.slice_tokens <= SMALLEST:
                raise Busy("There is no memory to train now; it is tried again later.", retry_after=60) from None
        plan = protocol.replace(plan, slice_tokens=plan.slice_tokens // 2)
        log.warning("training goes on in smaller slices: memory ran out", tokens=plan.slice_tokens)
