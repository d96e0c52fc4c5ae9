"""The command line's way to the running service: HTTP over its admin socket.

Whoever can open the socket is an administrator, so no key is needed; `user` names whose data is meant. Every failure
becomes one sentence in a PersonaError.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from persona.errors import Busy, ConfigurationError, NotFound, PersonaError
from persona.settings import Settings


class NotRunning(ConfigurationError):
    """Nobody listens on the admin socket."""

    code = "not_running"


@dataclass(frozen=True, slots=True)
class Link:
    """Speaks to the service of these settings, on behalf of `user` where a route is about one."""

    settings: Settings
    user: str | None = None

    def ask(self, method: str, path: str, **options: Any) -> Any:
        """The decoded JSON body of the answer. Raises NotRunning, or PersonaError with the service's sentence."""
        return asyncio.run(self.call(method, path, **options))

    async def call(self, method: str, path: str, **options: Any) -> Any:
        """As `ask`, for those who run in a loop already."""
        async with self.open(method, path, **options) as answer:
            return await decoded(answer)

    @asynccontextmanager
    async def open(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A successful answer whose body is still to be read."""
        connector = aiohttp.UnixConnector(path=str(self.settings.admin_socket))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        try:
            async with (
                aiohttp.ClientSession("http://persona", connector=connector, timeout=timeout) as session,
                session.request(method, path, headers={**self._headers(), **(headers or {})}, **options) as answer,
            ):
                await refuse(answer)
                yield answer
        except (aiohttp.ClientConnectorError, FileNotFoundError) as error:
            raise self._not_running(error) from None
        except aiohttp.ClientError:
            raise PersonaError("The service ended before it answered; its log says why.") from None

    def _headers(self) -> dict[str, str]:
        if self.user is None:
            return {}
        if not (self.user.isascii() and self.user.isprintable()):
            raise NotFound("There is no user of that name; `persona users list` shows all.")
        return {"x-persona-user": self.user}

    def _not_running(self, error: Exception) -> PersonaError:
        socket = self.settings.admin_socket
        if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, PermissionError):
            return PersonaError(f"This account may not open {socket}; use the account that persona runs as.")
        return NotRunning(
            f"persona is not running in {self.settings.home}: start it with `persona serve`, "
            "or name its folder with PERSONA_HOME."
        )


def seen(folder: Path) -> list[int] | None:
    """Which folder this is, on whatever path the service may have it."""
    try:
        about = folder.stat()
    except OSError:
        return None  # the service says what is wrong with it
    return [about.st_dev, about.st_ino]


async def refuse(answer: aiohttp.ClientResponse) -> None:
    """Raise the service's own sentence when it answered with an error."""
    if answer.status < 400:
        return
    try:
        error = (await answer.json(content_type=None))["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise PersonaError(f"The service answered {answer.status} without a reason; its log says why.") from None
    if answer.status in (429, 503):
        raise Busy(message, status=answer.status, code=code)
    raise PersonaError(message, code=code)


async def decoded(answer: aiohttp.ClientResponse) -> Any:
    """The answer's JSON. Raises PersonaError if it is none."""
    try:
        return await answer.json(content_type=None)
    except ValueError:
        raise PersonaError("The service's answer was not JSON; is it another version of persona?") from None


async def events(answer: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream, up to `[DONE]`. Raises PersonaError for an error event."""
    async for line in answer.content:
        data = line.decode().removeprefix("data:").strip()
        if not line.startswith(b"data:") or not data:
            continue
        if data == "[DONE]":
            return
        event: dict[str, Any] = json.loads(data)
        if isinstance(error := event.get("error"), dict):
            raise PersonaError(str(error.get("message")), code=error.get("code"))
        yield event
