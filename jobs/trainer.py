"""Training as a generator of slices: between two of them the engine serves.

The base is the one that serves, never changed, written out one layer at a time. A slice is half a layer over one pack
of examples, or some words of the head. Each slice enters and leaves its own grad scope. Whoever stops a
training loses at most an optimizer step: its state is kept there, and the same request goes on from it to the same
result, on a CPU bit for bit.

Most of an example is context, which the model reads and never learns to say. Gradients flow through the rows that
predict a target and stop where the context's activations begin, so that the backward pass, which recomputes one layer
at a time, is as long as the user's own words. Beginnings that the examples of a pack share are computed once.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch.optim.adamw import adamw

from jobs.checkpoint import SHARE, Checkpoint
from jobs.course import Course
from jobs.sparse import SparseAdapter
from persona.engine import checkpoint_file, head, protocol
from persona.engine.adapter_file import Adapter, Array
from persona.engine.branches import Branches, Factors, attended
from persona.engine.checkpoint_file import Header, State
from persona.engine.decoder import Decoder
from persona.engine.forest import Forest, packed
from persona.engine.protocol import Example, Plan, Progress, TrainRequest
from persona.engine.weights import ROUND, Projection
from persona.errors import TrainingFailed

MAX_SKIPPED = 3  # optimizer steps with a non-finite gradient before the run is given up
SMALLEST = 40  # targets of an optimizer step, however few a run has


@dataclass(frozen=True, slots=True)
class Pack:
    """Examples side by side in one forward: they share the base's products and see of each other what is common."""

    examples: tuple[Example, ...]
    forest: Forest
    paths: tuple[list[int], ...]  # the nodes of each example

    @property
    def tokens(self) -> int:
        return sum(len(e.tokens) for e in self.examples)

    @property
    def weight(self) -> float:
        return sum(e.weight * len(e.targets) for e in self.examples)

    @property
    def distil(self) -> bool:
        return self.examples[0].distil


def packs(examples: list[Example], size: int) -> list[Pack]:
    """Fill packs of at most `size` nodes in order; a longer example stands alone."""
    # What stands behind the last target is not looked at, and that target is only predicted.
    made = packed([e.tokens[: max(e.targets)] for e in examples], size)
    return [
        Pack(tuple(examples[i] for i, _ in members), forest, tuple(path for _, path in members))
        for forest, members in made
    ]


def step_targets(examples: list[Example], plan: Plan) -> int:
    """Targets of an optimizer step: at most `plan.batch_tokens`, and so few that there are `plan.least_steps` steps."""
    if not plan.least_steps:
        return plan.batch_tokens
    tokens = plan.passes * sum(len(e.tokens) for e in examples if not e.distil)
    share = min(1.0, plan.max_tokens / tokens) if plan.max_tokens and tokens else 1.0
    targets = share * plan.passes * sum(len(e.targets) for e in examples)
    return min(plan.batch_tokens, max(SMALLEST, int(targets / plan.least_steps)))


def batches(examples: list[Example], targets: int) -> list[list[Example]]:
    """One pass in its order: optimizer steps of at most so many `targets` each."""
    steps: list[list[Example]] = []
    room = 0
    for example in examples:
        if not example.targets:
            continue
        if len(example.targets) > room:
            steps.append([])
            room = targets
        steps[-1].append(example)
        room -= len(example.targets)
    return steps


def packed_apart(batch: list[Example], size: int) -> list[Pack]:
    """A batch in packs: what is distilled apart from the rest, after it."""
    kinds = ([example for example in batch if example.distil is kind] for kind in (False, True))
    return [pack for some in kinds for pack in packs(some, size)]


def _even(order: list[int], apart: Callable[[int], bool]) -> list[int]:
    """`order`, those `apart` spread evenly among the others: every step then has its share of both."""
    kinds = [i for i in order if not apart(i)], [i for i in order if apart(i)]
    places = [((n + 1) / (len(kind) + 1), i) for kind in kinds for n, i in enumerate(kind)]
    return [i for _, i in sorted(places, key=lambda place: place[0])]


def _check(examples: list[Example], vocab: int) -> None:
    """Raise TrainingFailed for an example whose targets or tokens do not exist."""
    for example in examples:
        inside = all(0 < target < len(example.tokens) for target in example.targets)
        if not inside or not all(0 <= token < vocab for token in example.tokens):
            raise TrainingFailed("An example has targets outside its tokens, or tokens outside the vocabulary.")


class Trainer:
    """One training run. `slices()` is the whole of it."""

    def __init__(
        self,
        decoder: Decoder,
        base: str,
        request: TrainRequest,
        start: Adapter | None,
        share: float = SHARE,
        form: type[SparseAdapter] = SparseAdapter,
    ) -> None:
        """share: of its time that a training may spend on keeping its state · form: another one, for comparisons."""
        self._decoder, self._plan = decoder, request.plan
        self._out, self._half = Path(request.out), Path(request.half) if request.half else None
        self._adapter = form(decoder.shape, request.plan, base, decoder.dtype, decoder.device)
        self._start = start
        _check(request.examples, decoder.shape.vocab)
        self._batches = self._ordered(request.examples)
        if not self._batches:
            raise TrainingFailed("There is nothing to train on: no example has a target.")
        self._checkpoint = Checkpoint(request.checkpoint, checkpoint_file.fingerprint(request, base), share)
        self._course = Course()

    def slices(self) -> Iterator[Progress | None]:
        """One item a slice: None, or progress after each optimizer step; the last has `done`."""
        started, kept = time.perf_counter(), self._checkpoint.read()
        yield from self._adapter.build()
        if self._start is not None:
            self._adapter.start_from(self._start)
        begun = self._adapter.values.clone() if self._start is not None else None
        optimizer = _AdamW(self._adapter.values, self._plan.weight_decay)
        at = self._taken_up(optimizer, kept) if kept else Progress(0, len(self._batches), math.nan, 0, 0.0)
        started -= at.seconds
        while at.step < at.steps:
            at = yield from self._advance(optimizer, at)
            at = protocol.replace(at, seconds=time.perf_counter() - started)
            if self._checkpoint.due(at.seconds):
                yield from self._checkpoint.write(self._state(optimizer, at))
            yield at
        self._adapter.save(self._out)
        if self._half is not None:
            yield None
            self._adapter.halve(begun)
            yield None
            self._adapter.save(self._half)
        yield protocol.replace(at, seconds=time.perf_counter() - started, done=True)

    def _taken_up(self, optimizer: "_AdamW", kept: State) -> Progress:
        """Where to go on: everything is as it was after the step of the checkpoint."""
        before, steps = kept.header, len(self._batches)
        optimizer.load(kept.tensors, before.updates)
        self._course = Course(before.loss, before.words, before.first)
        loss, seconds, skipped = before.loss, before.seconds, before.skipped
        return Progress(before.step, steps, loss, before.tokens, seconds, skipped, resumed=before.step)

    def _state(self, optimizer: "_AdamW", at: Progress) -> State:
        request, tensors = self._checkpoint.request, optimizer.tensors()
        loss, words, first = astuple(self._course)
        header = Header(request, at.step, loss, words, first, at.tokens, at.seconds, at.skipped, optimizer.updates)
        return State(header, tensors)

    def _advance(self, optimizer: "_AdamW", at: Progress) -> Generator[None, None, Progress]:
        """One optimizer step after `at`. Raises TrainingFailed if it shows that the run is lost."""
        step, batch = at.step + 1, packed_apart(self._batches[at.step], self._plan.slice_tokens)
        weight, own, rehearsed = sum(pack.weight for pack in batch), 0.0, 0.0
        for pack in batch:
            part = yield from self._pack(pack, weight)
            own, rehearsed = (own, rehearsed + part) if pack.distil else (own + part, rehearsed)
        self._course = self._course.after(own * weight, sum(pack.weight for pack in batch if not pack.distil))
        sound = yield from self._update(optimizer, step, at.steps)
        skipped = at.skipped + (not (sound and math.isfinite(own + rehearsed)))
        self._watch(skipped)
        seen = at.tokens + sum(pack.tokens for pack in batch)
        loss = self._course.loss if self._course.words else rehearsed  # the loss of words is told, where there are any
        return protocol.replace(at, step=step, loss=loss, tokens=seen, skipped=skipped)

    def _ordered(self, examples: list[Example]) -> list[list[Example]]:
        """All passes: the examples in a new order each time, from a fixed seed."""
        random = torch.Generator().manual_seed(self._plan.seed)
        made: list[list[Example]] = []
        budget, targets = self._plan.max_tokens or math.inf, step_targets(examples, self._plan)
        for _ in range(self._plan.passes):
            order = _even(torch.randperm(len(examples), generator=random).tolist(), lambda i: examples[i].distil)
            for batch in batches([examples[i] for i in order], targets):
                if (budget := budget - sum(len(e.tokens) for e in batch if not e.distil)) < 0:
                    return made
                made.append(batch)
        return made

    @property
    def _rate(self) -> str:
        """The setting that this run's rate comes from."""
        return "learning.learning_rate" if self._start is None else "learning.warm_rate"

    def _watch(self, skipped: int) -> None:
        if skipped > MAX_SKIPPED:
            raise TrainingFailed("The loss or its gradient was not finite several times; nothing was published.")
        if self._course.exploded:
            raise TrainingFailed(f"The loss exploded; nothing was published. Lower {self._rate}.")
        if self._adapter.norm() > self._plan.max_norm:
            raise TrainingFailed(f"The update outgrew the base; nothing was published. Lower {self._rate}.")

    def _update(self, optimizer: "_AdamW", step: int, steps: int) -> Generator[None, None, bool]:
        """One optimizer step; False if it was left out because a gradient is not finite."""
        values = self._adapter.values
        assert values.grad is not None
        norm = torch.nn.utils.clip_grad_norm_([values], self._plan.clip)
        if not norm.isfinite():
            values.grad.zero_()
            return False
        warmup = max(1, round(self._plan.warmup * steps))
        share = min(step / warmup, (steps - step + 1) / max(1, steps - warmup + 1))
        optimizer.step(self._plan.learning_rate * min(1.0, share))
        values.grad.zero_()
        yield
        return True

    def _pack(self, pack: Pack, weight: float) -> Generator[None, None, float]:
        """Forward, head and backward of one pack. Returns its share of the batch's mean loss."""
        decoder, first = self._decoder, self._adapter.header.first
        run = _Forward(decoder, pack.forest, self._adapter.scaled)
        own = _Own(decoder, run, pack, self._adapter.scaled)
        borders: list[torch.Tensor] = []
        with torch.no_grad():
            h = decoder.embedded(run.tokens)
        for layer in range(decoder.shape.layers):
            for half in decoder.halves:
                if layer >= first:
                    borders.append(h[own.rows])
                with torch.no_grad():
                    h = half(layer, h, run)
                if layer < first:
                    run.kept.clear()
                yield
        taught = (yield from self._bare(pack))[own.rows] if pack.distil else None
        loss, gradient = yield from self._head(h[own.rows], taught, pack, weight, own)
        for layer in range(decoder.shape.layers - 1, first - 1, -1):
            for half in reversed(decoder.halves):
                with torch.enable_grad():
                    border = borders.pop().requires_grad_()
                    _back(half(layer, border, own), gradient)
                assert border.grad is not None
                gradient = border.grad
                yield
            run.kept.pop(layer)
        return loss

    def _bare(self, pack: Pack) -> Generator[None, None, torch.Tensor]:
        """What the bare base makes of a pack: [rows, hidden]."""
        run = Branches(self._decoder, pack.forest.whole(), lambda layer, target: None)
        with torch.no_grad():
            h = self._decoder.embedded(run.tokens)
        for layer in range(self._decoder.shape.layers):
            for half in self._decoder.halves:
                with torch.no_grad():
                    h = half(layer, h, run)
                yield
        return h

    def _head(
        self, h: torch.Tensor, taught: torch.Tensor | None, pack: Pack, weight: float, own: "_Own"
    ) -> Generator[None, None, tuple[float, torch.Tensor]]:
        """Weighted loss over the targets and its gradient for h.

        h, taught: [rows, hidden]. The loss is the cross-entropy of the token, or, where the base's `taught` is given,
        the divergence from its distribution.
        """
        decoder = self._decoder
        rows, wanted, weights = own.targets(pack)
        gradient = torch.zeros_like(h)
        loss = 0.0
        for start in range(0, len(rows), head.ROWS):
            chunk = slice(start, start + head.ROWS)
            mine, shares = rows[chunk], weights[chunk] / weight
            some = h[mine].detach().requires_grad_()
            with torch.enable_grad():
                normed = decoder.spoken(some)
            logits = yield from head.logits(decoder, normed.detach())
            if taught is None:
                loss += yield from head.cross_entropy(logits, wanted[chunk], shares)
            else:
                aimed = yield from head.logits(decoder, decoder.spoken(taught[mine]))
                loss += yield from head.divergence(logits, aimed, shares)
            slope = yield from head.gradient(decoder, logits)
            with torch.enable_grad():
                _back(normed, slope)
            assert some.grad is not None
            gradient.index_add_(0, mine, some.grad)
        return loss, gradient


def _back(result: torch.Tensor, gradient: torch.Tensor) -> None:
    """result.backward(gradient): that imports sympy the first time and would stall serving for a third of a second."""
    (result * gradient).sum().backward()  # type: ignore[no-untyped-call]


class _AdamW:
    """torch's AdamW on one vector. Its class would import the compiler on first use and stall serving for a second."""

    def __init__(self, values: torch.Tensor, decay: float) -> None:
        self._values, self._decay = values, decay
        self._mean, self._square = torch.zeros_like(values), torch.zeros_like(values)
        self._steps = torch.tensor(0.0)

    @property
    def updates(self) -> int:
        return int(self._steps)

    def tensors(self) -> dict[str, Array]:
        """All that a later one needs to go on: the values and their moments, fp32 [values]."""
        found = {"values": self._values, "mean": self._mean, "square": self._square}
        return {name: tensor.detach().cpu().numpy() for name, tensor in found.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Array], updates: int) -> None:
        """Go on where the one was that gave these `tensors`."""
        self._values.copy_(torch.tensor(tensors["values"]))
        self._mean.copy_(torch.tensor(tensors["mean"]))
        self._square.copy_(torch.tensor(tensors["square"]))
        self._steps.fill_(updates)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update from `values.grad` with learning rate `rate`."""
        assert self._values.grad is not None
        adamw(
            [self._values],
            [self._values.grad],
            [self._mean],
            [self._square],
            [],
            [self._steps],
            amsgrad=False,
            beta1=0.9,
            beta2=0.99,
            lr=rate,
            weight_decay=self._decay,
            eps=1e-8,
            maximize=False,
        )


class _Forward(Branches):
    """A pack's pass without gradients; keeps what each layer's keys and values are made of.

    kept[layer]: the qkv projection [rows, out] and its input [rows, hidden]
    """

    def __init__(self, decoder: Decoder, forest: Forest, factors: Factors) -> None:
        super().__init__(decoder, forest.whole(), factors)
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def project(self, layer: int, target: str, base: Projection, x: torch.Tensor) -> torch.Tensor:
        y = super().project(layer, target, base, x)
        if target == "qkv":
            self.kept[layer] = y, x
        return y


class _Own(Branches):
    """The rows of a pack that predict a target, with gradients, over all that a forward before has kept.

    What the context heard is a constant; what a layer's adapter makes of it in keys and values is not.
    """

    def __init__(self, decoder: Decoder, before: _Forward, pack: Pack, factors: Factors) -> None:
        nodes = sorted({path[t - 1] for e, path in zip(pack.examples, pack.paths, strict=True) for t in e.targets})
        self._place = {node: place for place, node in enumerate(nodes)}
        spare = [len(pack.forest)] * (-len(nodes) % ROUND)  # a spare row, again and again
        self.rows = torch.tensor(nodes + spare, device=decoder.device)
        cos, sin = before.rotary
        self.rotary, self.mask = (cos[self.rows], sin[self.rows]), before.mask[self.rows]
        self._decoder, self._before, self._factors = decoder, before, factors

    def targets(self, pack: Pack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Places among `rows` whose prediction is trained, the tokens wanted there, their weights."""
        places, wanted, weights = [], [], []
        for example, path in zip(pack.examples, pack.paths, strict=True):
            places += [self._place[path[target - 1]] for target in example.targets]
            wanted += [example.tokens[target] for target in example.targets]
            weights += [example.weight] * len(example.targets)
        device = self.rows.device
        return (
            torch.tensor(places, device=device),
            torch.tensor(wanted, device=device),
            torch.tensor(weights, device=device),
        )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        projected, x = self._before.kept[layer]
        if (found := self._factors(layer, "qkv")) is not None:
            update = (x @ found[0]) @ found[1]
            projected = projected + (update - update.detach())  # nothing but a gradient
        _, keys, values = self._decoder.heads(layer, projected, self._before.rotary)
        return attended(q, keys.index_copy(0, self.rows, k), values.index_copy(0, self.rows, v), self.mask)
