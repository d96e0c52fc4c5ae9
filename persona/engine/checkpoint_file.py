"""The state of a training between two optimizer steps: one safetensors file, replaced as a whole, numpy only.

It belongs to one request (examples, plan, base, start) and is taken for no other: what it says of itself and a SHA-256
of its numbers stand in its header. It is written where it is told, and nothing here makes a folder: whoever takes the
folder away has taken the state away.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.numpy import load, save

from persona.engine.adapter_file import Array
from persona.engine.protocol import TrainRequest

FILE = "checkpoint.safetensors"
_PART = FILE + ".part"
_FORM = 3  # of the file, and of how a request becomes steps: a later form goes on from no earlier one


@dataclass(frozen=True, slots=True)
class Header:
    """How far the training was, and of which request. Losses may be infinite or NaN."""

    request: str  # its fingerprint
    step: int
    loss: float  # over the latest words
    words: float  # how many those are
    first: float  # the first such loss
    tokens: int
    seconds: float
    skipped: int
    updates: int  # optimizer steps that were not skipped
    sha256: str = ""  # of the tensors, in the order of their names


@dataclass(frozen=True, slots=True)
class State:
    """A parsed file."""

    header: Header
    tensors: dict[str, Array]


def fingerprint(request: TrainRequest, base: str) -> str:
    """Names what is trained from what: everything that decides the result, and no path."""
    start = request.start.sha256 if request.start else ""
    content = msgspec.msgpack.encode((_FORM, base, start, request.plan, request.examples))
    return hashlib.sha256(content).hexdigest()


def write(folder: Path, state: State) -> Iterator[str]:
    """Put `state` in the place of what was there, in pieces of a few milliseconds; each names what is done.

    Raises OSError, and leaves no part of it then.
    """
    header = {**asdict(state.header), "sha256": _sha256(state.tensors)}
    content = save(state.tensors, metadata={"persona": json.dumps(header)})
    part = folder / _PART
    yield "made"
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            yield "written"
            os.fsync(file.fileno())
        yield "synced"
        part.replace(folder / FILE)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    yield "replaced"


def read(folder: Path, request: str) -> State | None:
    """What lies there of that request. Anything else that lies there is removed."""
    (folder / _PART).unlink(missing_ok=True)
    try:
        state = _parse((folder / FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, msgspec.ValidationError, ValueError, KeyError, TypeError, RecursionError):
        state = None
    if state is None or state.header.request != request or state.header.sha256 != _sha256(state.tensors):
        with contextlib.suppress(OSError):
            (folder / FILE).unlink()
        return None
    return state


def _parse(content: bytes) -> State:
    size = int.from_bytes(content[:8], "little")
    about = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["persona"])
    return State(msgspec.convert(about, Header), load(content))


def _sha256(tensors: dict[str, Array]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(tensors[name].tobytes())
    return total.hexdigest()
