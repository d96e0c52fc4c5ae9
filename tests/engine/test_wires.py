"""The engine's ends: requests whole and in order, however they are cut; one bell for all that wakes the loop."""

import os
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from persona.engine import protocol
from persona.engine.protocol import Ping, Request, Stage
from persona.engine.wires import Inbox, Loader

STAGE = Stage(2, protocol.AdapterRef(1, 1, "somewhere", "0" * 64))


class Ends:
    """An inbox, and the service's end of its socket."""

    def __init__(self) -> None:
        self.service, self.engine = socket.socketpair()
        self.expected: list[Request] = []
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.inbox = Inbox(self.engine, self.bell, self.expected.append)

    def read(self, count: int) -> list[Request]:
        """So many requests, as the loop reads them."""
        found: list[Request] = []
        while len(found) < count:
            found += self.inbox.read(wait=True)
        return found


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.service.close()
    for thread in threading.enumerate():
        if thread.name == "inbox":
            thread.join(30)
    made.engine.close()
    os.close(made.bell)


def test_requests_come_whole_and_in_order_however_they_are_cut(ends: Ends) -> None:
    wire = protocol.pack(Ping(1)) + protocol.pack(STAGE) + protocol.pack(Ping(3))
    for place in range(len(wire)):
        ends.service.sendall(wire[place : place + 1])
    assert ends.read(3) == [Ping(1), STAGE, Ping(3)]
    ends.service.sendall(wire * 500)
    assert ends.read(1500) == [Ping(1), STAGE, Ping(3)] * 500


def test_each_request_is_told_beforehand(ends: Ends) -> None:
    ends.service.sendall(protocol.pack(STAGE))
    give_up = time.monotonic() + 30
    while not ends.expected and time.monotonic() < give_up:
        time.sleep(0.001)  # nobody reads the inbox: the loop computes
    assert ends.expected == [STAGE]
    assert ends.inbox.read(wait=False) == [STAGE]
    assert ends.inbox.read(wait=False) == []


@pytest.mark.parametrize("rest", [b"", protocol.pack(STAGE)[:-3]])
def test_a_service_that_goes_ends_the_loop_after_what_it_asked(ends: Ends, rest: bytes) -> None:
    ends.service.sendall(protocol.pack(Ping(1)) + rest)
    assert ends.read(1) == [Ping(1)]
    ends.service.close()
    with pytest.raises(EOFError):
        ends.inbox.read(wait=True)


def test_a_request_that_cannot_be_read_ends_the_engine_which_is_started_anew(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    ends.service.sendall((3).to_bytes(4, "big") + b"???")
    with pytest.raises(EOFError):
        ends.inbox.read(wait=True)


def test_a_load_that_has_ended_rings_the_bell() -> None:
    loader, done = Loader(), list[int]()
    loader(lambda: done.append(1))
    assert select.select([loader.bell], [], [], 30)[0]
    assert done == [1]
    os.close(loader.bell)
