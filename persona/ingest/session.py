"""Our session at the broker: the name under which it is kept, the same after every restart and no one else's guess.

The file holds the name before the broker hears it, and the nonce before the broker sends a message under it. The nonce
tells a session's packet numbers from those of the one before, which began at 1 as well.
"""

import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from persona.errors import ConfigurationError
from storage import files

_WRITTEN = re.compile(rb"(\S+-[0-9a-f]{24})(?: ([0-9a-f]{16}))?\n?")
_BREAKS = re.compile(r"[\s/]+")


@dataclass(slots=True)
class Session:
    """What stands in `file`, once it is `stored`. `damaged`: what stood there cannot be read any more."""

    file: Path
    identifier: str
    nonce: bytes = b""
    stored: bool = False
    damaged: bool = False

    @classmethod
    def load(cls, file: Path, prefix: str) -> "Session":
        """From `file`, or a new one. Raises ConfigurationError if there is a file that may not be read."""
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            return cls(file, _name(prefix))
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be read ({error.strerror}); mend or remove it.") from None
        written = _WRITTEN.fullmatch(content)
        if written is None:
            return cls(file, _name(prefix), damaged=True)
        return cls(file, written[1].decode(), bytes.fromhex((written[2] or b"").decode()), stored=True)

    @property
    def known(self) -> bool:
        """Whether the broker should have it."""
        return bool(self.nonce)

    def keep(self) -> None:
        """Have the name on the disk. Raises StorageFull or OSError if that cannot be."""
        if not self.stored:
            self._write(self.identifier)
            self.stored = True

    def forget(self) -> None:
        """The broker has begun anew: what it delivers now is not what an equal number meant."""
        self.nonce = b""

    def renew(self) -> None:
        """Have a nonce, and on the disk. Raises StorageFull or OSError if that cannot be: then there is none."""
        nonce = secrets.token_bytes(8)
        self._write(f"{self.identifier} {nonce.hex()}")
        self.nonce = nonce

    def _write(self, line: str) -> None:
        part = self.file.with_suffix(files.PART)
        with files.full_disk():
            part.touch(0o600)
            part.write_text(f"{line}\n", encoding="utf-8")
            files.sync(part)
            part.replace(self.file)
            files.sync(self.file.parent)


def _name(prefix: str) -> str:
    return f"{_BREAKS.sub('-', prefix)}-{secrets.token_hex(12)}"
