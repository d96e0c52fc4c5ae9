"""Where the base runs and in which form, decided without importing torch: the service asks before the engine starts."""

import importlib.util
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

from persona.errors import ModelError
from persona.settings import Model

Form = Literal["int4", "nf4", "none"]


class Choice(NamedTuple):
    """The form of the base's projections and the device."""

    weights: Form
    device: Literal["cpu", "cuda"]


def choose(model: Model) -> Choice:
    """Resolve "auto". Raises ModelError for a pair that does not work here."""
    cuda = cuda_version() is not None and Path("/dev/nvidiactl").exists()
    device = ("cuda" if cuda else "cpu") if model.device == "auto" else model.device
    if device == "cuda" and not cuda:
        raise ModelError("model.device is cuda, but there is no NVIDIA device or torch is a CPU build; set it to auto.")
    weights = ("nf4" if device == "cuda" else "int4") if model.weights == "auto" else model.weights
    return Choice(weights, device)


def cuda_version() -> str | None:
    """The CUDA version that the installed torch was built for; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    about = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b.*=\s*['\"]([\d.]+)['\"]", about, re.MULTILINE)
    return found[1] if found else None


def c_compiler() -> list[str] | None:
    """The command of the machine's C compiler: $CC, cc, gcc or clang."""
    wanted = shlex.split(os.environ.get("CC", ""))
    if wanted and shutil.which(wanted[0]):
        return wanted
    return next(([path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
