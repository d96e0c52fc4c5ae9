"""What a test needs and a machine may lack: the test is skipped by name, but fails where CI promised it.

What CI cannot install, such as a GPU or user namespaces, is skipped by name everywhere.
"""

import importlib.util
import os
import shutil
from typing import NoReturn

import pytest


def program(name: str) -> str:
    """The path of a program."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        _missing(name)
    return found


def library(name: str) -> None:
    """Something to import that only an extra of pyproject.toml brings."""
    if importlib.util.find_spec(name) is None:
        _missing(name)


def _missing(name: str) -> NoReturn:
    sentence = f"{name} is not installed"
    if os.environ.get("CI") == "true":
        pytest.fail(f"{sentence}, and .ci/run has to install it")
    pytest.skip(sentence)
