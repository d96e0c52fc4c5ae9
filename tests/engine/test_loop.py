"""The engine's loop: many users in one step, each as if alone; whoever leaves takes nothing along.

Whoever stands beside a row, its log-probabilities are those alone: bit-equal by the compiled step (int4), and within
0.05 of them at most in plain torch, whatever the weights' form, as batched products round differently in bf16 (1e-4 in
fp32). There, too, rows of the bare base in int4 come out of the last layer bit-equal.
"""

import gc
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
from models import Models
from parts import program
from plain import logits, some_tokens
from workbench import ADAPTER, PAGE, Bench

from persona.engine import protocol, sampler
from persona.engine.lora import Resident
from persona.engine.protocol import AdapterRef, Chunk, Piece
from persona.engine.reply import Generation
from persona.engine.runner import Result
from persona.engine.sequence import Segment, Sequence

CLOSE = 0.05
# Form of the weights, type that is computed in, the compiled step or plain torch; how far replies may differ at most.
PATHS = [
    ("int4", None, True, 0.0),
    ("int4", None, False, CLOSE),
    ("nf4", None, False, CLOSE),
    ("none", None, False, CLOSE),
    ("nf4", torch.float32, False, 1e-4),
    ("none", torch.float32, False, 1e-4),
]


@pytest.fixture
def bench(models: Models) -> Bench:
    return Bench(models)


def adapter(bench: Bench, folder: Path, user: int, number: int = 1, **options: float) -> AdapterRef:
    place = folder / f"{user}-{number}"
    return adapters.sparse(place, bench.shape, bench.prepared.base, user=user, number=number, **options)  # type: ignore[arg-type]


@pytest.fixture
def refs(bench: Bench, tmp_path: Path) -> list[AdapterRef]:
    """Adapters of several ranks and forms, one user each."""
    sizes = [(1, 8), (2, 8), (3, 16), (4, 4), (5, 8)]
    made = [adapter(bench, tmp_path, user, rank=rank) for user, rank in sizes]
    made.append(adapters.lora(tmp_path / "6", bench.shape, bench.prepared.base, user=6))
    return [*made, adapter(bench, tmp_path, 7, layers=1)]


# --- what is computed


@pytest.mark.parametrize("weights", ["int4", "nf4", "none"])
@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 63, 64, 65, 150])
def test_cached_and_chunked_scores_are_those_of_the_whole_sequence(models: Models, weights: str, length: int) -> None:
    bench, tokens = Bench(models, weights=weights), some_tokens(length + 1)
    found = bench.score(tokens)
    bench.finish()
    whole = logits(bench.decoder, tokens).log_softmax(-1)
    wanted = whole[range(length), tokens[1:]]
    assert (torch.tensor(bench.scores(found)) - wanted).abs().mean() < CLOSE


def test_a_greedy_reply_is_the_likeliest_continuation_token_by_token(bench: Bench) -> None:
    prompt = some_tokens(20)
    grown = list(prompt)
    for _ in range(15):
        grown.append(int(logits(bench.decoder, grown)[-1].argmax()))
    assert bench.alone(prompt, None, 15) == bench.loop._text.decode(grown[20:])


@pytest.mark.parametrize(("weights", "dtype", "compiled", "most"), PATHS)
def test_rows_with_other_adapters_and_ranks_in_one_step_equal_each_alone(
    models: Models, tmp_path: Path, weights: str, dtype: torch.dtype | None, compiled: bool, most: float
) -> None:
    """Prompts as they are scored, which is done in plain torch, and replies, which come by prompts and decode rows."""
    if compiled:
        program("cc")
    bench = Bench(models, weights=weights, dtype=dtype, compiled=compiled, pages=2000)
    some: list[AdapterRef | None] = [
        adapter(bench, tmp_path, rank, rank=rank, alpha=2.0 * rank, size=1.0 / rank**0.5) for rank in (8, 16, 4, 64)
    ]
    some += [adapters.lora(tmp_path / "uneven", bench.shape, bench.prepared.base, user=99), None]
    asked = [(some_tokens(30 + 7 * i, seed=i), ref) for i, ref in enumerate(some)]

    def score(tokens: list[int], ref: AdapterRef | None) -> int:
        return bench.score(tokens, ref)

    def reply(tokens: list[int], ref: AdapterRef | None) -> int:
        return bench.generate(tokens, ref, 8, logprobs=0, ignore_eos=True)

    def told(job: int) -> list[tuple[int, float]]:
        pieces = [piece for piece in bench.answers[job] if isinstance(piece, Piece)]
        return [(one.token, one.logprob) for piece in pieces for one in piece.chunk.logprobs]

    for ask, read, bound in (
        (score, lambda job: list(enumerate(bench.scores(job))), most or CLOSE),
        (reply, told, most),
    ):
        alone = []
        for tokens, ref in asked:
            alone.append(ask(tokens, ref))
            bench.finish()
        together = [ask(tokens, ref) for tokens, ref in asked]
        bench.finish()
        for one, other in zip(map(read, alone), map(read, together), strict=True):
            assert [token for token, _ in one] == [token for token, _ in other]
            assert len(one) >= 8
            assert max(abs(a - b) for (_, a), (_, b) in zip(one, other, strict=True)) <= bound


def test_decode_rows_with_other_adapters_beside_them_say_what_they_say_alone(
    bench: Bench, refs: list[AdapterRef]
) -> None:
    prompts = [some_tokens(9 + 5 * i, seed=i) for i in range(len(refs))]
    alone = [bench.alone(prompt, ref, 6) for prompt, ref in zip(prompts, refs, strict=True)]
    jobs = [bench.generate(prompt, ref, 6) for prompt, ref in zip(prompts, refs, strict=True)]
    bench.finish()
    assert [bench.text(job) for job in jobs] == alone
    assert len(set(alone)) == len(alone)


def test_an_adapter_changes_what_is_computed(bench: Bench, refs: list[AdapterRef]) -> None:
    tokens = some_tokens(40)
    jobs = [bench.score(tokens, ref) for ref in [*refs, None]]
    bench.finish()
    sums = [round(sum(bench.scores(job)), 2) for job in jobs]
    assert len(set(sums)) == len(sums)


def hidden(bench: Bench, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Collect the last hidden state and the logits of every decode row of the bare base."""
    result = bench.loop._runner._result

    def watch(h: torch.Tensor, decode: list[Sequence], prefill: list[Segment]) -> Result:
        found = result(h, decode, prefill)
        rows = [row for row, sequence in enumerate(decode) if sequence.adapter is None]
        seen.extend((h[row].clone(), found.logits[row].clone()) for row in rows)
        return found

    bench.loop._runner._result = watch  # type: ignore[method-assign]


@pytest.mark.parametrize("page", [16, 32])
def test_base_rows_beside_adapters_are_bit_equal_to_the_base_alone(
    models: Models, refs: list[AdapterRef], page: int
) -> None:
    """int4, at most 80 rows a step, whole vectors of keys a page: no bit of the network depends on who else is there.

    Plain torch: its fp32 product of the head rounds its last bit by the number of rows, so logits agree within 1e-5.
    """
    bench, prompt = Bench(models, page=page, compiled=False), some_tokens(17)
    alone: list[tuple[torch.Tensor, torch.Tensor]] = []
    hidden(bench, alone)
    wanted = bench.alone(prompt, None, 20)
    among: list[tuple[torch.Tensor, torch.Tensor]] = []
    hidden(bench, among)
    alone = list(alone)
    for i, ref in enumerate(refs):
        bench.generate(some_tokens(2 + 9 * i, seed=i), ref, 60)
    bench.work(8)
    job = bench.generate(prompt, None, 20)
    bench.finish()
    assert bench.text(job) == wanted
    assert len(alone) == len(among) == 19
    assert all(torch.equal(a[0], b[0]) for a, b in zip(alone, among, strict=True))
    assert max(float((a[1] - b[1]).abs().max()) for a, b in zip(alone, among, strict=True)) < 1e-5


def test_a_reply_that_ignores_the_end_of_text_is_as_long_as_asked_beside_one_that_ends(models: Models) -> None:
    bench, prompt = Bench(models), some_tokens(20)
    likeliest = int(logits(bench.decoder, prompt)[-1].argmax())
    bench = Bench(models, eos=frozenset([likeliest, 2]))
    ending, going_on = bench.generate(prompt, None, 9), bench.generate(prompt, None, 9, ignore_eos=True)
    bench.finish()
    assert bench.end(ending) == "stop"
    assert bench.text(ending) == ""
    assert bench.end(going_on) == "length"
    (*_, last) = bench.answers[going_on]
    assert isinstance(last, Piece)
    assert last.chunk.tokens == 9
    assert bench.loop._text.decode([likeliest]) not in bench.text(going_on)


# --- one request's trouble


def test_an_adapter_that_computes_nan_ends_only_its_own_request(bench: Bench, tmp_path: Path) -> None:
    prompt = some_tokens(20)
    wanted = bench.alone(prompt)
    sick = adapter(bench, tmp_path, 1, alpha=1e36, size=100.0)
    well = bench.generate(prompt)
    ill = bench.generate(prompt, sick)
    later = bench.generate(prompt)
    bench.finish()
    assert bench.end(ill) == "error"
    assert bench.text(ill) == ""
    assert isinstance(bench.answers[ill][-1], Piece)
    assert bench.answers[ill][-1].chunk.kind == "Unprocessable"  # nothing against its file: no quarantine
    assert bench.text(well) == bench.text(later) == wanted
    assert bench.alone(prompt) == wanted  # its pages are clean again


@pytest.mark.parametrize("where", ["run", "draw"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), AssertionError("a kernel's"), TypeError("a bug")])
def test_a_step_that_fails_ends_its_requests_and_no_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    prompt = some_tokens(20)
    wanted = bench.alone(prompt)

    def fails(*_: Any) -> None:
        raise error

    jobs = [bench.generate(prompt), bench.generate(prompt)]
    bench.work(3)
    with monkeypatch.context() as now:
        now.setattr(*((bench.loop._runner, "run") if where == "run" else (sampler, "draw")), fails)
        bench.work()
    assert [bench.end(job) for job in jobs] == ["error"] * 2
    for job in jobs:
        last = bench.answers[job][-1]
        assert isinstance(last, Piece)
        assert ("memory" in str(last.chunk.error)) is isinstance(error, torch.OutOfMemoryError)
    assert bench.alone(prompt) == wanted


def test_a_service_that_is_gone_ends_the_loop_without_a_word(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    def gone(_: Any) -> None:
        raise BrokenPipeError

    bench.loop._send = bench.loop._underway._send = gone
    with pytest.raises(BrokenPipeError):
        bench.ask(protocol.Ping)
    bench.generate(some_tokens(5))
    with pytest.raises(BrokenPipeError):
        bench.work(5)
    assert capsys.readouterr().out == ""


def test_a_lost_device_ends_the_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a new one can use the device again: whoever started the engine sees it end, and starts another."""

    def fails(*_: Any) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    bench.generate(some_tokens(20))
    monkeypatch.setattr(bench.loop._runner, "run", fails)
    with pytest.raises(torch.AcceleratorError):
        bench.work()


def test_key_values_are_never_reused_by_another_sequence(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=5)  # every sequence gets the pages of the one before
    wanted = {seed: Bench(models).alone(some_tokens(20, seed=seed)) for seed in range(3)}
    sick = adapter(bench, tmp_path, 1, alpha=1e36, size=100.0)
    for seed in range(3):
        bench.alone(some_tokens(20, seed=9), sick)
        assert bench.alone(some_tokens(20, seed=seed)) == wanted[seed]
    bench.memory.bytes.fill_(0xFF)  # NaN in every type
    assert bench.alone(some_tokens(20, seed=0)) == wanted[0]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_an_abort_at_any_time_frees_the_pages(models: Models, steps: int) -> None:
    bench = Bench(models, prefill=16)  # a prompt of 40 tokens takes three steps
    job = bench.generate(some_tokens(40), count=50)
    other = bench.generate(some_tokens(10), count=30)
    bench.work(steps)
    bench.abort(job)
    assert bench.end(job) == "abort"
    bench.finish()
    assert bench.end(other) == "length"


def test_an_abort_of_a_score_frees_its_pages_and_says_so(bench: Bench) -> None:
    job = bench.score(some_tokens(200))
    bench.work()
    bench.abort(job)
    assert bench.failure(job).kind == "Busy"
    bench.finish()


def test_an_abort_of_what_has_ended_is_ignored(bench: Bench) -> None:
    job = bench.generate(some_tokens(5), count=1)
    bench.finish()
    bench.abort(job)
    bench.abort(12345)
    assert len([a for a in bench.answers[job] if isinstance(a, Piece) and a.chunk.finish]) == 1


@pytest.mark.parametrize(("prompt", "reply"), [(500, 13), (1, 512), (513, 1)])
def test_a_prompt_that_cannot_fit_is_refused_with_openais_code(bench: Bench, prompt: int, reply: int) -> None:
    failed = bench.failure(bench.generate(some_tokens(prompt), count=reply))
    assert (failed.kind, failed.code) == ("TooLarge", "context_length_exceeded")
    assert bench.loop.idle


def test_what_exceeds_all_pages_is_refused_and_does_not_wait_forever(models: Models) -> None:
    bench = Bench(models, pages=4)
    assert bench.failure(bench.generate(some_tokens(30), count=3)).kind == "TooLarge"
    bench.alone(some_tokens(29), None, 3)


def test_a_full_waiting_room_is_busy(models: Models) -> None:
    bench = Bench(models, running=1, waiting=2)
    jobs = [bench.generate(some_tokens(5), count=4) for _ in range(2)]
    refused = bench.failure(bench.generate(some_tokens(5), count=4))
    assert refused.kind == "Busy"
    assert refused.retry_after > 0
    bench.finish()
    assert [bench.end(job) for job in jobs] == ["length", "length"]


@pytest.mark.parametrize("targets", [[0], [-1], [3, 2], [2, 2], [5], [1, 5]])
def test_targets_outside_the_tokens_are_refused(bench: Bench, targets: list[int]) -> None:
    assert bench.failure(bench.score([5, 6, 7, 8, 9], targets=targets)).kind == "RequestError"


def test_an_empty_prompt_is_refused(bench: Bench) -> None:
    assert bench.failure(bench.generate([])).kind == "RequestError"


def test_a_step_that_runs_out_of_memory_ends_its_requests_and_the_engine_goes_on(bench: Bench) -> None:
    prompt, run = some_tokens(10), bench.loop._runner.run
    wanted = bench.alone(prompt)
    job, scored = bench.generate(prompt), bench.score(prompt)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("not enough")

    bench.loop._runner.run = full  # type: ignore[method-assign,assignment]
    bench.work()
    bench.loop._runner.run = run  # type: ignore[method-assign]
    assert bench.end(job) == "error"
    assert bench.failure(scored).kind == "Busy"
    assert bench.alone(prompt) == wanted


# --- replies


def test_pieces_come_in_order_and_the_last_one_says_why(bench: Bench) -> None:
    job = bench.generate(some_tokens(10), count=20)
    bench.finish()
    chunks = [a.chunk for a in bench.answers[job] if isinstance(a, Piece)]
    assert [c.tokens for c in chunks] == sorted(c.tokens for c in chunks)
    assert [c.finish for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1].tokens == 20


@pytest.mark.parametrize("count", [1, 2])
def test_a_reply_of_very_few_tokens_is_complete(bench: Bench, count: int) -> None:
    job = bench.generate(some_tokens(10), count=count)
    bench.finish()
    assert bench.end(job) == "length"
    assert bench.answers[job][-1].chunk.tokens == count  # type: ignore[union-attr]


def test_a_stop_string_ends_the_reply_before_it(bench: Bench) -> None:
    whole = bench.alone(some_tokens(10), None, 30)
    stop = whole[10:13]
    job = bench.generate(some_tokens(10), None, 30, stop=(stop,))
    bench.finish()
    assert bench.end(job) == "stop"
    assert bench.text(job) == whole[: whole.index(stop)]


def test_an_end_token_ends_the_reply_unseen(models: Models) -> None:
    bench = Bench(models)
    following = int(logits(bench.decoder, some_tokens(10))[-1].argmax())
    bench.loop._underway._eos = frozenset([following])
    job = bench.generate(some_tokens(10), count=8)
    bench.finish()
    assert (bench.end(job), bench.text(job)) == ("stop", "")


def test_a_seeded_reply_is_the_same_again(bench: Bench) -> None:
    options = {"temperature": 1.0, "top_p": 0.9}
    first = bench.alone(some_tokens(10), None, 12, seed=4, **options)
    assert bench.alone(some_tokens(10), None, 12, seed=4, **options) == first
    assert bench.alone(some_tokens(10), None, 12, seed=5, **options) != first


# --- versions


def test_threat_08_a_request_keeps_its_version_across_flip_and_drop(bench: Bench, tmp_path: Path) -> None:
    old, new = (adapter(bench, tmp_path, 1, number) for number in (1, 2))
    prompt = some_tokens(12)
    wanted = [bench.alone(prompt, ref, 20) for ref in (old, new)]
    assert wanted[0] != wanted[1]
    job = bench.generate(prompt, old, 20)
    bench.work(5)
    bench.ask(lambda j: protocol.Stage(j, new))
    bench.ask(lambda j: protocol.Flip(j, new))
    other = bench.generate(prompt, new, 20)
    bench.work(3)
    bench.ask(lambda j: protocol.Drop(j, 1))
    bench.finish()
    assert [bench.text(job), bench.text(other)] == wanted


def test_threat_08_many_streams_across_many_swaps_are_each_of_one_version(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, running=8)
    versions = [adapter(bench, tmp_path, 1, number) for number in range(1, 6)]
    prompt = some_tokens(12)
    wanted = [bench.alone(prompt, ref, 10) for ref in versions]
    jobs: list[tuple[int, int]] = []
    for swap in range(20):
        now = swap % 5
        bench.ask(lambda j, ref=versions[now]: protocol.Flip(j, ref))
        jobs += [(now, bench.generate(prompt, versions[now], 10)) for _ in range(2)]
        bench.work(2)
    bench.finish()
    assert all(bench.text(job) == wanted[version] for version, job in jobs)


def test_threat_06_a_corrupt_version_is_refused_and_nothing_changes(bench: Bench, tmp_path: Path) -> None:
    good = adapter(bench, tmp_path, 1)
    bench.ask(lambda j: protocol.Stage(j, good))
    bad = adapter(bench, tmp_path, 1, 2)
    file = Path(bad.path) / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    for make in (protocol.Stage, protocol.Flip):
        assert bench.failure(bench.ask(lambda j, m=make: m(j, bad))).kind == "AdapterError"
    assert bench.failure(bench.generate(some_tokens(5), bad)).kind == "AdapterError"
    assert bench.health().resident == 1
    assert bench.loop.idle


def test_versions_leave_when_memory_is_short_but_not_those_in_use(models: Models, tmp_path: Path) -> None:
    bench = Bench(models, pages=2 * ADAPTER + 4)
    refs = [adapter(bench, tmp_path, user) for user in range(1, 6)]
    wanted = [bench.alone(some_tokens(8), ref, 6) for ref in refs]
    assert bench.health().resident == 2
    jobs = [bench.generate(some_tokens(8), ref, 6) for ref in refs]
    running = []
    while not bench.loop.idle:
        bench.work()
        running.append(bench.health().running)
    assert max(running) == 2
    assert [bench.text(job) for job in jobs] == wanted


def test_loads_are_counted_and_a_resident_adapter_is_not_loaded_again(models: Models, tmp_path: Path) -> None:
    bench = Bench(models)
    refs = [adapter(bench, tmp_path, user) for user in (1, 2)]
    for ref in [*refs, *refs]:
        bench.alone(some_tokens(8), ref, 2)
    size = sum(one.nbytes() for one in bench.tiers.shelf.filled)
    health = bench.health()
    assert (health.loads, health.loaded_bytes, health.resident_bytes) == (2, size, size)
    bench.ask(lambda j: protocol.Drop(j, 1))
    bench.alone(some_tokens(8), refs[0], 2)
    health = bench.health()
    assert (health.loads, health.loaded_bytes, health.resident_bytes) == (3, size + size // 2, size)


def test_threat_32_dropping_a_user_leaves_nothing_of_them_in_memory(bench: Bench, refs: list[AdapterRef]) -> None:
    for ref in refs:
        bench.ask(lambda j, ref=ref: protocol.Stage(j, ref))
    bench.alone(some_tokens(8), refs[0])
    gc.collect()
    others = len(_residents()) - len(refs)  # of tests before this one
    bench.ask(lambda j: protocol.Drop(j, refs[0].user_id))
    assert bench.health().resident == len(refs) - 1
    gc.collect()
    assert len(_residents()) == others + len(refs) - 1


def _residents() -> list[Resident]:
    """Every adapter that is anywhere in this process's memory."""
    return [found for found in gc.get_objects() if type(found) is Resident]


def test_threat_32_after_a_drop_the_users_logits_are_the_bases_bit_for_bit(
    bench: Bench, refs: list[AdapterRef]
) -> None:
    tokens = some_tokens(30)
    before = bench.score(tokens)
    bench.finish()
    bench.alone(tokens, refs[0])
    bench.ask(lambda j: protocol.Drop(j, refs[0].user_id))
    after = bench.score(tokens)
    bench.finish()
    assert bench.scores(before) == bench.scores(after)


def test_what_nobody_thought_of_ends_the_request_in_which_it_happens(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(models)
    well = bench.generate(some_tokens(10), count=4)
    bench.work()
    admission = bench.loop._admission
    monkeypatch.setattr(admission, "generation", lambda job, request: {}["nobody thought of this"])
    failed = bench.generate(some_tokens(10))
    monkeypatch.undo()
    assert (bench.failure(failed).kind, "log says how" in bench.failure(failed).message) == ("EngineDown", True)
    bench.finish()
    assert bench.end(well) == "length"


def test_a_reply_that_fails_in_a_step_ends_and_those_beside_it_go_on(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(models)
    broken, well = (bench.generate(some_tokens(10, seed=seed), count=6) for seed in (1, 2))
    bench.work(2)
    add = Generation.add

    def fails(self: Generation, *told: Any) -> Chunk | None:
        if self.sequence.id == broken:
            raise ValueError("a byte that no text has")
        return add(self, *told)

    monkeypatch.setattr(Generation, "add", fails)
    bench.finish()
    assert [bench.end(job) for job in (broken, well)] == ["error", "length"]
    bench.loop.check()
