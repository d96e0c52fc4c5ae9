"""A running service, and the ways in which tests talk to it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import ollama
import openai

from persona import app
from persona.api.services import Services
from persona.domain import User
from persona.engine.scripted import ScriptedEngine


@dataclass
class Live:
    """A running service and the ways to talk to it."""

    house: app.House
    engine: ScriptedEngine
    admin: aiohttp.ClientSession
    http: aiohttp.ClientSession
    stack: AsyncExitStack
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.house.url

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def services(self) -> Services:
        return self.house.services

    async def key(self, name: str = "ann", *, learn: bool = True) -> str:
        """The key of a user, who is made at the first call."""
        if name not in self.keys:
            answer = await self.admin.post("/admin/users", json={"name": name, "learn": learn})
            assert answer.status == 201, await answer.text()
            self.keys[name] = (await answer.json())["key"]
        return self.keys[name]

    async def user(self, name: str = "ann") -> User:
        await self.key(name)
        user = await self.services.users.get(name)
        assert user is not None
        return user

    async def openai(self, name: str = "ann", **options: Any) -> openai.AsyncOpenAI:
        """The official client, as that user; it does not retry unless told."""
        options = {"max_retries": 0, **options}
        client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=await self.key(name), **options)
        self.stack.push_async_callback(client.close)
        return client

    async def ollama(self, name: str = "ann", **options: Any) -> ollama.AsyncClient:
        """The official client, as that user."""
        headers = {"Authorization": f"Bearer {await self.key(name)}"}
        client = ollama.AsyncClient(self.url, **{"headers": headers, **options})
        self.stack.push_async_callback(client.close)
        return client

    async def call(self, method: str, path: str, *, user: str | None = "ann", status: int = 200, **options: Any) -> Any:
        """The decoded answer; its status has to be `status`."""
        headers = dict(options.pop("headers", {}))
        if user is not None:
            headers["Authorization"] = f"Bearer {await self.key(user)}"
        async with self.http.request(method, path, headers=headers, **options) as answer:
            assert answer.status == status, (answer.status, await answer.text())
            return await answer.json(content_type=None)

    async def say(self, text: str, *, user: str = "ann", status: int = 200, **body: Any) -> Any:
        """One chat request with one message, or with `messages`."""
        body = {"model": "persona", "messages": [{"role": "user", "content": text}], **body}
        return await self.call("POST", "/v1/chat/completions", user=user, status=status, json=body)

    async def history(self, user: str = "ann") -> list[tuple[str, str]]:
        """What is stored, as (role, text)."""
        page = await self.call("GET", "/v1/me/history?limit=1000", user=user)
        return [(entry["role"], entry["text"]) for entry in page["data"]]

    async def publish(self, name: str = "ann", content: bytes = b"weights", watermark: int | None = None) -> int:
        """Give a user a serving version with that file, as if a run had been kept; its number."""
        user, services = await self.user(name), self.services
        folder = await services.adapters.workspace(user.id)
        Path(folder, "adapter.safetensors").write_bytes(content)
        mark = await services.history.last_id(user.id) if watermark is None else watermark
        version = await services.adapters.publish(
            user.id,
            folder,
            watermark=mark,  # type: ignore[arg-type]
            parent=None,
            base=services.base(),
            run_id=None,
            metrics={},
            plan={},
        )
        await services.adapters.point(user.id, version.number)
        return version.number


Start = Callable[..., Awaitable[Live]]


async def connected(live: Live) -> Live:
    """The service, once it has its broker."""
    assert live.house.mqtt is not None
    async with asyncio.timeout(20):
        while not live.house.mqtt.connected:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return live
