"""One engine under contract, and adapter files that it takes or refuses."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import adapters

from persona.engine import adapter_file
from persona.engine.faces import Engine
from persona.engine.prepare import Prepared
from persona.engine.protocol import AdapterRef
from persona.engine.shape import Shape
from persona.settings import Settings


@dataclass
class House:
    """One engine, and adapter files that it takes or refuses."""

    engine: Engine
    folder: Path
    adapter: Callable[[Path, int, int], None]  # writes a good file for (user, number)
    foreign: Callable[[AdapterRef], AdapterRef]  # the same version, with content that is not its own or of this base
    users: Iterator[int]

    def ref(self, user: int, number: int = 1) -> AdapterRef:
        """A published version of that user."""
        place = self.folder / f"{user}-{number}"
        place.mkdir(parents=True, exist_ok=True)
        self.adapter(place, user, number)
        return AdapterRef(user, number, str(place), digest(place))

    def user(self) -> int:
        """Somebody new."""
        return next(self.users)


def digest(place: Path) -> str:
    return hashlib.sha256((place / adapter_file.FILE).read_bytes()).hexdigest()


def engine_settings(home: Path) -> Settings:
    """A small engine on one thread."""
    engine = {"context": 1024, "memory_mb": 64, "threads": 1, "page_tokens": 16, "max_waiting": 8, "max_running": 4}
    return Settings.model_validate({"home": home, "model": {"device": "cpu"}, "engine": engine})


def plain(place: Path, user: int, number: int) -> None:
    (place / adapter_file.FILE).write_bytes(f"adapter {user} {number}".encode())


def swapped(ref: AdapterRef) -> AdapterRef:
    """Another version's file in its place."""
    plain(Path(ref.path), ref.user_id + 1, ref.number)
    return ref


def sparse(prepared: Prepared, base: str) -> Callable[[Path, int, int], None]:
    shape = Shape.read(prepared.folder)

    def write(place: Path, user: int, number: int) -> None:
        adapters.sparse(place, shape, base, user=user, number=number)

    return write


def rebased(prepared: Prepared) -> Callable[[AdapterRef], AdapterRef]:
    """A sound file that was trained on another base."""

    def write(ref: AdapterRef) -> AdapterRef:
        place = Path(ref.path)
        sparse(prepared, "f" * 64)(place, ref.user_id, ref.number)
        return AdapterRef(ref.user_id, ref.number, ref.path, digest(place))

    return write
