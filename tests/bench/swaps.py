"""Swaps under load (M7): every reply must be wholly its own version's, and none may fail.

    .venv/bin/python tests/bench/swaps.py [--flips 10000] [--users 16] [--versions 4]

The real engine process on the configured model. Each user's versions take turns, one flip after another, and behind
every fourth a request on the new version begins, whose prompt begins as the user's others do: a page of an older
version would be found if it could be. A training and short replies of the bare base go on beside them. First each reply
is computed alone, without a prefix cache; under load it has to be the same: by the compiled step, in int4, rows are
equal bit for bit whoever stands beside them. (Elsewhere a near tie may fall the other way: what counts there is that no
reply is another version's.) One JSON line: flips, replies, those that failed, those that differ, those that are what
another version says, and how much of the prompts came from the prefix cache.
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from persona.engine import device, prepare, random_adapter
from persona.engine.client import LocalEngine
from persona.engine.protocol import AdapterRef, Example, GenerateRequest, Plan, Sampling, TrainRequest
from persona.engine.shape import Shape
from persona.errors import PersonaError
from persona.settings import Settings, load

STRONG = Plan(alpha=600.0)  # so strong that each version says something else
BEGINNING, ENDINGS, REPLY = 40, 6, 6  # tokens, prompts of a user, tokens


@dataclass
class Told:
    """What happened under load."""

    flips: int = 0
    replies: int = 0
    failed: int = 0
    differ: int = 0
    anothers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = field(default_factory=lambda: -time.perf_counter())


def prompt(user: int, ending: int) -> list[int]:
    beginning = np.random.default_rng(user).integers(1000, 40000, BEGINNING)
    return [int(token) for token in [*beginning, *np.random.default_rng([user, ending]).integers(1000, 40000, 8)]]


async def reply(engine: LocalEngine, tokens: list[int], ref: AdapterRef | None, user: int) -> tuple[str, int]:
    """Greedy text, and tokens of the prompt that the cache had."""
    request = GenerateRequest(tokens, Sampling(max_tokens=REPLY, ignore_eos=True), ref, user)
    async with aclosing(engine.generate(request)) as chunks:  # type: ignore[type-var]
        told = [chunk async for chunk in chunks]
    if told[-1].finish != "length":
        raise PersonaError(told[-1].error or f"The reply ended with {told[-1].finish}.")
    return "".join(chunk.text for chunk in told), told[-1].cached


def versions(folder: Path, prepared: prepare.Prepared, user: int, count: int) -> list[AdapterRef]:
    made = []
    for number in range(1, count + 1):
        out = folder / f"{user}-{number}"
        out.mkdir()
        file = random_adapter.write(out, Shape.read(prepared.folder), prepared.base, STRONG, 1000 * user + number)
        made.append(AdapterRef(user, number, str(out), prepare.sha256(file)))
    return made


async def alone(engine: LocalEngine, refs: list[AdapterRef]) -> dict[tuple[AdapterRef, int], str]:
    """What each version says to each of its user's prompts. User 0 of a request has no prefix cache."""
    found = {}
    for ref in refs:
        for ending in range(ENDINGS):
            found[ref, ending], _ = await reply(engine, prompt(ref.user_id, ending), ref, 0)
    return found


def telling_endings(refs: list[AdapterRef], wanted: dict[tuple[AdapterRef, int], str]) -> list[int]:
    """Prompts to which each version says something else: elsewhere a mixed reply would not show."""
    found = [ending for ending in range(ENDINGS) if len({wanted[ref, ending] for ref in refs}) == len(refs)]
    assert len(found) > 1, "the versions say the same to most prompts"
    return found


async def one_user(
    engine: LocalEngine,
    refs: list[AdapterRef],
    endings: list[int],
    wanted: dict[tuple[AdapterRef, int], str],
    told: Told,
    flips: int,
) -> None:
    running: set[asyncio.Task[None]] = set()

    async def ask(ref: AdapterRef, ending: int) -> None:
        tokens = prompt(ref.user_id, ending)
        try:
            text, cached = await reply(engine, tokens, ref, ref.user_id)
        except PersonaError:
            told.failed += 1
            return
        told.replies += 1
        if text != wanted[ref, ending]:
            told.differ += 1
            told.anothers += text in {wanted[other, ending] for other in refs}
        told.prompt_tokens += len(tokens)
        told.cached_tokens += cached

    for ref, number in zip(itertools.cycle(refs), range(flips), strict=False):
        await engine.stage(ref)
        await engine.flip(ref)
        told.flips += 1
        if number % 4 == 0:
            if number % 8 == 0:
                await ask(ref, endings[number % len(endings)])  # and the next one finds its beginning
            running.add(task := asyncio.create_task(ask(ref, endings[(number + 1) % len(endings)])))
            task.add_done_callback(running.discard)
        if len(running) >= 4:  # replies of two versions and more are under way at once
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.gather(*running)


async def base_replies(engine: LocalEngine) -> None:
    for seed in itertools.count(1000):
        await reply(engine, prompt(seed, 0), None, 0)


async def train(engine: LocalEngine, out: Path) -> None:
    examples = [Example(prompt(seed, 0), list(range(24, 48))) for seed in range(4000)]
    async for _ in engine.train(TrainRequest(examples, Plan(passes=1), str(out))):
        pass


async def measure(settings: Settings, prepared: prepare.Prepared, asked: argparse.Namespace) -> Told:
    engine = LocalEngine(settings, prepared)
    await engine.start()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        users = [versions(folder, prepared, user, asked.versions) for user in range(1, asked.users + 1)]
        wanted = await alone(engine, [ref for refs in users for ref in refs])
        telling = [telling_endings(refs, wanted) for refs in users]
        beside = [asyncio.create_task(work) for work in (train(engine, folder), base_replies(engine))]
        told, share = Told(), -(-asked.flips // len(users))
        await asyncio.gather(
            *(
                one_user(engine, refs, endings, wanted, told, share)
                for refs, endings in zip(users, telling, strict=True)
            )
        )
        told.seconds += time.perf_counter()
        for task in beside:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    await engine.stop()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--versions", type=int, default=4)
    asked = parser.parse_args()
    settings = load()
    prepared = prepare.fetch(
        settings.model.name, settings.cache, device.choose(settings.model).weights, lambda _, __: None
    )
    told = asyncio.run(measure(settings, prepared, asked))
    figures = {"measure": "M7 swaps under load", "flips": told.flips, "replies": told.replies}
    figures |= {"failed": told.failed, "differ": told.differ, "anothers": told.anothers, "seconds": round(told.seconds)}
    figures |= {"cached_share": round(told.cached_tokens / max(1, told.prompt_tokens), 3)}
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
