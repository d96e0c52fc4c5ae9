"""Which form of adapter learns most a byte: the arms of the comparison behind jobs/sparse.py.

    .venv/bin/python tests/bench/forms.py --data FILE.jsonl [--only ann,bob] [--arms fused,dense] [--messages 240]

Each arm trains through the product's trainer, in the draft frame, on each person's messages before the newest 40, and
is scored on those: nats per own token. One JSON line for each person and arm, with the loss under the next person's
adapter of the same arm, drift on the reference set, how much less likely the base's own replies became (forgetting),
bytes, optimizer steps and seconds. Arms are written as name:option=value:…, say
`frozen:layers=0.5:density=0.2:rate=0.015`. Takes minutes for each line. The base's matrices and words are written out
once and kept, which saves time and changes no result.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from datetime import UTC
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs import evaluate, people
from jobs.sparse import Factor, SparseAdapter, first_a
from jobs.trainer import Trainer
from persona import app_private, frames
from persona.domain import Entry, EntryId, Message, Origin, Role, UserId
from persona.engine import branches, decoder, device, prepare
from persona.engine.decoder import Decoder
from persona.engine.lora import Resident
from persona.engine.prepare import Prepared
from persona.engine.protocol import Example, Plan, TrainRequest
from persona.engine.shape import TARGETS
from persona.engine.text import Text
from persona.engine.weights import Int4
from persona.settings import Settings

HELD = 40  # newest messages of each person: tested, never trained on
SIZE = 500  # nodes of a forest


@dataclass(frozen=True)
class Arm:
    """A form and how it is trained."""

    name: str
    rank: int = 2
    layers: float = 1.0
    density: float = 1.0  # of B, and of A where it trains
    rate: float = 3e-3
    bits: int = 16  # of each stored value
    modules: str = "all"  # or mlp
    batch: int = 160  # targets per optimizer step
    mask: str = "random"  # of frozen: or largest, of a dense B trained before; shared, the first person's of those;
    # gradient, the largest of the loss behind B at zero

    @classmethod
    def parse(cls, text: str) -> "Arm":
        name, *options = text.split(":")
        kinds = {"rank": int, "layers": float, "density": float, "rate": float, "bits": int, "batch": int}
        kinds |= {"modules": str, "mask": str}
        pairs = (option.split("=", 1) for option in options)
        return cls(name, **{key: kinds[key](value) for key, value in pairs})  # type: ignore[arg-type]


class Form(SparseAdapter):
    """An arm in the trainer's hands. `pieces[layer, target]`: leaves of the flat vector, and constants."""

    arm: Arm  # set on a subclass for each arm
    base: Decoder
    chosen: dict[tuple[int, str], torch.Tensor] | None = None  # places of B that train, where they are not drawn

    def __init__(self, shape, plan: Plan, base: str, dtype: torch.dtype, device: torch.device) -> None:  # type: ignore[no-untyped-def]
        super().__init__(shape, plan, base, dtype, device)
        self.places = [(n, t) for n in range(self.header.first, shape.layers) for t in self.targets()]
        size = sum(sum(rows * columns for rows, columns in self.sizes(target)) for _, target in self.places)
        self.values = torch.zeros(size, device=device)
        self.values.grad = torch.zeros_like(self.values)
        self.pieces: dict[tuple[int, str], list[torch.Tensor]] = {}
        self.gathered = torch.zeros_like(self.values)  # the gradients of all steps
        self.random = torch.Generator().manual_seed(plan.seed)

    def targets(self) -> tuple[str, ...]:
        return ("gate_up", "down") if self.arm.modules == "mlp" else TARGETS

    def build(self) -> Iterator[None]:
        for layer, target in self.places:
            self.pieces[layer, target] = [self._leaf(*size) for size in self.sizes(target)]
            with torch.no_grad():
                self.begin(layer, target, *self.pieces[layer, target])
            yield

    def scaled(self, layer: int, target: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        if (layer, target) not in self.pieces:
            return None
        a, b = self.factor(layer, target, *self.pieces[layer, target])
        return a.to(self._dtype), (b * self.header.scale).to(self._dtype)

    def norm(self) -> float:
        return 0.0

    def save(self, folder: Path) -> None:
        pass

    def stored(self) -> int:
        """Bytes."""
        return len(self.values) * self.arm.bits // 8

    def after_step(self) -> None:
        """What an arm does to its values once an optimizer step has changed them."""

    def rounded(self) -> None:
        """Every value as it would be stored in 8 bits, with a scale for each rank of each piece, or, where places are
        chosen, for each piece."""
        for leaves in self.pieces.values():
            for leaf in leaves:
                axis = 0 if leaf.shape[1] == self.header.rank else 1
                step = leaf.detach().abs().amax(axis, keepdim=True).clamp(min=1e-12) / 127
                leaf.data.copy_((leaf.detach() / step).round() * step)

    def sizes(self, target: str) -> list[tuple[int, int]]:
        out, inputs = self._shape.projection(target)
        return [(inputs, self.header.rank), (self.header.rank, out)]

    def begin(self, layer: int, target: str, *leaves: torch.Tensor) -> None:
        rows, columns = leaves[0].shape
        leaves[0].copy_(torch.from_numpy(first_a(8 * self._seed, layer, target, rows, columns)))

    def factor(self, layer: int, target: str, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return leaves[0], leaves[1]


class Separate(Form):
    """Dense LoRA on each checkpoint module (PEFT's all-linear): an A of its own for q, k, v, gate and up."""

    def sizes(self, target: str) -> list[tuple[int, int]]:
        inputs, rank = self._shape.projection(target)[1], self.header.rank
        return [size for rows in self._shape.rows(target) for size in ((inputs, rank), (rank, rows))]

    def begin(self, layer: int, target: str, *leaves: torch.Tensor) -> None:
        for part, leaf in enumerate(leaves[::2]):
            leaf.copy_(torch.from_numpy(first_a(8 * self._seed + part, layer, target, *leaf.shape)))

    def factor(self, layer: int, target: str, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat(leaves[::2], 1), torch.block_diag(*leaves[1::2])


class Frozen(Form):
    """LoRI: A frozen and shared, B under a mask."""

    def sizes(self, target: str) -> list[tuple[int, int]]:
        return [(1, round(self._shape.projection(target)[0] * self.header.rank * self.arm.density))]

    def begin(self, layer: int, target: str, *leaves: torch.Tensor) -> None:
        out, inputs = self._shape.projection(target)
        a = torch.from_numpy(first_a(8 * self._seed, layer, target, inputs, self.header.rank)) * 3**0.5
        drawn = torch.randperm(out * self.header.rank, generator=self.random)
        where = drawn if self.chosen is None else self.chosen[layer, target]
        self.factors[layer, target] = Factor(a, where[: leaves[0].numel()])

    def factor(self, layer: int, target: str, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frozen, out = self.factors[layer, target], self._shape.projection(target)[0]
        b = torch.zeros(self.header.rank * out).index_copy(0, frozen.b, leaves[0].view(-1))
        return frozen.a, b.view(self.header.rank, out)

    def stored(self) -> int:
        own = self.arm.mask in ("largest", "gradient")  # a bit for each place of B says which are used
        bits = sum(self._shape.projection(target)[0] * self.header.rank for _, target in self.places) if own else 0
        return super().stored() + bits // 8

    def largest(self, of: torch.Tensor) -> dict[tuple[int, str], torch.Tensor]:
        """The places of each B, those first where `of`, as long as the values, is largest."""
        found, start = {}, 0
        for place, (leaf,) in self.pieces.items():
            mine = of[start : start + leaf.numel()]
            start += leaf.numel()
            found[place] = self.factors[place].b[mine.detach().abs().argsort(descending=True)]
        return found


class Gated(Form):
    """SoRA: a gate before each rank, drawn towards zero after each step; what is closed at the end is not stored."""

    OPEN, DRAWN = 0.1, 1.5e-3  # a gate at first; how far it is drawn a step

    def sizes(self, target: str) -> list[tuple[int, int]]:
        out, inputs = self._shape.projection(target)
        return [(inputs, self.header.rank), (self.header.rank, out), (1, self.header.rank)]

    def begin(self, layer: int, target: str, *leaves: torch.Tensor) -> None:
        super().begin(layer, target, *leaves)
        leaves[2].fill_(self.OPEN)

    def factor(self, layer: int, target: str, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return leaves[0] * (leaves[2] / self.OPEN), leaves[1]

    @torch.no_grad()
    def after_step(self) -> None:
        for _, _, gate in self.pieces.values():
            gate.copy_(gate.sign() * (gate.abs() - self.DRAWN).clamp(min=0))

    def stored(self) -> int:
        values = sum((a.shape[0] + b.shape[1]) * int((gate != 0).sum()) for a, b, gate in self.pieces.values())
        return values * self.arm.bits // 8


class Masked(Form):
    """A and B both trained, both under random masks."""

    def sizes(self, target: str) -> list[tuple[int, int]]:
        return [(1, round(side * self.header.rank * self.arm.density)) for side in self._shape.projection(target)[::-1]]

    def begin(self, layer: int, target: str, *leaves: torch.Tensor) -> None:
        out, inputs = self._shape.projection(target)
        places = [
            torch.randperm(side * self.header.rank, generator=self.random)[: leaf.numel()]
            for side, leaf in zip((inputs, out), leaves, strict=True)
        ]
        leaves[0].uniform_(-1, 1, generator=self.random).mul_((inputs * self.arm.density) ** -0.5)
        self.factors[layer, target] = Factor(places[0], places[1])

    def factor(self, layer: int, target: str, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, inputs = self._shape.projection(target)
        places, rank = self.factors[layer, target], self.header.rank
        a = torch.zeros(inputs * rank).index_copy(0, places.a, leaves[0].view(-1)).view(inputs, rank)
        return a, torch.zeros(rank * out).index_copy(0, places.b, leaves[1].view(-1)).view(rank, out)


class Extra(Form):
    """LoRA-XS: the base's own singular vectors, and between them a trained square."""

    def sizes(self, target: str) -> list[tuple[int, int]]:
        return [(self.header.rank, self.header.rank)]

    def begin(self, layer: int, target: str, *leaves: torch.Tensor) -> None:
        matrix = self.base.layers[layer].projections[target].dense(torch.float32)
        left, sizes, right = torch.svd_lowrank(matrix, self.header.rank, niter=3)
        self.factors[layer, target] = Factor(left, sizes[:, None] * right.t())

    def factor(self, layer: int, target: str, *leaves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        around = self.factors[layer, target]
        return around.a, leaves[0] @ around.b


FORMS = {"fused": Form, "dense": Separate, "frozen": Frozen, "gated": Gated, "masked": Masked, "xs": Extra}
DEFAULT = "dense:rank=8:rate=0.002,fused:layers=0.9:bits=8,frozen:rank=16:density=0.1:rate=0.01"


class Watched(Trainer):
    """The product's trainer, whose form has a word after each step."""

    def _update(self, *how: Any) -> Generator[None, None, bool]:
        assert isinstance(self._adapter, Form)
        assert self._adapter.values.grad is not None
        self._adapter.gathered += self._adapter.values.grad
        sound = yield from super()._update(*how)
        self._adapter.after_step()
        return sound


class Ground:
    """The base, and people's messages as examples."""

    def __init__(self, settings: Settings, prepared: Prepared, weights: device.Form) -> None:
        self.settings, self.prepared, self.hash = settings, prepared, prepared.base
        self.decoder = decoder.load(prepared.folder, weights, "cpu")
        self.decoder.widen()
        self.text = Text.load(prepared.folder)

    def drafts(self, person: people.Person, context: int, longest: int) -> list[frames.Framed]:
        return [self._draft(item, context).clipped(targets=longest, tokens=4096) for item in person.items]

    def _draft(self, item: people.ImportItem, context: int) -> frames.Framed:
        entry = Entry(EntryId(1), UserId(1), Role.USER, item.text, item.ts.astimezone(UTC), Origin.IMPORT, "", 0)
        lines = frames.trim_lines(item.context, context, self.text)
        return frames.draft(lines, entry.text, tokenizer=self.text)

    def reference(self) -> list[frames.Framed]:
        system = Message(Role.SYSTEM, self.settings.prompt.system)
        asked = [([system, Message(Role.USER, ask)], answer) for ask, answer in evaluate.reference()]
        return [frames.reply(context, answer, tokenizer=self.text) for context, answer in asked]

    def loss(self, some: list[frames.Framed], adapter: Resident | None) -> float:
        slices = branches.scores(self.decoder, [(one.tokens, one.targets, adapter) for one in some], SIZE)
        try:
            while True:
                next(slices)
        except StopIteration as ended:
            return -sum(map(sum, ended.value)) / sum(map(len, ended.value))

    def masks(self, arm: Arm, examples: list[Example], passes: int, seed: int) -> "Masks":
        """Of a whole B: after it was trained, or, by its gradient, while it stays at zero."""
        still = arm.mask == "gradient"
        whole = replace(arm, density=1.0, mask="random", bits=16, rate=1e-12 if still else arm.rate)
        first = self.train(whole, examples, passes, seed)
        assert isinstance(first.form, Frozen)
        return Masks(first.form.largest(first.form.gathered if still else first.form.values), first.seconds)

    def train(
        self,
        arm: Arm,
        examples: list[Example],
        passes: int,
        seed: int,
        chosen: dict[tuple[int, str], torch.Tensor] | None = None,
    ) -> "Trained":
        form = type("Chosen", (FORMS[arm.name],), {"arm": arm, "base": self.decoder, "chosen": chosen})
        plan = Plan(
            arm.rank, 2.0 * arm.rank, arm.layers, seed, passes, arm.batch, slice_tokens=SIZE, learning_rate=arm.rate
        )
        with tempfile.TemporaryDirectory() as out:
            trainer = Watched(self.decoder, self.hash, TrainRequest(examples, plan, out), None, form=form)
            started = time.perf_counter()
            steps = max(at.step for at in trainer.slices() if at)
        made = trainer._adapter
        assert isinstance(made, Form)
        if arm.bits == 8:
            made.rounded()
        return Trained(made, steps, time.perf_counter() - started)


@dataclass(frozen=True)
class Masks:
    """places: of each B, the best first · seconds: that finding them took."""

    places: dict[tuple[int, str], torch.Tensor]
    seconds: float


@dataclass(frozen=True)
class Trained:
    form: Form
    steps: int
    seconds: float


@dataclass(frozen=True)
class Lessons:
    """What each person's adapters learn from, and what they are asked for."""

    examples: dict[str, list[Example]]  # the person's own, then those rehearsed
    tested: dict[str, list[frames.Framed]]
    replies: list[frames.Framed]  # of the bare base, to the reference questions


async def lessons(ground: Ground, some: list[people.Person], asked: argparse.Namespace) -> Lessons:
    settings = ground.settings.model_copy(
        update={"learning": ground.settings.learning.model_copy(update={"rehearsal": asked.rehearsal})}
    )
    made = Lessons({}, {person.name: ground.drafts(person, 96, 128)[-HELD:] for person in some}, [])
    async with app_private.private(settings, ground.prepared) as private:
        for person in some:
            drafts = ground.drafts(person, asked.context, 64)[-HELD - asked.messages : -HELD]
            own = [Example(one.tokens, one.targets) for one in drafts]
            made.examples[person.name] = own + await private.rehearsal.examples(own, asked.seed)
        made.replies.extend(await private.rehearsal.replies([ask for ask, _ in evaluate.reference()]))
    return made


def resident(form: Form) -> Resident:
    with torch.no_grad():
        pairs = {place: form.scaled(*place) for place in form.pieces}
    return Resident({place: pair for place, pair in pairs.items() if pair is not None}, ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--arms", default=DEFAULT)
    parser.add_argument("--messages", type=int, default=240)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--context", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rehearsal", type=float, default=1.0)
    asked = parser.parse_args()
    settings = Settings()
    weights = device.choose(settings.model).weights
    prepared = prepare.ready(settings.model.name, settings.cache, weights)
    assert prepared is not None, "run `persona model fetch` first"
    ground = Ground(settings, prepared, weights)
    some = people.read(asked.data, only=[name for name in asked.only.split(",") if name])
    given = asyncio.run(lessons(ground, some, asked))
    Int4.dense = cache(Int4.dense)  # type: ignore[method-assign]
    bare = {name: ground.loss(drafts, None) for name, drafts in given.tested.items()}
    neutral, said = ground.loss(ground.reference(), None), ground.loss(given.replies, None)
    for text in asked.arms.split(","):
        arm, made, masks = Arm.parse(text), {}, None
        for person in some:
            how = arm, given.examples[person.name], asked.passes, asked.seed
            if arm.mask in ("largest", "gradient") or (arm.mask == "shared" and masks is None):
                masks = ground.masks(*how)
            trained = ground.train(*how, masks.places if masks else None)
            first = masks.seconds if masks and arm.mask != "shared" else 0.0
            made[person.name] = replace(trained, seconds=trained.seconds + first)
        for place, person in enumerate(some):
            mine, tested = made[person.name], given.tested[person.name]
            adapter = resident(mine.form)
            own = ground.loss(tested, adapter)
            wrong = resident(made[some[(place + 1) % len(some)].name].form) if len(some) > 1 else None
            told = {"person": person.name, "seed": asked.seed, "arm": text, "base": bare[person.name], "own": own}
            told |= {"gain": bare[person.name] - own, "wrong": ground.loss(tested, wrong) if wrong else None}
            told |= {"drift": ground.loss(ground.reference(), adapter) / neutral - 1}
            told |= {"forgetting": ground.loss(given.replies, adapter) - said}
            told |= {"bytes": mine.form.stored(), "steps": mine.steps, "seconds": mine.seconds}
            rounded = {
                key: round(float(value), 4) if isinstance(value, float) else value for key, value in told.items()
            }
            sys.stdout.write(json.dumps(rounded) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
