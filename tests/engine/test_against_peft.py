"""Every row of a mixed batch against PEFT with that row's adapter alone, whatever stands beside it.

Tolerances, of log-probabilities: in fp32 on a base that is not quantized 1e-3 at most; as served in int4 and bf16 0.05
in the mean and 0.25 at most, all of it rounding (tests/engine/test_decoder.py has the same for the bare base).
"""

from pathlib import Path

import adapters
import pytest
import torch
from models import Models, reference
from peft import PeftModel
from plain import some_tokens
from workbench import Bench

from persona.engine import peft_folder
from persona.engine.protocol import AdapterRef, Piece, TokenLogprob

# PEFT 0.21 reads an attribute that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RANKS = (4, 64, 16, 8)
TOKENS = 6  # of each reply


def of_ranks(bench: Bench, folder: Path) -> list[AdapterRef | None]:
    """An adapter of each rank, then one of uneven ranks as it was imported, and none between two of them."""
    shape, base = bench.shape, bench.prepared.base
    some: list[AdapterRef | None] = [
        adapters.sparse(folder / str(rank), shape, base, user=rank, rank=rank, alpha=2.0 * rank, size=1.0 / rank**0.5)
        for rank in RANKS
    ]
    return [*some[:2], None, *some[2:], adapters.lora(folder / "uneven", shape, base, user=99, size=0.5)]


def told(bench: Bench, job: int) -> list[TokenLogprob]:
    return [one for answer in bench.answers[job] if isinstance(answer, Piece) for one in answer.chunk.logprobs]


@torch.no_grad()
def theirs(bench: Bench, models: Models, peft: Path | None, tokens: list[int]) -> torch.Tensor:
    """PEFT's log-probabilities of what follows, for each of the last TOKENS places: [TOKENS, vocab]."""
    model = reference(bench.decoder, models.checkpoint("llama"))
    adapted = model if peft is None else PeftModel.from_pretrained(model, peft)
    found: torch.Tensor = adapted.eval()(torch.tensor([tokens])).logits[0]
    return found[-TOKENS - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(
    ("weights", "dtype", "mean", "most"), [("none", torch.float32, 1e-4, 1e-3), ("int4", None, 0.05, 0.25)]
)
@pytest.mark.parametrize("compiled", [True, False])
def test_rows_of_all_ranks_side_by_side_are_what_peft_says_of_each(
    models: Models, tmp_path: Path, weights: str, dtype: torch.dtype | None, mean: float, most: float, compiled: bool
) -> None:
    bench = Bench(models, weights=weights, dtype=dtype, compiled=compiled, pages=4000)
    refs = of_ranks(bench, tmp_path)
    prompts = [some_tokens(17 + 5 * row, seed=row) for row in range(len(refs))]
    jobs = [
        bench.generate(prompt, ref, TOKENS, logprobs=0, ignore_eos=True)
        for prompt, ref in zip(prompts, refs, strict=True)
    ]
    bench.finish()
    effects = []
    for prompt, ref, job in zip(prompts, refs, jobs, strict=True):
        said = told(bench, job)
        tokens = [*prompt, *(one.token for one in said)]
        peft = None
        if ref is not None:
            peft = tmp_path / f"peft-{ref.user_id}"
            peft_folder.write(Path(ref.path), peft, bench.prepared)
        wanted = theirs(bench, models, peft, tokens)[range(TOKENS), [one.token for one in said]]
        off = (torch.tensor([one.logprob for one in said]) - wanted).abs()
        assert off.mean() < mean
        assert off.max() < most
        bare = theirs(bench, models, None, tokens)[range(TOKENS), [one.token for one in said]]
        effects.append(float((bare - wanted).abs().mean()))
    assert effects[2] == 0.0
    assert all(effect > 4 * mean for effect in effects[:2] + effects[3:]), "an adapter that does nothing shows nothing"
