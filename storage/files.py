"""Adapter folders on disk: root/<user id>/<number>/{adapter.safetensors, manifest.json}.

Paths are built from integers only. A folder under its number is complete, durable and never edited; whatever is
being made or removed lies in a folder that begins with tmp-. root/<user id>/run-<run id>/ holds the state of a run.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from persona.errors import AdapterError, Busy, StorageFull
from storage.failpoints import reach

WEIGHTS = "adapter.safetensors"
MANIFEST = "manifest.json"
TEMPORARY = "tmp-"
PART = ".part"
RUN = "run-"
GONE = "gone"  # what is called so under the root says that its versions are lost indeed

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


def folder(root: Path, user_id: int, number: int) -> Path:
    return root / str(int(user_id)) / str(int(number))


def checkpoint(root: Path, user_id: int, run_id: int) -> Path:
    return root / str(int(user_id)) / f"{RUN}{int(run_id)}"


def opened(path: Path) -> Path:
    """The folder `path`, made if it is not there."""
    with full_disk():
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    reach("checkpoint-after-folder")
    return path


def checkpoints(root: Path, user_id: int) -> list[Path]:
    """The states of all the user's runs."""
    return sorted((root / str(int(user_id))).glob(f"{RUN}*"))


def temporary(root: Path, user_id: int) -> Path:
    """A fresh folder that nobody else has."""
    with full_disk():
        parent = root / str(int(user_id))
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=parent))


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """ENOSPC and a spent quota, in our words."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageFull("The disk is full: nothing was written; free some space and try again.") from error
        raise


def reserve(place: Path, size: int) -> None:
    """Take `size` bytes of the disk under `place` and give them back. Raises StorageFull if they are not there."""
    with full_disk(), tempfile.TemporaryFile(dir=place) as file:
        os.posix_fallocate(file.fileno(), 0, size)


def measure(made: Path) -> tuple[str, int]:
    """SHA-256 and size in bytes of the weights in `made`. Raises AdapterError if there are none."""
    path = made / WEIGHTS
    if path.is_symlink() or not path.is_file():
        raise AdapterError(f"The folder holds no {WEIGHTS}.")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size


def seal(made: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    """Make `made` durable and move it to `target` in one step: weights, manifest, folder, rename, parent."""
    with full_disk():
        for path in made.iterdir():
            if path.name != WEIGHTS:
                _remove(path)
        (made / WEIGHTS).chmod(0o400)
        sync(made / WEIGHTS)
        reach("publish-after-files")
        with (made / MANIFEST).open("x", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
        (made / MANIFEST).chmod(0o400)
        sync(made / MANIFEST)
        sync(made)
        reach("publish-after-manifest")
        made.rename(target)
        sync(target.parent)
        reach("publish-after-rename")


def verify(path: Path, expected: Mapping[str, Any]) -> None:
    """Read every byte and compare. Raises AdapterError that says what is wrong, Busy if it cannot be read now."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        sha256, size = measure(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterError("A file of this version is missing.") from error
    except OSError as error:
        raise Busy(f"A file of this version cannot be read now: {error.strerror}.", retry_after=30) from error
    except ValueError as error:
        raise AdapterError("The manifest of this version is damaged.") from error
    if not isinstance(manifest, dict) or any(manifest.get(key) != value for key, value in expected.items()):
        raise AdapterError("The manifest of this version does not match the database.")
    if (sha256, size) != (expected["sha256"], expected["bytes"]):
        raise AdapterError("The weights of this version are damaged: their checksum is wrong.")


def copy(path: Path, target: Path, expected: Mapping[str, Any]) -> None:
    """Copy a folder under its number to the new folder `target`, durably, and verify the copy as `verify` does."""
    with full_disk():
        target.mkdir(mode=0o700, parents=True)
        try:
            for name in (WEIGHTS, MANIFEST):
                copy_file(path / name, target / name)
        except FileNotFoundError as error:
            raise AdapterError("A file of this version is missing.") from error
    verify(target, expected)


def copy_file(source: Path, target: Path) -> None:
    """A durable copy of one file, for its owner's eyes only."""
    shutil.copyfile(source, target)
    target.chmod(0o600)
    sync(target)


def parts(target: Path) -> list[Path]:
    """What is being made for `target`, or what a kill left of that."""
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.*{PART}"))


def looks_complete(path: Path, size: int) -> bool:
    """The cheap part of `verify`: both files are there, and the weights have their length."""
    weights = path / WEIGHTS
    return (path / MANIFEST).is_file() and weights.is_file() and weights.stat().st_size == size


def there(root: Path) -> bool:
    """Whether `root` is the folder that we left, and not the place where it should be mounted."""
    return root.is_dir() and any(path.name.isdigit() or path.name == GONE for path in root.iterdir())


def found(root: Path) -> list[Path]:
    """Everything under `root` that we made: folders of versions, temporary ones, and users' folders if empty."""
    tops = sorted(root.iterdir()) if root.exists() else []
    users = [path for path in tops if path.name.isdigit()]
    inside = [sorted(user.iterdir()) or [user] for user in users]
    return [path for path in tops if path.name.startswith(TEMPORARY)] + [path for paths in inside for path in paths]


def remove(path: Path) -> None:
    """Take a folder away: first out of sight, in one step, then its content. A missing one is no error."""
    if path.name.startswith(TEMPORARY):
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(_aside(path), ignore_errors=True)


def _aside(path: Path) -> Path:
    """Where `path` is now: out of sight, or still there if the disk is too full for another name."""
    try:
        gone = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
        path.rename(gone)
        sync(path.parent)
        return gone
    except OSError:
        return path


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
