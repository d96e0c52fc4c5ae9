"""The state folder: one service, or one restore, at a time; and what a killed one left in it.

The lock goes with the process, however it ends.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from persona.errors import ConfigurationError
from persona.settings import Settings
from storage import restore


@contextmanager
def alone(settings: Settings) -> Iterator[None]:
    """Hold the folder. Raises ConfigurationError if it is held already, or belongs to another account."""
    try:
        settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings.run_dir.mkdir(mode=0o700, exist_ok=True)
        settings.run_dir.chmod(0o700)  # it holds the admin socket and passing copies of user text
        lock = (settings.run_dir / "lock").open("w")
    except OSError as error:
        reason = f"{error.strerror}; use the account that persona runs as, or another PERSONA_HOME"
        raise ConfigurationError(f"The state folder {settings.home} cannot be used: {reason}.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(f"persona is already running in {settings.home}; stop it first.") from None
        yield


def mend(settings: Settings, passing: str) -> list[str]:
    """Remove what a killed service or restore left; `passing` begins the names of passing copies of user text.

    One sentence for each mending. Raises ConfigurationError if a restore has to be done again.
    """
    mended = restore.settle(settings.home)
    for left in sorted(settings.run_dir.glob(f"{passing}*")):
        shutil.rmtree(left, ignore_errors=True)
        mended.append(f"The unfinished export {left.name} was removed.")
    for left in sorted(settings.home.glob("*.part")):
        left.unlink()
        mended.append(f"The unfinished copy {left.name} of the database was removed.")
    if settings.admin_socket.exists():
        settings.admin_socket.unlink()  # ours: the lock says that nobody else serves here
        mended.append("The socket of a service that was killed was removed.")
    return mended
