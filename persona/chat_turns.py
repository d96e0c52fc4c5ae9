"""One at a time, and of several users not the same one twice in a row: however much one of them brings, the next
turn is another's who waits.
"""

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator


class Turns:
    """Of one user whoever came first is first; users are served in the order in which they began to wait."""

    def __init__(self) -> None:
        self._taken = False
        self._last = 0  # the user whose turn it is, or was
        self._waiting: OrderedDict[int, deque[asyncio.Future[None]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def of(self, user_id: int) -> AsyncIterator[None]:
        """A turn of that user, which ends with the block."""
        if self._taken:
            await self._wait(user_id)
        self._taken, self._last = True, user_id
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, user_id: int) -> None:
        """Until the turn is handed over: nobody else can take it meanwhile."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(user_id, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._remove(user_id, turn)
            else:  # it was ours already
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        self._taken = bool(self._waiting)
        if self._waiting:
            user_id = next((one for one in self._waiting if one != self._last), self._last)
            turn = self._waiting[user_id][0]
            self._waiting.move_to_end(user_id)
            self._remove(user_id, turn)
            turn.set_result(None)

    def _remove(self, user_id: int, turn: asyncio.Future[None]) -> None:
        self._waiting[user_id].remove(turn)
        if not self._waiting[user_id]:
            del self._waiting[user_id]
