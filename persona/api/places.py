"""Folders that a command names: a service may have some of its own where others see the machine's, say /tmp."""

from pathlib import Path

from persona.errors import RequestError

Seen = tuple[int, int] | None  # device and inode of a folder as who asks sees it; None: it was not looked at


def demand_shared(folder: Path, seen: Seen, param: str) -> None:
    """Raises RequestError if the service has another folder there than who asks."""
    if seen is None:
        return
    try:
        about = folder.stat()
    except OSError as error:
        raise RequestError(f"The service cannot look at {folder}: {error.strerror}.", param=param) from None
    if seen != (about.st_dev, about.st_ino):
        sentence = f"The service has another folder at {folder} than you; name a place that it shares with you."
        raise RequestError(sentence, param=param)
