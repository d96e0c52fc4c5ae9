"""What systemd is to a service, as far as the service can tell: it starts it, listens for it and hears what it says."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

# As systemd does: the socket is descriptor 3, and the variables name the very process that is started.
_EXEC = 'export WATCHDOG_PID=$$; if [ -n "$GIVEN" ]; then export LISTEN_PID=$$; exec 3<&"$GIVEN"; fi; exec "$@"'


class Manager:
    """Starts one process at a time, under a notify socket of its own; use it in a `with` block."""

    def __init__(self, *, abstract: bool = False) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="manager-"))  # a socket's path has to be short
        self.address = f"@{self._folder.name}" if abstract else str(self._folder / "notify")
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ear.bind(self.address.replace("@", "\0"))
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._ear.close()
        shutil.rmtree(self._folder)

    def start(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        listening: socket.socket | None = None,
        watchdog: float | None = None,
        log: Path | None = None,
    ) -> None:
        """Start `command`; `log` gets what it prints."""
        words = {"NOTIFY_SOCKET": self.address}
        if watchdog is not None:
            words["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        if listening is not None:
            words |= {"LISTEN_FDS": "1", "GIVEN": str(listening.fileno())}
        with open(log or os.devnull, "ab") as out:
            self.process = subprocess.Popen(
                ["bash", "-c", _EXEC, "start", *command],
                env={**environ, **words},
                pass_fds=[listening.fileno()] if listening is not None else [],
                stdout=out,
                stderr=out,
            )

    def hear(self, seconds: float) -> dict[str, str] | None:
        """The next message; None after that many seconds of silence."""
        self._ear.settimeout(max(seconds, 0.001))
        try:
            lines = self._ear.recv(4096).decode().splitlines()
        except TimeoutError:
            return None
        return dict(line.split("=", 1) for line in lines)

    def until(self, word: str, seconds: float = 60.0) -> list[dict[str, str]]:
        """Everything that is said up to the message that has `word`."""
        deadline, heard = time.monotonic() + seconds, []
        while not heard or word not in heard[-1]:
            assert self.process is not None
            assert self.process.poll() is None, f"it ended with {self.process.returncode} before it said {word}"
            assert time.monotonic() < deadline, f"it never said {word}"
            if message := self.hear(0.5):
                heard.append(message)
        return heard

    def until_end(self) -> dict[str, str]:
        """What a process that has ended said last, all messages together."""
        said: dict[str, str] = {}
        while (message := self.hear(0.1)) is not None:
            said |= message
        return said

    def beats(self, seconds: float) -> int:
        """How often the watchdog is fed in that time."""
        deadline, count = time.monotonic() + seconds, 0
        while (left := deadline - time.monotonic()) > 0:
            count += "WATCHDOG" in (self.hear(left) or {})
        return count

    def stop(self, number: int, seconds: float = 30.0) -> int:
        """The exit code after that signal."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(seconds)
