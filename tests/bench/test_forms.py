"""The arms of the comparison of forms, on a tiny model: each trains, is scored, and tells what it would store."""

import math
import random

import forms
import pytest
from forms import Arm, Ground
from models import Models

from persona.engine.protocol import Example
from persona.engine.shape import TARGETS
from persona.settings import Settings

ARMS = (
    "fused:layers=0.5:bits=8",
    "fused:modules=mlp:rank=3",
    "dense:rank=8:rate=0.002",
    "frozen:rank=16:density=0.2:rate=0.01:bits=8",
    "frozen:rank=4:density=0.2:mask=largest",
    "frozen:rank=4:density=0.2:mask=gradient",
    "frozen:rank=4:density=0.2:mask=shared",
    "gated:rank=4",
    "masked:rank=4:density=0.3:bits=8",
    "xs:rank=4:rate=0.001",
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(Settings(), Models(tmp_path_factory.mktemp("models")).prepared(), "int4")


@pytest.fixture(scope="module")
def examples(ground: Ground) -> list[Example]:
    drawn = random.Random(1)
    spoken = [[drawn.randrange(3, ground.decoder.shape.vocab) for _ in range(12)] for _ in range(6)]
    return [Example(tokens, list(range(4, 12))) for tokens in spoken]


@pytest.mark.parametrize("text", ARMS)
def test_an_arm_learns_and_tells_its_bytes(ground: Ground, examples: list[Example], text: str) -> None:
    arm = Arm.parse(text)
    masks = ground.masks(arm, examples, 2, 0) if arm.mask != "random" else None
    made = ground.train(arm, examples, 2, 0, masks.places if masks else None)
    assert made.steps >= 1
    pairs = [made.form.scaled(*place) for place in made.form.pieces]
    assert all(pair is not None and all(part.isfinite().all() for part in pair) for pair in pairs)
    assert any(float((pair[0] @ pair[1]).detach().abs().max()) > 0 for pair in pairs if pair is not None)
    assert 0 < made.form.stored() <= 4 * len(made.form.values)


def test_bytes_are_those_of_the_values_and_of_masks_of_ones_own(ground: Ground, examples: list[Example]) -> None:
    shape = ground.decoder.shape
    whole = sum(shape.projection(target)[0] for target in TARGETS) * 4 * shape.layers
    for mask, bits in (("random", 0), ("largest", whole)):
        arm = Arm.parse(f"frozen:rank=4:density=0.25:bits=8:mask={mask}")
        masks = ground.masks(arm, examples, 1, 0) if bits else None
        form = ground.train(arm, examples, 1, 0, masks.places if masks else None).form
        values = sum(round(shape.projection(target)[0] * 4 * 0.25) for target in TARGETS) * shape.layers
        assert form.stored() == values + bits // 8


def test_a_mask_by_the_gradient_is_where_the_gradient_is_largest(ground: Ground, examples: list[Example]) -> None:
    arm = Arm.parse("frozen:rank=4:density=0.25:mask=gradient")
    found = ground.masks(arm, examples, 1, 0).places
    still = forms.replace(arm, density=1.0, mask="random", rate=1e-12)
    form = ground.train(still, examples, 1, 0).form
    assert float(form.values.abs().max()) < 1e-9
    start = 0
    for place, (leaf,) in form.pieces.items():
        mine = form.gathered[start : start + leaf.numel()].abs()
        start += leaf.numel()
        by_place = dict(zip(form.factors[place].b.tolist(), mine.tolist(), strict=True))
        ordered = [by_place[one] for one in found[place].tolist()]
        assert ordered == sorted(ordered, reverse=True)
        assert math.isfinite(ordered[0])
        assert ordered[0] > 0
