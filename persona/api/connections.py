"""The listening TCP address: how many connections it holds, and how long one may do nothing.

One connection too many, of all or of one address, gets a short 503 instead of a place. The kernel drops a peer that
takes no data for `write_seconds`; a header that does not end is cut by the keep-alive deadline.
"""

import asyncio
import errno
import json
import socket
from collections.abc import Callable
from ipaddress import IPv4Address, ip_address
from typing import Any, cast

from aiohttp import web

from persona.errors import ConfigurationError
from persona.settings import Http

_SHARE = 4  # one address has at most the fourth part of the connections
_HEAD = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    "Content-Length: {}\r\n\r\n"
)


class Door(asyncio.Protocol):
    """Stands before a connection until it is known where that comes from."""

    def __init__(self, admit: Callable[[Any], asyncio.BaseProtocol]) -> None:
        self._admit = admit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        inside = self._admit(transport.get_extra_info("peername"))
        transport.set_protocol(inside)
        inside.connection_made(transport)


class Full(asyncio.Protocol):
    """Answers a connection for which there is no place."""

    def __init__(self, sentence: str) -> None:
        self._error = {"message": sentence, "type": "server_error", "param": None, "code": "busy"}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        out = cast(asyncio.Transport, transport)
        body = json.dumps({"error": self._error})
        out.write((_HEAD.format(len(body)) + body).encode())
        out.close()


async def check(http: Http) -> None:
    """Raises ConfigurationError if the address cannot be listened on."""
    try:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, http.host, http.port)
    except OSError as error:
        raise ConfigurationError(_reason(http, error)) from None
    server.close()
    await server.wait_closed()


class BoundedSite(web.BaseSite):
    """A TCP address with a cap on connections: the one of the settings, or that of a socket which listens already.

    Raises ConfigurationError if it cannot listen there.
    """

    def __init__(self, runner: web.BaseRunner, http: Http, listening: socket.socket | None = None) -> None:
        super().__init__(runner)
        self._http = http
        self._given = listening
        self._households: dict[asyncio.BaseProtocol, str | None] = {}  # by connection
        self.host, self.port = http.host, http.port
        if listening is not None:
            self.host, self.port = listening.getsockname()[:2]

    @property
    def name(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        await super().start()
        loop = asyncio.get_running_loop()
        try:
            if self._given is not None:
                self._server = await loop.create_server(self._door, sock=self._given, backlog=128)
            else:
                self._server = await loop.create_server(self._door, self._http.host, self._http.port, backlog=128)
        except OSError as error:
            raise ConfigurationError(_reason(self._http, error)) from None
        for listening in self._server.sockets:
            self._limit_silence(listening)
            self.port = listening.getsockname()[1]

    def _door(self) -> Door:
        return Door(self._admit)

    def _admit(self, peer: Any) -> asyncio.BaseProtocol:
        server = self._runner.server
        assert server is not None  # BaseSite.start refuses a runner that is not set up
        held = server.connections  # one whose client has gone holds its place until its handler ends
        self._households = {one: self._households[one] for one in held if one in self._households}
        home, most = household(peer), self._http.connections
        if len(held) >= most:
            return Full("Too many connections.")
        if home is not None and list(self._households.values()).count(home) >= max(1, most // _SHARE):
            return Full("Too many connections from this address.")
        inside = server()
        self._households[inside] = home
        return inside

    def _limit_silence(self, listening: socket.socket) -> None:
        """Accepted sockets inherit it. Linux only; elsewhere the deadlines of our own writes remain."""
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._http.write_seconds * 1000))


def household(peer: Any) -> str | None:
    """Whose connection that is: an IPv4 address, or the /64 of an IPv6 one. None for this machine's own, on which a
    proxy may bring everybody's.

    peer: as a socket names its other end.
    """
    if not isinstance(peer, tuple):  # no TCP
        return None
    address = ip_address(peer[0].partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address  # of a socket that serves both
    if address.is_loopback:
        return None
    return str(address) if isinstance(address, IPv4Address) else str(int(address) >> 64)


def _reason(http: Http, error: OSError) -> str:
    place = f"{http.host} port {http.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{place} is taken by another program; stop it or set http.port."
    return f"Cannot listen on {place} ({error.strerror}); check http.host and http.port."
