"""Adapters as ordinary PEFT folders, out and in: adapter_config.json and adapter_model.safetensors, nothing else.

Export is exact: the fused factors are cut into the checkpoint's modules, with the scale folded into B. Import takes
LoRA and rsLoRA with rank and alpha patterns, and refuses by name whatever would change the meaning of the weights.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from persona.engine import adapter_file
from persona.engine.adapter_file import MAX_BYTES, MAX_RANK, Adapter, Array, Header
from persona.engine.prepare import Prepared
from persona.engine.shape import FUSED, TARGETS, Shape
from persona.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_UPDATE = 10.0  # largest ‖B·A‖_F / √out of one module; a base projection has about 1
_PREFIX = "base_model.model.model.layers."
_NAME = re.compile(r"base_model\.model\.model\.layers\.(\d{1,4})\.([a-z_.]{1,40})\.lora_([AB])\.weight")
_PLAIN_KEY = re.compile(r"\^?[\w.]{1,120}")
# Starts that change the base itself: without that change the factors mean something else.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MODULES = {module for modules in FUSED.values() for module in modules}


def write(adapter_dir: Path, out: Path, prepared: Prepared) -> None:
    """Write the adapter in `adapter_dir` as a PEFT folder `out`. Raises AdapterError, OSError."""
    shape = Shape.read(prepared.folder)
    adapter = adapter_file.parse((adapter_dir / adapter_file.FILE).read_bytes())
    factors = dict(_separate(adapter, shape))
    ranks = {f"model.layers.{name}": len(a) for name, (a, _) in factors.items()}
    tensors = {
        f"{_PREFIX}{name}.lora_{k}.weight": t for name, ab in factors.items() for k, t in zip("AB", ab, strict=True)
    }
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, out / WEIGHTS, metadata={"format": "pt"})
    config = {"base_model_name_or_path": prepared.source, **_described(ranks)}
    (out / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def _described(ranks: dict[str, int]) -> dict[str, Any]:
    """adapter_config.json for modules with these ranks, by full name."""
    common = max(ranks.values())
    odd = {name: rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": common,
        "lora_alpha": common,  # the scale is in B
        "rank_pattern": odd,
        "alpha_pattern": odd,
        **_targets(set(ranks)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _targets(names: set[str]) -> dict[str, Any]:
    """Short module names where every layer has all of them, which every reader understands; else full names."""
    layers = sorted({int(name.split(".")[2]) for name in names})
    modules = sorted({name.rsplit(".", 1)[1] for name in names})
    if len(names) < len(layers) * len(modules):
        return {"target_modules": sorted(names)}
    return {"target_modules": modules, "layers_to_transform": layers, "layers_pattern": "layers"}


def read(peft_dir: Path, out: Path, prepared: Prepared) -> None:
    """Check the PEFT folder and write adapter.safetensors into `out`. Raises AdapterError with the reason."""
    config = _config(peft_dir)
    _check_config(config, prepared)
    shape = Shape.read(prepared.folder)
    made: dict[str, Array] = {}
    for (layer, module), (a, b) in _pairs(_tensors(peft_dir)).items():
        adapter_file.check_factors(layer, module, a, b, shape)
        scaled = b * _scale(config, f"model.layers.{layer}.{module}", len(a))
        _check_size(f"{layer}.{module}", a, scaled)
        made[f"{layer}.{module}.A"], made[f"{layer}.{module}.B"] = a, scaled.astype(np.float32)
    if not made:
        raise AdapterError("The adapter holds no weights.")
    adapter_file.write(out, Header("lora", prepared.base), made)


def _separate(adapter: Adapter, shape: Shape) -> list[tuple[str, tuple[Array, Array]]]:
    """Factors by "<layer>.<module>"."""
    if adapter.header.form == "lora":
        names = [name.removesuffix(".A") for name in adapter.tensors if name.endswith(".A")]
        return [(name, (adapter.tensors[name + ".A"], adapter.tensors[name + ".B"])) for name in names]
    found = []
    for layer in range(shape.layers):
        for target in TARGETS:
            if (pair := adapter.factors(layer, target, shape)) is not None:
                parts = np.split(pair[1], np.cumsum(shape.rows(target))[:-1])
                found += [(f"{layer}.{m}", (pair[0], b)) for m, b in zip(FUSED[target], parts, strict=True)]
    return found


def _config(folder: Path) -> dict[str, Any]:
    try:
        file = _regular(folder / CONFIG, MAX_CONFIG_BYTES)
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise AdapterError(f"{CONFIG} is not JSON.") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG} is not a JSON object.")
    return config


def _regular(file: Path, limit: int) -> Path:
    """`file` if it is an ordinary file of at most `limit` bytes."""
    if file.is_symlink() or file.parent.is_symlink():
        raise AdapterError(f"{file.name} is a symbolic link; copy the file itself.")
    if not file.is_file():
        hint = "; pickle files are never loaded" if file.with_suffix(".bin").exists() else ""
        raise AdapterError(f"There is no {file.name} in the folder{hint}.")
    if file.stat().st_size > limit:
        raise AdapterError(f"{file.name} is larger than {limit} bytes.")
    return file


def _check_config(config: dict[str, Any], prepared: Prepared) -> None:
    faults = {
        "is not LoRA": config.get("peft_type") != "LORA",
        "uses DoRA": bool(config.get("use_dora")),
        "trains biases": config.get("bias", "none") != "none",
        "replaces whole modules (modules_to_save)": bool(config.get("modules_to_save")),
        "trains token embeddings": bool(config.get("trainable_token_indices")),
        "names code of its own (auto_map)": bool(config.get("auto_map") or config.get("auto_mapping")),
        "has a rank above 64": _above(config.get("r"), MAX_RANK),
        "repeats layers": bool(config.get("layer_replication")),
        "is active after certain tokens only (aLoRA)": bool(config.get("alora_invocation_tokens")),
        "quantizes its input (QALoRA)": bool(config.get("use_qalora")),
        "rewrote its base at the start": str(config.get("init_lora_weights")).startswith(_REWRITES_BASE),
    }
    if found := [fault for fault, there in faults.items() if there]:
        raise AdapterError(f"The adapter {' and '.join(found)}; persona takes plain LoRA and rsLoRA up to rank 64.")
    base = str(config.get("base_model_name_or_path", ""))
    if _last(base) not in (_last(prepared.source), _last(prepared.name)):
        raise AdapterError(f"The adapter was trained on another base; this one serves {prepared.source}.")


def _above(value: Any, limit: int) -> bool:
    return not isinstance(value, int) or not 1 <= value <= limit


def _last(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


def _tensors(folder: Path) -> dict[str, Array]:
    file = _regular(folder / WEIGHTS, MAX_BYTES)
    with file.open("rb") as stream:
        if int.from_bytes(stream.read(8), "little") > MAX_HEADER_BYTES:
            raise AdapterError(f"{WEIGHTS} has a header of impossible size.")
    try:
        return load_file(file)
    except (SafetensorError, ValueError, TypeError, KeyError):
        raise AdapterError(f"{WEIGHTS} is damaged, or holds a number format other than fp32 and fp16.") from None


def _pairs(tensors: dict[str, Array]) -> dict[tuple[int, str], tuple[Array, Array]]:
    """A and B by (layer, module), fp32."""
    halves: dict[tuple[int, str], dict[str, Array]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None or found[2] not in _MODULES:
            raise AdapterError(f"The tensor {name[:100]!r} is not a LoRA factor of a projection.")
        halves.setdefault((int(found[1]), found[2]), {})[found[3]] = tensor.astype(np.float32)
    for (layer, module), half in halves.items():
        if len(half) != 2:
            raise AdapterError(f"Module {layer}.{module} has only one of its two factors.")
    return {key: (half["A"], half["B"]) for key, half in halves.items()}


def _check_size(name: str, a: Array, b: Array) -> None:
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise AdapterError(f"Module {name} holds values that are not finite.")
    squared = float(np.sum((b.T.astype(np.float64) @ b) * (a.astype(np.float64) @ a.T)))
    if (max(squared, 0.0) / len(b)) ** 0.5 > MAX_UPDATE:
        raise AdapterError(f"Module {name} changes the base beyond any trained adapter; its scale must be wrong.")


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / √r for rsLoRA, with the module's own alpha where a pattern names it."""
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise AdapterError("alpha_pattern is not a JSON object.")
    for key, value in patterns.items():
        if not _PLAIN_KEY.fullmatch(key):
            raise AdapterError("alpha_pattern holds a regular expression; persona takes plain module names.")
        plain = key.removeprefix("^")
        if module == plain or (not key.startswith("^") and module.endswith("." + plain)):
            alpha = value
            break
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise AdapterError("lora_alpha is not a number.")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
