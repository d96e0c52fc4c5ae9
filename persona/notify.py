"""What persona and systemd say to each other: sd_notify(3) and sd_listen_fds(3), in a few lines of our own.

Where no service manager listens every word is lost without harm. A word that cannot be delivered is lost as well: the
manager draws its conclusions from silence, persona never from its own.
"""

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from persona.errors import ConfigurationError

_FIRST = 3  # the descriptor of the first socket that systemd passes (SD_LISTEN_FDS_START)
_NONSENSE = "The service manager passes a socket that persona cannot serve on: "


@dataclass(frozen=True, slots=True)
class Supervisor:
    """The service manager that started this process; without an `address` there is none."""

    address: str | None = None
    watchdog: float | None = None  # seconds of silence after which it restarts us

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """As NOTIFY_SOCKET and WATCHDOG_USEC say. Raises ConfigurationError if they are nonsense."""
        address = environ.get("NOTIFY_SOCKET") or None
        if address and address[0] not in "/@":
            raise ConfigurationError(f"NOTIFY_SOCKET is {address}: it has to be a path, or a name after @.")
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = _count(environ, "WATCHDOG_USEC") if mine else 0
        return cls(address, microseconds / 1e6 if microseconds else None)

    def tell(self, **words: str | int) -> None:
        """Send `words`, for example READY=1."""
        if self.address is None:
            return
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        message = "\n".join(f"{name}={value}" for name, value in words.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
            out.settimeout(1.0)
            out.connect(address)
            out.send(message.encode())


def inherited(environ: Mapping[str, str]) -> socket.socket | None:
    """The listening socket that systemd opened for this process; None if it passed none.

    Raises ConfigurationError unless it is exactly one listening TCP socket.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return None  # not passed at all, or meant for a parent of this process
    count = _count(environ, "LISTEN_FDS")
    if count == 0:
        return None
    if count != 1:
        raise ConfigurationError(f"{_NONSENSE}{count} in place of one; give persona.socket a single ListenStream.")
    try:
        given = socket.socket(fileno=_FIRST)
    except OSError:
        raise ConfigurationError(f"{_NONSENSE}descriptor {_FIRST} is no socket; start it through its unit.") from None
    given.set_inheritable(False)
    tcp = given.family in (socket.AF_INET, socket.AF_INET6) and given.type == socket.SOCK_STREAM
    if not tcp or not given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        given.close()
        raise ConfigurationError(f"{_NONSENSE}not a listening TCP socket; give persona.socket a ListenStream port.")
    given.setblocking(False)
    return given


def _count(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "0")
    if not (value.isascii() and value.isdigit()):
        raise ConfigurationError(f"{name} is {value!r}: it has to be a whole number, as the service manager sets it.")
    return int(value)
