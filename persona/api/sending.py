"""Writes that have a deadline.

A client that stops reading is cut off, so that it cannot hold memory, a file or the reply that it does not read.
"""

import asyncio

from aiohttp import web


class Outlet:
    """The writing end of one response. Its writes raise ConnectionResetError once the client has not read for long."""

    def __init__(self, request: web.Request, response: web.StreamResponse, seconds: float) -> None:
        self._request = request
        self._response = response
        self._seconds = seconds

    async def open(self) -> None:
        """Send the status and the headers; after that nothing can become a status code any more."""
        await self._response.prepare(self._request)

    async def write(self, content: bytes) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._response.write(content)
        except TimeoutError:
            raise self._cut() from None

    async def close(self) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._response.write_eof()
        except TimeoutError:
            raise self._cut() from None

    def _cut(self) -> ConnectionResetError:
        if self._request.transport is not None:
            self._request.transport.abort()
        return ConnectionResetError("the client does not read")
