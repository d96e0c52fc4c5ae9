"""A training that was stopped goes on to the very bytes of one that never was, or begins anew; nothing lies between."""

import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
from models import Models
from plain import some_tokens

from jobs.trainer import Trainer
from persona.engine import adapter_file, checkpoint_file, protocol
from persona.engine.adapter_file import FILE
from persona.engine.checkpoint_file import FILE as KEPT
from persona.engine.checkpoint_file import Header, State
from persona.engine.protocol import AdapterRef, Example, Plan, Progress, TrainRequest
from storage.failpoints import KILLED

PLAN = Plan(rank=8, alpha=16.0, layers=1.0, passes=2, batch_tokens=40, slice_tokens=64, learning_rate=5e-3)
STAGES = ["checkpoint-made", "checkpoint-written", "checkpoint-synced", "checkpoint-replaced"]
HERE = Path(__file__).parent


def examples(count: int = 12) -> list[Example]:
    return [Example(some_tokens(24, seed=seed), list(range(4, 24))) for seed in range(count)]


def request(home: Path, start: AdapterRef | None = None, **changes: Any) -> TrainRequest:
    """A training that writes into `home`/out and keeps its state in `home`/kept."""
    for name in ("out", "kept"):
        (home / name).mkdir(parents=True, exist_ok=True)
    made = TrainRequest(examples(), PLAN, str(home / "out"), start, str(home / "kept"))
    return protocol.replace(made, **changes)


def trainer(models: Models, made: TrainRequest, share: float = math.inf) -> Trainer:
    decoder, base, start = models.decoder(), models.prepared().base, None
    if made.start is not None:
        start = adapter_file.read(Path(made.start.path), made.start.sha256, base, decoder.shape)
    return Trainer(decoder, base, made, start, share)


def steps(models: Models, made: TrainRequest, until: int = 10**6, share: float = math.inf) -> list[Progress]:
    """Train, and stop after the step `until`."""
    found: list[Progress] = []
    slices = trainer(models, made, share).slices()
    for progress in slices:
        if progress is not None:
            found.append(progress)
            if progress.step >= until and not progress.done:
                slices.close()  # type: ignore[attr-defined]
                break
    return found


@pytest.fixture
def straight(models: Models, tmp_path: Path) -> bytes:
    """The adapter of a training that was never stopped."""
    made = request(tmp_path / "straight", checkpoint="")
    assert steps(models, made)[-1].done
    return Path(made.out, FILE).read_bytes()


@pytest.mark.parametrize("until", [1, 2, 6, 11, 12])
def test_a_training_that_was_stopped_ends_in_the_same_bytes(
    models: Models, tmp_path: Path, straight: bytes, until: int
) -> None:
    made = request(tmp_path / "stopped")
    before = steps(models, made, until)
    after = steps(models, made)
    assert (before[-1].step, before[0].steps) == (until, 12)
    assert [progress.step for progress in after] == [*range(until + 1, 13), 12]
    assert all(progress.resumed == until for progress in after)
    assert after[-1].tokens == 12 * 48
    assert after[-1].seconds > before[-1].seconds
    assert Path(made.out, FILE).read_bytes() == straight


def test_a_training_may_be_stopped_after_every_single_step(models: Models, tmp_path: Path, straight: bytes) -> None:
    made = request(tmp_path / "stopped")
    for until in range(1, 13):
        assert steps(models, made, until)[-1].step == until
    assert steps(models, made)[-1].done
    assert Path(made.out, FILE).read_bytes() == straight


def test_a_training_that_goes_on_from_a_version_can_be_stopped_too(models: Models, tmp_path: Path) -> None:
    first = request(tmp_path / "first", checkpoint="")
    steps(models, first)
    start = adapters.reference(Path(first.out))
    whole, parts = request(tmp_path / "whole", start), request(tmp_path / "parts", start)
    steps(models, whole)
    steps(models, parts, until=5)
    assert steps(models, parts)[0].resumed == 5
    assert Path(parts.out, FILE).read_bytes() == Path(whole.out, FILE).read_bytes()


def test_steps_that_were_left_out_are_remembered(models: Models, tmp_path: Path) -> None:
    made = request(tmp_path)
    one = trainer(models, made)
    update, calls = one._update, []

    def poison_first(*how: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            next(iter(one._adapter.factors.values())).b.grad[0] = math.inf  # type: ignore[index]
        return update(*how)

    one._update = poison_first  # type: ignore[method-assign]
    slices = one.slices()
    while (progress := next(slices)) is None or progress.step < 3:
        pass
    state = checkpoint_file.read(tmp_path / "kept", checkpoint_file.fingerprint(made, models.prepared().base))
    assert state is not None
    assert (state.header.skipped, state.header.updates, state.header.step) == (1, 2, 3)
    assert steps(models, made)[-1].skipped == 1


# --- what is not gone on from

OTHERS: dict[str, Callable[[TrainRequest], TrainRequest]] = {
    "an example was deleted": lambda made: protocol.replace(made, examples=made.examples[1:]),
    "an example has another context": lambda made: protocol.replace(
        made, examples=[protocol.replace(made.examples[0], targets=[5]), *made.examples[1:]]
    ),
    "another order": lambda made: protocol.replace(made, examples=made.examples[::-1]),
    "another plan": lambda made: protocol.replace(made, plan=protocol.replace(PLAN, learning_rate=1e-3)),
    "another budget": lambda made: protocol.replace(made, plan=protocol.replace(PLAN, max_tokens=300)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_request_is_removed_and_the_training_begins_anew(
    models: Models, tmp_path: Path, what: str
) -> None:
    made = request(tmp_path / "stopped")
    steps(models, made, until=4)
    other = OTHERS[what](made)
    next(trainer(models, other).slices())
    assert list(Path(made.checkpoint).iterdir()) == []
    found = steps(models, other)
    assert (found[0].step, found[0].resumed) == (1, 0)


def test_another_base_or_start_is_another_request(tmp_path: Path) -> None:
    made, start = request(tmp_path), AdapterRef(1, 1, "somewhere", "a" * 64)
    names = {
        checkpoint_file.fingerprint(made, "base"),
        checkpoint_file.fingerprint(made, "other"),
        checkpoint_file.fingerprint(protocol.replace(made, start=start), "base"),
        checkpoint_file.fingerprint(protocol.replace(made, start=protocol.replace(start, sha256="b" * 64)), "base"),
    }
    assert len(names) == 4
    moved = protocol.replace(made, out="elsewhere", checkpoint="too", start=protocol.replace(start, path="moved"))
    assert checkpoint_file.fingerprint(moved, "base") in names


def damages() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "empty": lambda content: b"",
        "short": lambda content: content[: len(content) // 2],
        "a flipped bit": lambda content: content[:-9] + bytes([content[-9] ^ 4]) + content[-8:],
        "no header": lambda content: b"\xff" * 64,
        "no state": lambda content: content.replace(b'\\"step\\"', b'\\"stop\\"'),
    }


@pytest.mark.parametrize("how", damages())
def test_a_damaged_checkpoint_is_removed_and_the_training_begins_anew(
    models: Models, tmp_path: Path, straight: bytes, how: str
) -> None:
    made = request(tmp_path / "stopped")
    steps(models, made, until=4)
    file = Path(made.checkpoint, KEPT)
    file.write_bytes(damages()[how](file.read_bytes()))
    found = steps(models, made)
    assert (found[0].step, found[-1].resumed) == (1, 0)
    assert Path(made.out, FILE).read_bytes() == straight


# --- the disk


def test_a_folder_that_is_taken_away_costs_the_state_and_not_the_run(
    models: Models, tmp_path: Path, straight: bytes
) -> None:
    made = request(tmp_path / "stopped")
    slices = trainer(models, made).slices()
    while (progress := next(slices)) is None or progress.step < 3:
        pass
    (tmp_path / "stopped/kept").rename(tmp_path / "stopped/gone")
    assert [one for one in slices if one is not None][-1].done
    assert not (tmp_path / "stopped/kept").exists()
    assert Path(made.out, FILE).read_bytes() == straight


def test_a_disk_that_takes_nothing_more_costs_the_state_and_not_the_run(models: Models, tmp_path: Path) -> None:
    made = request(tmp_path / "stopped")
    Path(made.checkpoint, KEPT).mkdir()  # nothing can take its place
    assert steps(models, made)[-1].done
    assert [path.name for path in Path(made.checkpoint).iterdir()] == [KEPT], "half a state would fill it further"


def test_a_disk_that_fills_up_while_a_state_is_written_gets_its_space_back(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = request(tmp_path / "stopped")
    monkeypatch.setattr(os, "fsync", full)
    slices = trainer(models, made).slices()
    while (progress := next(slices)) is None or progress.step < 3:
        pass
    assert list(Path(made.checkpoint).iterdir()) == []


@pytest.mark.parametrize("stage", STAGES)
def test_threat_07_killed_while_it_is_written_the_state_is_whole_or_the_one_before(
    models: Models, tmp_path: Path, straight: bytes, stage: str
) -> None:
    made = request(tmp_path / "killed")
    steps(models, made, until=4)
    prepared = models.prepared()
    child = subprocess.run(
        [sys.executable, HERE / "train_me.py", prepared.folder, prepared.base, made.out, made.checkpoint],
        env={**os.environ, "PERSONA_FAILPOINT": stage, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}:{HERE.parent}"},
        timeout=120,
        check=False,
    )
    assert child.returncode == KILLED
    found = steps(models, made)
    assert found[0].resumed == 4 + (stage == "checkpoint-replaced")
    assert Path(made.out, FILE).read_bytes() == straight
    assert [path.name for path in Path(made.checkpoint).iterdir()] == [KEPT]


def test_keeping_costs_a_small_share_of_the_training(models: Models, tmp_path: Path) -> None:
    """With no share to spend, the state is kept once: what it costs is known then."""
    made = request(tmp_path)
    steps(models, made, share=0.0)
    file = Path(made.checkpoint, KEPT)
    state = checkpoint_file.read(file.parent, checkpoint_file.fingerprint(made, models.prepared().base))
    assert state is not None
    assert state.header.step == 1


def test_a_state_says_what_it_is_and_holds_no_word(tmp_path: Path) -> None:
    head = Header("r" * 64, 3, math.nan, 0.0, math.inf, 100, 1.5, 1, 2)
    values = {"values": np.arange(5, dtype=np.float32), "mean": np.ones(5, np.float32)}
    assert list(checkpoint_file.write(tmp_path, State(head, values))) == ["made", "written", "synced", "replaced"]
    found = checkpoint_file.read(tmp_path, "r" * 64)
    assert found is not None
    assert math.isnan(found.header.loss)
    assert replace(found.header, loss=0.0, sha256="") == replace(head, loss=0.0)
    assert all((found.tensors[name] == values[name]).all() for name in values)
    assert checkpoint_file.read(tmp_path, "s" * 64) is None
    assert list(tmp_path.iterdir()) == []
