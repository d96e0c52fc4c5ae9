"""Programs that a test needs and a machine may lack: its test is skipped by name, but fails where CI promised them.

What CI cannot install, such as a GPU or user namespaces, is skipped by name everywhere.
"""

import os
import shutil

import pytest


def program(name: str) -> str:
    """The path of a program."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        sentence = f"{name} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(f"{sentence}, and .ci/run has to install it")
        pytest.skip(sentence)
    return found
