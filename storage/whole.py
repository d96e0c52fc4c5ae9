"""Work that cancellation cannot leave half done.

The driver gives a connection up, open transaction and all, when a statement is cancelled; and a thread cannot be
stopped at all. So whoever is cancelled waits for the one step that is under way, and leaves then.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


async def whole(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which runs to its end even if the caller is cancelled; that is raised afterwards."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen: the cancellation is what is raised
        raise


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function` in a thread, to its end."""
    return await whole(asyncio.to_thread(function, *args, **kwargs))
