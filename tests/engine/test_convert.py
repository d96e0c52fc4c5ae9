"""From a checkpoint to a prepared folder: whole or not at all, and never for a network that we compute wrongly."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import Models, config, tokenizer, write_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MixtralConfig

from persona.engine import convert, prepare
from persona.engine.prepare import Prepared
from persona.engine.shape import Shape
from persona.errors import ModelError


def fetch(folder: Path, cache: Path, weights: str = "int4") -> Prepared:
    return prepare.fetch(str(folder), cache, weights, lambda what, share: None)


@pytest.fixture
def checkpoint(models: Models, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(models.checkpoint(), tmp_path / "checkpoint")


def spoil(checkpoint: Path, **changes: Any) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def supported(kind: str, **changes: Any) -> None:
    about = {"model_type": kind, "hidden_act": "silu", "rope_parameters": {"rope_type": "default"}, **changes}
    convert.check_supported(SimpleNamespace(**about))


def test_a_sliding_window_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "windowed", config("mistral", sliding_window=32))
    with pytest.raises(ModelError, match="sliding windows"):
        fetch(tmp_path / "windowed", tmp_path / "cache")


def test_qwens_sliding_layers_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="sliding windows"):
        supported("qwen2", layer_types=["full_attention", "sliding_attention"])


def test_experts_are_refused_by_name(tmp_path: Path) -> None:
    MixtralConfig(num_hidden_layers=1).save_pretrained(tmp_path / "mixtral")
    with pytest.raises(ModelError, match=r"mixtral is not tested here; use one of llama, mistral, qwen2, qwen3"):
        fetch(tmp_path / "mixtral", tmp_path / "cache")
    with pytest.raises(ModelError, match="experts"):
        supported("llama", num_local_experts=8)


def test_another_activation_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    spoil(checkpoint, hidden_act="gelu")
    with pytest.raises(ModelError, match="the activation gelu"):
        fetch(checkpoint, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_a_rope_that_changes_with_length_is_refused_by_name(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    about = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 512}
    about |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if kind == "longrope" else {}
    spoil(checkpoint, rope_parameters=about, rope_scaling=about)
    with pytest.raises(ModelError, match=f"rope type {kind}"):
        fetch(checkpoint, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["gpt2", "never-heard-of-it"])
def test_an_unknown_architecture_is_refused_by_name(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    spoil(checkpoint, model_type=kind)
    with pytest.raises(ModelError, match=kind):
        fetch(checkpoint, tmp_path / "cache")


def test_code_that_comes_with_a_model_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (checkpoint / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    spoil(checkpoint, model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ModelError):
        fetch(checkpoint, tmp_path / "cache")
    assert not ran.exists()


def test_mlp_biases_and_layers_without_positions_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="layers without positions and the activation relu and biases in the MLP"):
        supported("llama", mlp_bias=True, hidden_act="relu", no_rope_layers=[1, 0])


def test_a_folder_without_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors file"):
        fetch(checkpoint, tmp_path / "cache")


def test_a_checkpoint_that_lacks_a_tensor_is_refused_by_its_name(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "model.safetensors"
    with safe_open(file, "pt") as whole:
        kept = {name: whole.get_tensor(name) for name in whole.keys() if "1.mlp.up_proj" not in name}  # noqa: SIM118
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        fetch(checkpoint, tmp_path / "cache")


def test_a_model_without_a_chat_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    bare = tokenizer()
    bare.chat_template = None
    (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
    bare.save_pretrained(checkpoint)
    with pytest.raises(ModelError, match="chat template"):
        fetch(checkpoint, tmp_path / "cache")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError):
        fetch(tmp_path / "empty", tmp_path / "cache")


def test_a_failed_preparation_leaves_nothing_behind(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        fetch(checkpoint, tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    assert prepare.ready(str(checkpoint), tmp_path / "cache", "int4") is None


def test_a_prepared_model_is_found_and_not_made_again(models: Models, tmp_path: Path) -> None:
    first = fetch(models.checkpoint(), tmp_path / "cache")
    before = (first.folder / "model.json").stat().st_mtime_ns
    assert fetch(models.checkpoint(), tmp_path / "cache") == first
    assert prepare.ready(str(models.checkpoint()), tmp_path / "cache", "int4") == first
    assert prepare.ready(str(models.checkpoint()), tmp_path / "cache", "nf4") is None
    assert (first.folder / "model.json").stat().st_mtime_ns == before


def test_of_two_who_prepare_at_once_one_does_and_the_other_waits(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, cache, convert_it = str(models.checkpoint()), tmp_path / "cache", convert.from_pretrained
    begun, waits, made = threading.Event(), threading.Event(), list[str]()

    def slowly(name: str, *more: Any) -> None:
        made.append(name)
        begun.set()
        assert waits.wait(30)
        convert_it(name, *more)

    def second() -> Prepared:
        assert begun.wait(30)
        return prepare.fetch(checkpoint, cache, "int4", lambda what, share: "waiting" in what and waits.set())

    monkeypatch.setattr(convert, "from_pretrained", slowly)
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(fetch, Path(checkpoint), cache), pool.submit(second)]
    assert found[0].result() == found[1].result()
    assert made == [checkpoint]


def test_the_same_checkpoint_always_gives_the_same_base(models: Models, tmp_path: Path) -> None:
    for form in ("int4", "nf4", "none"):
        assert fetch(models.checkpoint(), tmp_path / form, form).base == models.prepared("llama", form).base


def test_other_weights_are_another_base(models: Models) -> None:
    kinds = ["llama", "llama-untied", "qwen2", "qwen3"]
    assert len({models.prepared(kind).base for kind in kinds}) == len(kinds)


def test_the_end_of_a_turn_and_of_a_text_both_end_a_reply(models: Models) -> None:
    assert Shape.read(models.prepared().folder).eos == (0, 2)


def test_end_tokens_of_the_generation_config_count(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert 7 in Shape.read(fetch(checkpoint, tmp_path / "cache").folder).eos
