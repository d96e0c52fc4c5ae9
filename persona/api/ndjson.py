"""A stream of JSON objects, one a line, as Ollama's clients read it."""

from typing import Any

import msgspec
from aiohttp import web

from persona.api.sending import Outlet

_encoder = msgspec.json.Encoder()


class LineStream:
    """One response of lines: `open`, then `send`, at the end `close`. It has no comments: silence is an empty part."""

    def __init__(self, request: web.Request, headers: dict[str, str], write_seconds: float) -> None:
        self.response = web.StreamResponse(headers=headers)
        self.response.content_type = "application/x-ndjson"
        self.response.headers["cache-control"] = "no-store"
        self.response.headers["x-accel-buffering"] = "no"  # proxies that would collect the whole reply first
        self._outlet = Outlet(request, self.response, write_seconds)

    async def open(self) -> None:
        await self._outlet.open()

    async def send(self, line: dict[str, Any]) -> None:
        await self._outlet.write(_encoder.encode(line) + b"\n")

    async def close(self) -> None:
        await self._outlet.close()
