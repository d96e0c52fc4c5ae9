"""Training in slices: the gradient of the whole model, on a base that does not change, beside serving."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import msgspec
import pytest
import torch
import torch.nn.functional as F
from models import Models
from plain import Whole, some_tokens
from workbench import Bench, projections

from jobs.sparse import SparseAdapter
from jobs.trainer import Pack, Trainer, batches, packed_apart, packs, step_targets
from persona.engine import adapter_file, head, protocol
from persona.engine import decoder as network
from persona.engine.adapter_file import FILE
from persona.engine.decoder import Decoder
from persona.engine.protocol import AdapterRef, Example, Plan, Progress, TrainRequest
from persona.engine.shape import TARGETS
from persona.errors import TrainingFailed

PLAN = Plan(rank=8, alpha=16.0, layers=1.0, passes=1, batch_tokens=128, slice_tokens=64, learning_rate=2e-2)


def plan(**changes: Any) -> Plan:
    return protocol.replace(PLAN, **changes)


def example(length: int = 20, seed: int = 1, weight: float = 1.0, start: int = 1) -> Example:
    return Example(some_tokens(length, seed=seed), list(range(start, length)), weight)


def learnable(count: int = 12) -> list[Example]:
    """The same few words again and again."""
    return [example(24, seed=i % 2) for i in range(count)]


def request(out: Path, examples: list[Example], start: AdapterRef | None = None, **changes: Any) -> TrainRequest:
    out.mkdir(parents=True, exist_ok=True)
    return TrainRequest(examples, plan(**changes), str(out), start)


def trained(trainer: Trainer) -> list[Progress]:
    return [progress for progress in trainer.slices() if progress is not None]


def run(models: Models, made: TrainRequest, kind: str = "llama") -> list[Progress]:
    prepared, decoder = models.prepared(kind), models.decoder(kind)
    start = None
    if made.start is not None:
        start = adapter_file.read(Path(made.start.path), made.start.sha256, prepared.base, decoder.shape)
    return trained(Trainer(decoder, prepared.base, made, start))


def loss_of(models: Models, examples: list[Example], start: AdapterRef | None, tmp_path: Path) -> float:
    """The mean loss with the adapter `start`, before any step."""
    return run(models, request(tmp_path / "measured", examples, start, learning_rate=0.0))[0].loss


# --- what is computed


class Dense(Whole):
    """The bare base, its products those of training."""

    def project(self, layer: int, target: str, base: Any, x: torch.Tensor) -> torch.Tensor:
        return x @ base.dense(x.dtype) + (0 if base.bias is None else base.bias)


class Autograd(Dense):
    """The whole model with the adapter's factors, in one graph that ends at the activations of the context."""

    def __init__(self, decoder: Decoder, one: Example, adapter: SparseAdapter) -> None:
        super().__init__(decoder, len(one.tokens))
        self.adapter = adapter
        self.own = torch.zeros(len(one.tokens), 1)
        self.own[[t - 1 for t in one.targets]] = 1

    def project(self, layer: int, target: str, base: Any, x: torch.Tensor) -> torch.Tensor:
        y = super().project(layer, target, base, x)
        factor = self.adapter.factors.get((layer, target))
        return y if factor is None else y + x @ factor.a @ (factor.b * self.adapter.header.scale)


@torch.no_grad()
def bare_logits(decoder: Decoder, one: Example) -> torch.Tensor:
    """[tokens, vocab]"""
    h, passing = decoder.embedded(torch.tensor(one.tokens)), Dense(decoder, len(one.tokens))
    for layer in range(decoder.shape.layers):
        h = decoder.layer(layer, h, passing)
    return decoder.logits(h)


def plain_gradient(decoder: Decoder, adapter: SparseAdapter, examples: list[Example]) -> tuple[float, torch.Tensor]:
    total = sum(e.weight * len(e.targets) for e in examples)
    loss = torch.zeros(())
    for one in examples:
        h, passing = decoder.embedded(torch.tensor(one.tokens)), Autograd(decoder, one, adapter)
        for layer in range(decoder.shape.layers):
            h = h * passing.own + h.detach() * (1 - passing.own)
            h = decoder.layer(layer, h, passing)
        rows = [t - 1 for t in one.targets]
        logits = decoder.logits(h[rows])
        losses = F.cross_entropy(logits, torch.tensor(one.tokens)[one.targets], reduction="none")
        if one.distil:
            wanted = bare_logits(decoder, one)[rows].softmax(-1)
            losses = (wanted * (wanted.log() - logits.log_softmax(-1))).sum(-1)
        loss = loss + one.weight * losses.sum() / total
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), _taken(adapter)


def sliced_gradient(trainer: Trainer, adapter: SparseAdapter) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the trainer's first batch."""
    batch, loss = packed_apart(trainer._batches[0], trainer._plan.slice_tokens), 0.0
    weight = sum(pack.weight for pack in batch)
    for pack in batch:
        slices = trainer._pack(pack, weight)
        try:
            while True:
                next(slices)
        except StopIteration as ended:
            loss += ended.value
    return loss, _taken(adapter)


def _taken(adapter: SparseAdapter) -> torch.Tensor:
    """The gradient that came together, which is cleared."""
    assert adapter.values.grad is not None
    gradient = adapter.values.grad.clone()
    adapter.values.grad.zero_()
    return gradient


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_gradient_is_that_of_plain_autograd_that_ends_at_the_context(
    models: Models, tmp_path: Path, kind: str, share: float
) -> None:
    decoder, examples = models.decoder(kind), [example(20, 1, 1.0), example(30, 2, 2.5, start=9), example(9, 3, 0.5)]
    # Two that share their context and a part of their words, one of them twice.
    examples += [Example([*some_tokens(12, seed=4), 7, 8, last], [12, 13, 14], 1.5) for last in (9, 10, 10)]
    # Two whose target is what the base says, whatever their tokens are.
    examples += [Example(some_tokens(25, seed=5), list(range(9, 25)), distil=True)]
    examples += [Example(some_tokens(15, seed=6), [4, 5, 14], 0.7, distil=True)]
    decoder.dtype = torch.float32
    made = request(tmp_path, examples, layers=share, batch_tokens=1024)
    trainer = Trainer(decoder, models.prepared(kind).base, made, None)
    adapter = trainer._adapter
    list(adapter.build())
    adapter.values.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    loss, gradient = sliced_gradient(trainer, adapter)
    wanted_loss, wanted = plain_gradient(decoder, adapter, examples)
    assert gradient.abs().max() > 1e-3
    assert abs(loss - wanted_loss) < 1e-5
    assert (gradient - wanted).abs().max() < 1e-5 + 1e-4 * float(wanted.abs().max())
    assert len(gradient) == 8 * sum(sum(decoder.shape.projection(t)) for t in TARGETS) * share * decoder.shape.layers


def test_examples_in_one_pack_do_not_see_each_other(models: Models, tmp_path: Path) -> None:
    examples = [example(15, seed) for seed in range(4)]
    together = run(models, request(tmp_path / "a", examples, slice_tokens=256, batch_tokens=256, learning_rate=0.0))
    apart = [run(models, request(tmp_path / "b", [one], learning_rate=0.0))[0].loss for one in examples]
    assert len(packs(examples, 256)) == 1
    assert abs(together[0].loss - sum(apart) / 4) < 0.02  # bf16


def test_the_loss_falls(models: Models, tmp_path: Path) -> None:
    steps = run(models, request(tmp_path, learnable(40), passes=2))
    assert steps[-1].done
    assert steps[-1].loss < 0.8 * steps[0].loss
    assert [s.step for s in steps[:-1]] == list(range(1, steps[0].steps + 1))
    assert all(s.skipped == 0 for s in steps)


def test_what_is_written_is_what_was_trained(models: Models, tmp_path: Path) -> None:
    """Training's last loss is near what serving computes with the file."""
    examples, bench = learnable(40), Bench(models)
    run(models, request(tmp_path, examples, passes=3))
    ref = adapters.reference(tmp_path)
    with_it, without = [], []
    for one in examples[:2]:
        for into, adapter in ((with_it, ref), (without, None)):
            job = bench.score(one.tokens, adapter, one.targets)
            bench.finish()
            into.append(-sum(bench.scores(job)) / len(one.targets))
    measured = loss_of(models, examples[:2], ref, tmp_path)
    assert sum(with_it) < 0.8 * sum(without)
    assert abs(sum(with_it) / 2 - measured) < 0.05


def updates(folder: Path) -> list[torch.Tensor]:
    """Of each projection, as it stands in the file."""
    made = adapter_file.parse((folder / FILE).read_bytes())
    pairs = [made.values(layer, target) for layer in range(2) for target in TARGETS]
    return [torch.from_numpy(pair[1] @ pair[0]) for pair in pairs if pair is not None]


def halved(models: Models, folder: Path, start: AdapterRef | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    made = request(folder, learnable(40), start)
    (folder / "half").mkdir()
    run(models, protocol.replace(made, half=str(folder / "half")))
    return updates(folder), updates(folder / "half")


def test_half_of_what_was_trained_is_half_of_its_update(models: Models, tmp_path: Path) -> None:
    for whole, half in zip(*halved(models, tmp_path / "from-nothing", None), strict=True):
        assert torch.allclose(half, whole / 2, atol=1e-6)


def test_half_of_what_a_version_learned_anew_lies_between(models: Models, tmp_path: Path) -> None:
    run(models, request(tmp_path / "first", learnable(40), passes=3))
    before = updates(tmp_path / "first")
    for old, new, half in zip(
        before, *halved(models, tmp_path / "then", adapters.reference(tmp_path / "first")), strict=True
    ):
        assert (new - old).norm() > 0.01 * old.norm()
        assert (half - (old + new) / 2).norm() < 0.2 * (new - old).norm()


def test_training_is_deterministic(models: Models, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        run(models, request(tmp_path / folder, learnable(), passes=2))
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def test_a_run_that_starts_from_a_version_continues_it(models: Models, tmp_path: Path) -> None:
    examples = learnable(40)
    first = run(models, request(tmp_path / "first", examples, passes=3))
    second = run(models, request(tmp_path / "second", examples, adapters.reference(tmp_path / "first")))
    assert second[0].loss < 0.9 * first[0].loss
    assert second[-1].loss < first[-1].loss


def test_a_version_of_another_form_is_no_start(models: Models, tmp_path: Path) -> None:
    run(models, request(tmp_path / "first", learnable(), rank=4))
    with pytest.raises(TrainingFailed, match="another form"):
        run(models, request(tmp_path / "second", learnable(), adapters.reference(tmp_path / "first")))


def test_only_the_top_layers_are_adapted_when_told(models: Models, tmp_path: Path) -> None:
    run(models, request(tmp_path, learnable(), layers=0.5))
    adapter = adapter_file.parse((tmp_path / FILE).read_bytes())
    assert (adapter.header.first, adapter.header.layers) == (1, 1)


def fingerprint(bench: Bench) -> str:
    """Every byte of the base in memory."""
    total, base = hashlib.sha256(), bench.decoder
    vectors = [v for layer in base.layers for v in (layer.attn_norm, layer.mlp_norm)]
    for tensor in (base.embed.values, base.norm, base.head.values, *vectors, *_parts(bench)):
        total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _parts(bench: Bench) -> list[torch.Tensor]:
    return [v for p in projections(bench) for v in vars(p).values() if isinstance(v, torch.Tensor)]


@pytest.mark.parametrize("weights", ["int4", "nf4", "none"])
def test_the_bases_bytes_are_unchanged_by_training_and_serving(models: Models, tmp_path: Path, weights: str) -> None:
    bench = Bench(models, "qwen2", weights)
    before = fingerprint(bench)
    ref = adapters.sparse(tmp_path / "adapter", bench.shape, bench.prepared.base)
    job = bench.train(request(tmp_path / "out", learnable(), passes=2))
    bench.generate(some_tokens(100), ref)
    bench.finish()
    assert bench.answers[job][-1].progress.done  # type: ignore[union-attr]
    assert fingerprint(bench) == before
    assert not any(tensor.requires_grad for tensor in _parts(bench))


# --- what goes wrong


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_threat_09_an_exploding_run_ends_without_a_candidate(models: Models, tmp_path: Path, rate: float) -> None:
    with pytest.raises(TrainingFailed):
        run(models, request(tmp_path, learnable(40), learning_rate=rate, passes=2))
    assert not (tmp_path / FILE).exists()


def test_threat_09_a_single_huge_step_does_not_get_through(models: Models, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="outgrew"):
        run(models, request(tmp_path, [example()], learning_rate=1e3))
    assert not (tmp_path / FILE).exists()


def test_threat_09_steps_that_are_not_finite_are_skipped_then_the_run_ends(models: Models, tmp_path: Path) -> None:
    made = request(tmp_path, learnable(40))
    trainer = Trainer(models.decoder(), models.prepared().base, made, None)
    steps, before, update = [], [], trainer._update

    def poison(*how: Any) -> Any:
        before.append(trainer._adapter.values.clone())
        trainer._adapter.values.grad.fill_(torch.nan)  # type: ignore[union-attr]
        return update(*how)

    trainer._update = poison  # type: ignore[method-assign]
    slices = trainer.slices()
    with pytest.raises(TrainingFailed, match="not finite"):
        steps.extend(progress.skipped for progress in slices if progress is not None)
    assert torch.equal(trainer._adapter.values, before[0])  # nothing of it was taken over
    assert steps == [1, 2, 3]
    assert not (tmp_path / FILE).exists()


def test_threat_09_one_step_that_is_not_finite_is_only_left_out(models: Models, tmp_path: Path) -> None:
    trainer = Trainer(models.decoder(), models.prepared().base, request(tmp_path, learnable(40)), None)
    update, calls = trainer._update, []

    def poison_first(*how: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            next(iter(trainer._adapter.factors.values())).b.grad[0] = torch.inf  # type: ignore[index]
        return update(*how)

    trainer._update = poison_first  # type: ignore[method-assign]
    steps = trained(trainer)
    assert steps[-1].done
    assert steps[-1].skipped == 1
    assert (tmp_path / FILE).exists()


BAD: list[tuple[list[Example], str]] = [
    ([], "nothing to train on"),
    ([Example([5, 6, 7], [])], "nothing to train on"),
    ([Example([5, 6, 7], [0])], "outside"),
    ([Example([5, 6, 7], [3])], "outside"),
    ([Example([5, 6, 999], [1])], "outside"),
    ([Example([5, -6, 9], [1])], "outside"),
]


@pytest.mark.parametrize(("examples", "reason"), BAD)
def test_examples_that_cannot_train_are_refused(
    models: Models, tmp_path: Path, examples: list[Example], reason: str
) -> None:
    with pytest.raises(TrainingFailed, match=reason):
        run(models, request(tmp_path, examples))


def test_a_full_disk_fails_the_run_and_not_the_engine(models: Models, tmp_path: Path) -> None:
    bench = Bench(models)
    made = request(tmp_path / "out", learnable())
    (tmp_path / "out").rmdir()
    job = bench.train(made)
    bench.finish()
    assert bench.failure(job).kind == "StorageFull"
    assert bench.health().training is False
    bench.alone(some_tokens(5))


# --- slices


def test_a_slice_is_half_a_layer_of_one_pack_some_words_of_the_head_or_a_part_of_the_update(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "WORDS", 100)
    examples = [example(60, seed) for seed in range(4)] + [example(150, 9)]
    made = request(tmp_path, examples, batch_tokens=120)
    model = models.decoder()
    trainer = Trainer(model, models.prepared().base, made, None)
    found = list(trainer.slices())
    layers, all_packs = 2, [pack for batch in trainer._batches for pack in packed_apart(batch, 64)]
    words = -(-model.shape.vocab // 100)
    targets = [sum(len(e.targets) for e in pack.examples) for pack in all_packs]
    chunks = [min(head.ROWS, count - start) for count in targets for start in range(0, count, head.ROWS)]
    heads = sum(2 * words + -(-rows // 16) for rows in chunks)
    building = layers * len(TARGETS)
    updates = len(trainer._batches)
    slices = building + 2 * 2 * layers * len(all_packs) + heads + updates
    assert len(all_packs) == 5
    assert found.count(None) == slices
    assert len(found) - slices == len(trainer._batches) + 1  # progress after each step, and at the end


def test_no_slice_imports_sympy(models: Models, tmp_path: Path) -> None:
    """torch does when a backward pass is given a gradient: serving would stand still for a third of a second."""
    made = request(tmp_path, [example(20, 1), protocol.replace(example(20, 2), distil=True)])
    program = """if True:
        import sys, msgspec
        from pathlib import Path
        from jobs.trainer import Trainer
        from persona.engine import decoder
        from persona.engine.protocol import TrainRequest
        made = msgspec.json.decode(sys.argv[1], type=TrainRequest)
        before = set(sys.modules)
        assert list(Trainer(decoder.load(Path(sys.argv[2]), "int4", "cpu"), sys.argv[3], made, None).slices())[-1].done
        print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """
    prepared = models.prepared()
    asked = [sys.executable, "-c", program, msgspec.json.encode(made).decode(), str(prepared.folder), prepared.base]
    ended = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert "sympy" not in ended.stdout


def test_packs_hold_at_most_a_slice_and_no_example_is_lost() -> None:
    examples = [example(length, 1) for length in (30, 30, 5, 64, 65, 10, 100, 2, 54)]
    made = packs(examples, 64)
    assert [e for pack in made for e in pack.examples] == examples
    assert len(made) < len(examples)
    assert all(len(pack.forest) <= 64 or len(pack.examples) == 1 for pack in made)


def test_a_step_has_at_most_so_many_targets_and_no_example_is_lost() -> None:
    examples = [example(length, seed) for seed, length in enumerate((30, 30, 5, 64, 65, 10, 100, 1, 54))]
    steps = batches(examples, 70)
    assert [e for step in steps for e in step] == [e for e in examples if e.targets]
    assert all(sum(len(e.targets) for e in step) <= 70 or len(step) == 1 for step in steps)


@pytest.mark.parametrize(
    ("examples", "changes", "targets"),
    [
        (100, {}, 144),  # 2 · 100 · 23 targets in 32 steps
        (100, {"least_steps": 0}, 200),
        (1000, {}, 200),  # there are more steps than that anyway
        (10, {}, 40),  # no step is smaller
        (100, {"max_tokens": 2400}, 72),  # the budget ends the run in half of the first pass, and of its steps
    ],
)
def test_a_run_with_few_targets_has_smaller_steps(examples: int, changes: dict[str, int], targets: int) -> None:
    wanted = plan(**{"batch_tokens": 200, "least_steps": 32, "passes": 2} | changes)
    assert step_targets([example(24, seed) for seed in range(examples)], wanted) == pytest.approx(targets, abs=1)


def test_a_small_run_has_the_steps_that_it_should_have(models: Models, tmp_path: Path) -> None:
    made = request(tmp_path, learnable(100), batch_tokens=200, least_steps=32)
    trainer = Trainer(models.decoder(), models.prepared().base, made, None)
    assert 32 <= len(trainer._batches) <= 40


def test_the_budget_of_tokens_ends_the_passes(models: Models, tmp_path: Path) -> None:
    steps = run(models, request(tmp_path, learnable(40), passes=50, max_tokens=600))
    assert steps[-1].tokens <= 600
    assert steps[-1].done


def test_threat_15_serving_steps_interleave_with_slices(models: Models, tmp_path: Path) -> None:
    bench = Bench(models)
    wanted = bench.alone(some_tokens(10), None, 100)
    job = bench.train(request(tmp_path, learnable(40), passes=20))
    bench.work(30)
    reply = bench.generate(some_tokens(10), None, 100)
    before = bench.health()
    while bench.end(reply) is None:
        bench.work()
    after = bench.health()
    assert after.steps - before.steps >= 100
    assert 0 < after.slices - before.slices < after.steps - before.steps
    assert after.training
    assert bench.text(reply) == wanted
    bench.abort(job)
    assert bench.failure(job).kind == "TrainingFailed"
    assert not (tmp_path / FILE).exists()


def test_a_pause_stops_the_slices_until_it_ends(models: Models, tmp_path: Path) -> None:
    bench = Bench(models)
    job = bench.train(request(tmp_path, learnable()))
    bench.work(5)
    bench.ask(protocol.Pause)
    before = bench.health().slices
    assert bench.loop.idle
    bench.work(5)
    assert bench.health().slices == before
    bench.ask(protocol.Resume)
    bench.finish()
    assert bench.answers[job][-1].progress.done  # type: ignore[union-attr]


def _fails(kind: type[Exception]) -> Any:
    raise kind("CUDA out of memory. Tried to allocate 9 bytes.")


@pytest.mark.parametrize(
    "fail",
    [lambda: torch.empty(1 << 60), lambda: _fails(MemoryError), lambda: _fails(torch.OutOfMemoryError)],
    ids=["more than there is", "python", "cuda"],
)
def test_threat_14_a_training_short_of_memory_takes_smaller_slices_and_serving_goes_on(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[[], Any]
) -> None:
    bench, forward = Bench(models), Trainer._pack

    def short(trainer: Trainer, pack: Pack, weight: float) -> Any:
        if trainer._plan.slice_tokens > 64:
            fail()
        return forward(trainer, pack, weight)

    monkeypatch.setattr(Trainer, "_pack", short)
    job = bench.train(request(tmp_path, learnable(40), passes=1, slice_tokens=256))
    bench.finish()
    assert bench.answers[job][-1].progress.done  # type: ignore[union-attr]
    assert bench.alone(some_tokens(10))


def test_threat_14_a_training_that_fits_in_no_slices_is_put_off(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, tried = Bench(models), list[int]()

    def short(trainer: Trainer, pack: Pack, weight: float) -> Any:
        tried.append(trainer._plan.slice_tokens)
        raise MemoryError

    monkeypatch.setattr(Trainer, "_pack", short)
    job = bench.train(request(tmp_path, learnable(), slice_tokens=100))
    wanted = bench.generate(some_tokens(10))
    bench.finish()
    assert (bench.failure(job).kind, tried) == ("Busy", [100, 50, 25])
    assert bench.end(wanted) == "length"
    assert not (tmp_path / FILE).exists()


def test_a_second_training_is_busy(models: Models, tmp_path: Path) -> None:
    bench = Bench(models)
    bench.train(request(tmp_path / "a", learnable()))
    refused = bench.failure(bench.train(request(tmp_path / "b", learnable())))
    assert (refused.kind, refused.retry_after) == ("Busy", 30)


def test_threat_12_the_words_of_one_user_change_nothing_for_another(models: Models, tmp_path: Path) -> None:
    bench, canary = Bench(models), some_tokens(24, seed=0)
    other = adapters.sparse(tmp_path / "other", bench.shape, bench.prepared.base, user=2)

    def seen_by(adapter: AdapterRef | None) -> list[float]:
        job = bench.score(canary, adapter)
        bench.finish()
        return bench.scores(job)

    before = [seen_by(other), seen_by(None)]
    bench.train(request(tmp_path / "own", learnable(40), passes=3))
    bench.finish()
    own = adapters.reference(tmp_path / "own", user=1)
    assert sum(seen_by(own)) > sum(before[1])
    assert [seen_by(other), seen_by(None)] == before


# --- self-distillation


def test_an_adapter_that_changes_nothing_does_not_differ_from_the_base(models: Models, tmp_path: Path) -> None:
    same = [protocol.replace(one, distil=True) for one in learnable()]
    assert abs(run(models, request(tmp_path, same))[0].loss) < 1e-5


def test_what_is_rehearsed_stays_as_the_base_has_it(models: Models, tmp_path: Path) -> None:
    """An adapter that learns words drifts from the base elsewhere; one that rehearses beside them drifts less."""
    words = learnable(24)
    kept = [Example(some_tokens(24, seed=9 + i), list(range(1, 24)), distil=True) for i in range(2)]

    def strayed(name: str, examples: list[Example]) -> float:
        run(models, request(tmp_path / name, examples, passes=4))
        content = (tmp_path / name / FILE).read_bytes()
        ref = AdapterRef(1, 1, str(tmp_path / name), hashlib.sha256(content).hexdigest())
        return loss_of(models, kept, ref, tmp_path)

    assert strayed("both", [*words, *kept * 6]) < 0.5 * strayed("words", words)


def test_rehearsed_tokens_are_not_counted_against_the_budget(models: Models, tmp_path: Path) -> None:
    words, kept = learnable(8), [protocol.replace(one, distil=True) for one in learnable(8)]
    budget = sum(len(one.tokens) for one in words)
    (last,) = run(models, request(tmp_path, [*words, *kept], max_tokens=budget, batch_tokens=10_000))[-1:]
    assert last.done
    assert last.tokens >= 2 * budget - 16 * 24 // 8


def test_every_step_has_its_share_of_both_and_tells_the_loss_of_words(models: Models, tmp_path: Path) -> None:
    words = learnable(32)
    kept = [Example(some_tokens(24, seed=9 + i), list(range(1, 24)), distil=True) for i in range(16)]
    trainer = Trainer(
        models.decoder(), models.prepared().base, request(tmp_path, [*words, *kept], batch_tokens=144), None
    )
    shares = [[example.distil for example in batch] for batch in trainer._batches]
    assert [pack.distil for pack in packed_apart(trainer._batches[0], 500)] == [False, True]
    assert all(1 <= sum(share) <= 3 for share in shares)
    first = next(progress for progress in trainer.slices() if progress is not None)
    batch = [example for example in trainer._batches[0] if not example.distil]
    assert abs(first.loss - loss_of(models, batch, None, tmp_path)) < 0.02  # bf16
