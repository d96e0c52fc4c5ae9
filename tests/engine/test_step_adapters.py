"""Adapters of one step in plain torch: whoever is computed together gets what their own adapter adds, and no more."""

import pytest
import torch

from persona.engine import lora
from persona.engine.kernels.reference import Piece, PromptGroups, attend_prompts
from persona.engine.lora import Resident, Span, StepAdapters

INPUTS, OUTPUTS = 48, 80
KEY = (0, "o")


def adapter(rank: int, seed: int) -> Resident:
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(INPUTS, rank, generator=random), torch.randn(rank, OUTPUTS, generator=random)
    return lora.resident({KEY: (a, b)}, 1)


def added(some: StepAdapters, x: torch.Tensor) -> torch.Tensor:
    return some.add(*KEY, x, torch.ones(len(x), OUTPUTS))


@pytest.mark.parametrize("ranks", [(4, 4, 4, 4, 4, 4), (4, 8, 4, 8, 4, 1)])
def test_prompts_that_are_computed_together_are_each_as_alone(ranks: tuple[int, ...]) -> None:
    """Of one length class and of several, one token and whole powers of two among them, bare rows between them."""
    lengths, at, spans = (17, 20, 30, 1, 32, 2), 3, list[Span]()
    for number, (rank, length) in enumerate(zip(ranks, lengths, strict=True)):
        spans.append((at, at + length, adapter(rank, number)))
        at += length + number % 2
    x = torch.randn(at + 4, INPUTS)
    wanted = torch.ones(len(x), OUTPUTS)
    for start, end, one in spans:
        a, b = one.factors[KEY]
        wanted[start:end] += x[start:end] @ a @ b
    some = StepAdapters()
    some.arrange([], spans)
    assert torch.allclose(added(some, x), wanted, atol=1e-4)
    assert len(some._pieces) < len(spans), "nothing was computed together"


def test_decode_rows_and_prompts_of_a_step_are_each_adapted_once() -> None:
    two, other = [adapter(4, seed) for seed in (1, 2)], adapter(8, 3)
    x = torch.randn(20, INPUTS)
    some = StepAdapters()
    some.arrange([*two, other, None], [(4, 12, two[1]), (12, 19, two[0])])
    wanted = torch.ones(20, OUTPUTS)
    whose = [*two, other, None, *[two[1]] * 8, *[two[0]] * 7, None]
    for row, one in enumerate(whose):
        if one is not None:
            wanted[row] += x[row] @ one.factors[KEY][0] @ one.factors[KEY][1]
    assert torch.allclose(added(some, x), wanted, atol=1e-4)


def test_a_layer_that_no_adapter_has_is_left_alone() -> None:
    some, x = StepAdapters(), torch.randn(8, INPUTS)
    some.arrange([], [(0, 8, adapter(4, 1))])
    assert torch.equal(some.add(1, "qkv", x, torch.ones(8, OUTPUTS)), torch.ones(8, OUTPUTS))


def test_pieces_of_prompts_see_their_own_pages_however_they_are_grouped() -> None:
    """Lengths and contexts of several classes: each token's mean over what it may see, found by hand."""
    size, heads, dim = 8, 2, 16
    shapes = [(5, 0), (7, 3), (1, 20), (8, 0), (3, 61), (6, 1)]
    pieces, at, page = list[Piece](), 0, 0
    for length, behind in shapes:
        count = -(-(length + behind) // size)
        pieces.append(Piece(at, at + length, behind, list(range(page, page + count))))
        at, page = at + length, page + count
    keys, values, q = torch.randn(page, size, 1, dim), torch.randn(page, size, 1, dim), torch.randn(at, heads, dim)
    groups = PromptGroups.of(pieces, size, q.device)
    assert 1 < len(groups.groups) < len(pieces)
    found = attend_prompts(q, keys, values, groups)
    for piece in pieces:
        k, v = (pool[piece.pages].flatten(0, 1)[:, 0] for pool in (keys, values))  # [tokens, dim]
        for row in range(piece.start, piece.end):
            seen = piece.first + row - piece.start + 1
            weights = (q[row] @ k[:seen].t() / dim**0.5).softmax(-1)
            assert torch.allclose(found[row], (weights @ v[:seen]).flatten(), atol=1e-5)
