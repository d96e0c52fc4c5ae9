"""What leads into the engine's loop and out of it: answers, requests, and loads.

Requests and loads come by threads of their own. Both ring one bell, on which a loop that has nothing to do waits; so it
never looks in vain, and while it computes, what the next step needs is on its way.
"""

import os
import queue
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from persona.engine import protocol, weights


class Outbox:
    """Answers to the service."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def __call__(self, reply: protocol.Reply) -> None:
        self._connection.sendall(protocol.pack(reply))


class Loader:
    """A thread that loads adapters beside the steps, and wakes the loop when it has."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=weights.on_one_core)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)

    def __call__(self, work: Callable[[], None]) -> None:
        def load() -> None:
            work()
            os.eventfd_write(self.bell, 1)

        self._thread.submit(load)


class Inbox:
    """Requests from the service. A thread takes them in, so that what they need is loaded while a step computes."""

    def __init__(self, connection: socket.socket, bell: int, expect: Callable[[protocol.Request], None]) -> None:
        """bell: becomes readable when the loop has something to do · expect: is told of each request, by the thread."""
        self._connection, self._bell, self._expect = connection, bell, expect
        self._arrived: queue.SimpleQueue[protocol.Request | None] = queue.SimpleQueue()
        threading.Thread(target=self._take_in, name="inbox", daemon=True).start()

    def read(self, *, wait: bool) -> list[protocol.Request]:
        """What has arrived; with `wait`, not before something has or the bell rang. Raises EOFError when the service
        is gone."""
        if select.select([self._bell], [], [], None if wait else 0)[0]:
            os.eventfd_read(self._bell)
        found = []
        while not self._arrived.empty():
            if (request := self._arrived.get()) is None:
                raise EOFError
            found.append(request)
        return found

    def _take_in(self) -> None:
        try:
            for request in self._requests():
                self._tell(request)
                self._expect(request)
        finally:
            self._tell(None)

    def _tell(self, request: protocol.Request | None) -> None:
        self._arrived.put(request)
        os.eventfd_write(self._bell, 1)

    def _requests(self) -> Iterator[protocol.Request]:
        """Until the service is gone."""
        buffer = bytearray()
        while received := self._received():
            buffer += received
            while len(buffer) >= 4 and len(buffer) >= 4 + (size := int.from_bytes(buffer[:4], "big")):
                body = bytes(buffer[4 : 4 + size])
                del buffer[: 4 + size]
                yield protocol.requests.decode(body)

    def _received(self) -> bytes:
        try:
            return self._connection.recv(1 << 20)
        except ConnectionError:
            return b""
