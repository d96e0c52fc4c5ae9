"""Adapters as PEFT folders: PEFT computes with an exported one what we compute, and a bad one is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
import torch
from models import Models, reference
from peft import PeftModel
from plain import Whole, some_tokens
from safetensors.numpy import load_file, save_file

from persona.engine import adapter_file, lora, peft_folder
from persona.engine.adapter_file import FILE
from persona.engine.peft_folder import CONFIG, WEIGHTS
from persona.engine.prepare import Prepared
from persona.engine.shape import Shape
from persona.errors import AdapterError

# PEFT 0.21 reads an attribute that transformers 5 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
EXACT = 1e-3  # of fp32 logits with a standard deviation of about 1.5


@pytest.fixture
def prepared(models: Models) -> Prepared:
    return models.prepared()


@pytest.fixture
def shape(prepared: Prepared) -> Shape:
    return Shape.read(prepared.folder)


@pytest.fixture
def exported(prepared: Prepared, shape: Shape, tmp_path: Path) -> Path:
    """The PEFT folder of a sparse adapter."""
    adapters.sparse(tmp_path / "adapter", shape, prepared.base)
    peft_folder.write(tmp_path / "adapter", tmp_path / "peft", prepared)
    return tmp_path / "peft"


@torch.no_grad()
def ours(models: Models, kind: str, folder: Path, tokens: list[int]) -> torch.Tensor:
    """fp32 logits of our decoder with the adapter in `folder`."""
    decoder = models.decoder(kind)
    decoder.dtype = torch.float32
    adapter = adapter_file.parse((folder / FILE).read_bytes())
    memory = torch.empty(lora.nbytes(adapter, decoder.shape, torch.float32), dtype=torch.uint8)
    resident = lora.expand(adapter, decoder.shape, torch.float32, memory)

    class Adapted(Whole):
        def project(self, layer: int, target: str, base: Any, x: torch.Tensor) -> torch.Tensor:
            pair = resident.factors.get((layer, target))
            return base(x) if pair is None else base(x) + x @ pair[0] @ pair[1]

    run, h = Adapted(decoder, len(tokens)), decoder.embedded(torch.tensor(tokens))
    for layer in range(decoder.shape.layers):
        h = decoder.layer(layer, h, run)
    return decoder.logits(h)


@torch.no_grad()
def theirs(models: Models, kind: str, peft: Path, tokens: list[int]) -> torch.Tensor:
    """fp32 logits of PEFT over the same dequantized base."""
    model = PeftModel.from_pretrained(reference(models.decoder(kind), models.checkpoint(kind)), peft)
    found: torch.Tensor = model.eval()(torch.tensor([tokens])).logits[0]
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("form", [adapters.sparse, adapters.lora])
def test_peft_computes_with_an_export_what_we_compute(
    models: Models, tmp_path: Path, kind: str, form: Callable[..., Any]
) -> None:
    prepared, tokens = models.prepared(kind), some_tokens(100)
    form(tmp_path / "adapter", Shape.read(prepared.folder), prepared.base)
    peft_folder.write(tmp_path / "adapter", tmp_path / "peft", prepared)
    mine = ours(models, kind, tmp_path / "adapter", tokens)
    assert (mine - theirs(models, kind, tmp_path / "peft", tokens)).abs().max() < EXACT
    bare = ours(models, kind, _nothing(tmp_path / "nothing", prepared), tokens)
    assert (mine - bare).abs().max() > 0.5  # the adapter does something


def _nothing(folder: Path, prepared: Prepared) -> Path:
    adapters.sparse(folder, Shape.read(prepared.folder), prepared.base, size=0.0)
    return folder


@pytest.mark.parametrize("form", [adapters.sparse, adapters.lora])
def test_threat_33_an_export_that_is_imported_computes_the_same(
    models: Models, prepared: Prepared, shape: Shape, tmp_path: Path, form: Callable[..., Any]
) -> None:
    form(tmp_path / "adapter", shape, prepared.base)
    peft_folder.write(tmp_path / "adapter", tmp_path / "peft", prepared)
    (tmp_path / "back").mkdir()
    peft_folder.read(tmp_path / "peft", tmp_path / "back", prepared)
    ref = adapters.reference(tmp_path / "back")
    adapter_file.read(tmp_path / "back", ref.sha256, prepared.base, shape)
    tokens = some_tokens(100)
    before = ours(models, "llama", tmp_path / "adapter", tokens)
    after = ours(models, "llama", tmp_path / "back", tokens)
    assert (before - after).abs().max() < 1e-4


def test_an_export_of_an_import_is_what_came_in(prepared: Prepared, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "back").mkdir()
    peft_folder.read(exported, tmp_path / "back", prepared)
    peft_folder.write(tmp_path / "back", tmp_path / "again", prepared)
    first, second = load_file(exported / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def configure(folder: Path, **changes: Any) -> None:
    about = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**about, **changes}))


def weigh(folder: Path, **changes: np.ndarray[Any, Any] | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / WEIGHTS)


Q_A, Q_B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{k}.weight" for k in "AB")


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"lora_alpha": 16}, 2.0),
        ({"lora_alpha": 16, "use_rslora": True}, 16 / 8**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": 24}}, 3.0),
        ({"lora_alpha": 8, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 4}}, 0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"k_proj": 24}}, 1.0),
    ],
)
def test_the_scale_of_an_import_goes_into_b(
    prepared: Prepared, exported: Path, tmp_path: Path, options: dict[str, Any], factor: float
) -> None:
    configure(exported, **options)
    b = load_file(exported / WEIGHTS)[Q_B]
    peft_folder.read(exported, tmp_path, prepared)
    found = adapter_file.parse((tmp_path / FILE).read_bytes()).tensors["0.self_attn.q_proj.B"]
    assert np.allclose(found, b * factor, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1]}, "token embeddings"),
        ({"r": 4096}, "rank above 64"),
        ({"r": "8"}, "rank"),
        ({"r": 0}, "rank"),
        ({"peft_type": "IA3"}, "not LoRA"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"layer_replication": [[0, 2]]}, "repeats layers"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "rewrote its base"),
        ({"init_lora_weights": "olora"}, "rewrote its base"),
        ({"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}, "another base"),
        ({"base_model_name_or_path": None}, "another base"),
        ({"lora_alpha": "2"}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "not finite"),
        ({"lora_alpha": 1e9}, "scale must be wrong"),
        ({"alpha_pattern": {"(q|k)_proj": 4}}, "regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_threat_05_a_config_that_means_something_else_is_refused_by_name(
    prepared: Prepared, exported: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    configure(exported, **changes)
    refused(exported, tmp_path, prepared, reason)


def zeros(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base_model.model.lm_head.lora_A.weight": zeros(8, 64)}, "not a LoRA factor"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": zeros(8, 64)}, "not a LoRA factor"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": zeros(64)}, "not a LoRA factor"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": zeros(64)}, "not a LoRA factor"),
        ({"base_model.model.model.layers.0.../../etc.lora_A.weight": zeros(8, 64)}, "not a LoRA factor"),
        ({Q_A: None}, "only one of its two factors"),
        ({Q_A: zeros(128, 64), Q_B: zeros(64, 128)}, "rank outside"),
        ({Q_A: zeros(8, 32)}, "does not fit"),
        ({Q_A: zeros(8)}, "does not fit"),
        ({"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": zeros(8, 64),
          "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": zeros(64, 8)}, "not one of this base"),
        ({Q_A: np.full((8, 64), np.nan, np.float32)}, "not finite"),
        ({Q_B: np.full((64, 8), np.inf, np.float32)}, "not finite"),
        ({Q_B: np.full((64, 8), 1e4, np.float32)}, "scale must be wrong"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_threat_05_weights_that_do_not_belong_are_refused_by_name(
    prepared: Prepared, exported: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    weigh(exported, **changes)
    refused(exported, tmp_path, prepared, reason)


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def link_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder / "elsewhere")


def link_config(folder: Path) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/etc/passwd")


def link_folder(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def huge_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((1 << 40).to_bytes(8, "little") + b"{}" * 100)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def disguised_pickle(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x80\x04\x95" + b"cposix\nsystem\n" * 10)


def deep_config(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 100_000)


def list_config(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


def large_config(folder: Path) -> None:
    (folder / CONFIG).write_text('{"x": "' + "y" * (2 << 20) + '"}')


def no_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def no_weights(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)


def weights_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (pickle_only, "pickle files are never loaded"), (link_weights, "symbolic link"), (link_config, "symbolic link"),
        (link_folder, "symbolic link"), (huge_header, "impossible size"), (cut, "damaged"),
        (disguised_pickle, "impossible size|damaged"), (deep_config, "not JSON"), (list_config, "not a JSON object"),
        (large_config, "larger than"), (no_config, "There is no adapter_config.json"), (no_weights, "no weights"),
        (weights_folder, "There is no"),
    ],
)  # fmt: skip
def test_threat_05_a_folder_that_is_not_plain_is_refused(
    prepared: Prepared, exported: Path, tmp_path: Path, spoil: Callable[[Path], None], reason: str
) -> None:
    spoil(exported)
    refused(exported, tmp_path, prepared, reason)


def refused(folder: Path, tmp_path: Path, prepared: Prepared, reason: str) -> None:
    """The import fails with that reason and leaves no file."""
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(AdapterError, match=reason):
        peft_folder.read(folder, out, prepared)
    assert list(out.iterdir()) == []
