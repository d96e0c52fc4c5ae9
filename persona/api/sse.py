"""A stream of server-sent events, as OpenAI's clients read it."""

from typing import Any

import msgspec
from aiohttp import web

from persona.api.sending import Outlet

_encoder = msgspec.json.Encoder()


class EventStream:
    """One response of events: `open`, then `send` and `ping`, at the end `done` or, after an error event, `close`."""

    def __init__(self, request: web.Request, headers: dict[str, str], write_seconds: float) -> None:
        self.response = web.StreamResponse(headers=headers)
        self.response.content_type = "text/event-stream"
        self.response.charset = "utf-8"
        self.response.headers["cache-control"] = "no-store"
        self.response.headers["x-accel-buffering"] = "no"  # proxies that would collect the whole reply first
        self._outlet = Outlet(request, self.response, write_seconds)

    async def open(self) -> None:
        await self._outlet.open()

    async def send(self, event: dict[str, Any]) -> None:
        await self._outlet.write(b"data: " + _encoder.encode(event) + b"\n\n")

    async def ping(self) -> None:
        """A comment: keeps proxies and clients from giving up during silence."""
        await self._outlet.write(b": ping\n\n")

    async def done(self) -> None:
        await self._outlet.write(b"data: [DONE]\n\n")
        await self.close()

    async def close(self) -> None:
        await self._outlet.close()
