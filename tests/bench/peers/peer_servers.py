"""Peers that are servers of their own with OpenAI's API: programs that the machine has to have."""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import aiohttp
from peer import Setup, free_port

from persona.workload import Request, Workload

_START = 600  # seconds that loading may take


class Server:
    """A child process; everybody asks it at once."""

    environment: ClassVar[dict[str, str]] = {}

    async def start(self, setup: Setup) -> None:
        self._setup, self._url = setup, f"http://127.0.0.1:{(port := free_port())}"
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        command = await self.command(port)
        with (setup.folder / f"{type(self).__name__}.log").open("wb") as log:
            environment = os.environ | self.environment
            self._process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=environment)
        async with asyncio.timeout(_START):
            while not await self._healthy():
                assert self._process.returncode is None, "the server ended while it was loading"
                await asyncio.sleep(1)

    async def command(self, port: int) -> list[str]:
        """The command line; whatever it needs first is made here."""
        raise NotImplementedError

    def body(self, request: Request) -> dict[str, Any]:
        """What names the adapter of the request's user."""
        raise NotImplementedError

    async def run(self, requests: Sequence[Request], workload: Workload) -> list[int]:
        return list(await asyncio.gather(*(self._ask(request) for request in requests)))

    async def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        await self._process.wait()
        await self._session.close()

    async def _ask(self, request: Request) -> int:
        body = {
            "messages": [{"role": "user", "content": self._setup.prompt(request)}],
            "max_tokens": request.reply,
            "temperature": 0,
            "ignore_eos": True,
            **self.body(request),
        }
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as answer:
            answer.raise_for_status()
            return int((await answer.json())["usage"]["completion_tokens"])

    async def _healthy(self) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            async with self._session.get(f"{self._url}/health") as answer:
                return answer.status == 200
        return False


class LlamaCpp(Server):
    """llama.cpp's `llama-server` (tools/server/README.md).

    Adapters are converted by its `convert_lora_to_gguf.py`, loaded with --lora and switched off at the start; the field
    `lora` of a request switches one on. Requests with other adapters are not batched together: it serves them in turn.
    """

    name = "llama.cpp"

    def __init__(self, server: str, convert: str, python: str) -> None:
        self._server, self._convert, self._python = server, convert, python

    async def command(self, port: int) -> list[str]:
        setup = self._setup
        assert setup.gguf is not None, "llama.cpp needs the base as a GGUF file"
        files = [str(setup.folder / f"{user}.gguf") for user in range(setup.users)]
        for folder, file in zip(setup.peft, files, strict=True):
            words = (self._convert, "--base", str(setup.checkpoint), "--outfile", file, str(folder))
            process = await asyncio.create_subprocess_exec(self._python, *words)
            assert await process.wait() == 0, "the adapter was not converted"
        context = setup.users * (setup.workload.prompt.high + setup.workload.reply.high + 16)
        words = [self._server, "--model", str(setup.gguf), "--port", str(port), "--lora-init-without-apply"]
        words += ["--parallel", str(setup.users), "--ctx-size", str(context)]
        words += ["--threads", str(setup.settings.engine.threads or -1)]
        return [*words, *(word for file in files for word in ("--lora", file))]

    def body(self, request: Request) -> dict[str, Any]:
        return {"model": "base", "lora": [{"id": request.user, "scale": 1.0}]}


class Vllm(Server):
    """`vllm serve` of an environment of its own, on the CPU (docs.vllm.ai, «LoRA Adapters»).

    Every adapter is registered under a name, which requests give as their model.
    """

    name = "vllm"
    environment: ClassVar[dict[str, str]] = {"VLLM_CPU_KVCACHE_SPACE": "2"}  # GiB

    def __init__(self, program: str, dtype: str) -> None:
        self._program, self._dtype = program, dtype

    async def command(self, port: int) -> list[str]:
        setup = self._setup
        rank = next(rank for rank in (8, 16, 32, 64) if rank >= setup.plan.rank)  # ranks that it knows
        words = [self._program, "serve", str(setup.checkpoint), "--port", str(port), "--dtype", self._dtype]
        words += ["--enable-lora", "--max-loras", str(setup.users), "--max-lora-rank", str(rank)]
        words += ["--max-num-seqs", str(setup.users), "--max-model-len", "4096"]
        return [*words, "--lora-modules", *(f"user-{user}={folder}" for user, folder in enumerate(setup.peft))]

    def body(self, request: Request) -> dict[str, Any]:
        return {"model": f"user-{request.user}"}
