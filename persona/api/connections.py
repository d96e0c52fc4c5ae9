"""The listening TCP address: how many connections it holds, and how long one may do nothing.

One connection too many gets a short 503 instead of a place. The kernel drops a peer that takes no data for
`write_seconds`; a header that does not end is cut by the keep-alive deadline.
"""

import asyncio
import errno
import socket
from typing import cast

from aiohttp import web

from persona.errors import ConfigurationError
from persona.settings import Http

_FULL_BODY = b'{"error":{"message":"Too many connections.","type":"server_error","param":null,"code":"busy"}}'
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: " + str(len(_FULL_BODY)).encode() + b"\r\n\r\n" + _FULL_BODY
)


class Full(asyncio.Protocol):
    """Answers a connection for which there is no place."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        out = cast(asyncio.Transport, transport)
        out.write(_FULL)
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
                self._server = await loop.create_server(self._admit, sock=self._given, backlog=128)
            else:
                self._server = await loop.create_server(self._admit, self._http.host, self._http.port, backlog=128)
        except OSError as error:
            raise ConfigurationError(_reason(self._http, error)) from None
        for listening in self._server.sockets:
            self._limit_silence(listening)
            self.port = listening.getsockname()[1]

    def _admit(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        assert server is not None  # BaseSite.start refuses a runner that is not set up
        return server() if len(server.connections) < self._http.connections else Full()

    def _limit_silence(self, listening: socket.socket) -> None:
        """Accepted sockets inherit it. Linux only; elsewhere the deadlines of our own writes remain."""
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._http.write_seconds * 1000))


def _reason(http: Http, error: OSError) -> str:
    place = f"{http.host} port {http.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{place} is taken by another program; stop it or set http.port."
    return f"Cannot listen on {place} ({error.strerror}); check http.host and http.port."
