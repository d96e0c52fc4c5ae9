"""Whoever is compared answers the same: same prompts, same adapters, replies of exactly the length asked for."""

from itertools import islice
from pathlib import Path

import m3
import pytest
import torch
from models import Models
from peer import Peer, Setup, adapters, wording
from peer_peft import Peft, PeftBatch, PeftSwap
from peer_persona import Persona

from persona.engine.protocol import Plan
from persona.settings import Settings
from persona.workload import Range, Workload, requests

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own


@pytest.fixture
async def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    models = Models(tmp_path)
    prepared, text, plan = models.prepared(), models.text(), Plan(rank=4)
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    engine = {"context": 512, "memory_mb": 64, "threads": 1}
    model = {"name": str(models.checkpoint()), "device": "cpu"}
    return Setup(
        settings=Settings.model_validate({"home": tmp_path / "home", "engine": engine, "model": model}),
        prepared=prepared,
        checkpoint=models.checkpoint(),
        gguf=None,
        plan=plan,
        peft=adapters(tmp_path / "adapters", prepared, plan, 3),
        workload=Workload(3, Range(70, 80), Range(5, 5), turns=True),
        text=text,
        wording=await wording(text),
        folder=tmp_path,
    )


async def test_all_are_measured_in_turn_and_compared(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    peers: list[Peer] = [Persona(), PeftBatch(), PeftSwap()]
    medians = await m3.measure(peers, setup, 2)
    assert list(medians) == ["persona", "peft-batch", "peft-swap"]
    m3.conclude(medians)
    shown = capsys.readouterr().out
    assert shown.count('"tokens": 15') == 6
    assert "over_the_best" in shown


async def test_a_mixed_batch_says_what_swapped_adapters_say(setup: Setup) -> None:
    some = list(islice(requests(setup.workload), 3))
    assert [len(setup.tokens(request)) for request in some] == [request.prompt for request in some]
    batch, swap = PeftBatch(), PeftSwap()
    await batch.start(setup)
    await swap.start(setup)
    assert batch.replies(some) == swap.replies(some)
    assert torch.allclose(logits(batch, setup, adapter_names=["1"]), one := logits(swap, setup, active="1"), atol=1e-4)
    assert not torch.allclose(logits(swap, setup, active="2"), one, atol=1e-3), "adapters make a difference"


@torch.no_grad()
def logits(peer: Peft, setup: Setup, active: str | None = None, **options: object) -> torch.Tensor:
    """Of the first request's prompt, with the adapter that is named."""
    if active is not None:
        peer._model.set_adapter(active)
    tokens = setup.tokens(next(requests(setup.workload)))
    found: torch.Tensor = peer._model(input_ids=torch.tensor([tokens]), **options).logits
    return found
