"""Adapters leave and come in as PEFT folders, over the admin socket and inside the export."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live import Live, Start
from safetensors.numpy import load, load_file, save_file

from persona.engine import adapter_file
from persona.engine.adapter_file import Header
from persona.engine.prepare import Prepared
from persona.engine.protocol import ScoreRequest
from persona.engine.scripted import ScriptedEngine

SHAPE: dict[str, Any] = {
    "layers": 2,
    "hidden": 8,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 4,
    "intermediate": 16,
    "vocab": 300,
    "eps": 1e-5,
    "tied": True,
    "inv_freq": [1.0, 0.1],
    "rope_scale": 1.0,
    "context": 256,
    "eos": [0],
}


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(SHAPE))
    return Prepared(folder, "tiny", "none", "scripted", "example/tiny")


def weights(tmp_path: Path) -> bytes:
    """A small adapter of ours: q of the first layer."""
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(2, 8)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32)
    tensors = {"0.self_attn.q_proj.A": a, "0.self_attn.q_proj.B": b * 0.1}
    return adapter_file.write(tmp_path, Header("lora", "scripted"), tensors).read_bytes()


async def admin(live: Live, verb: str, directory: Path, status: int, name: str = "ann") -> Any:
    path = f"/admin/users/{name}/adapters/{verb}"
    async with live.admin.post(path, json={"directory": str(directory)}) as answer:
        assert answer.status == status, await answer.text()
        return await answer.json()


async def test_an_adapter_goes_out_and_comes_in_for_another_user(
    start: Start, prepared: Prepared, tmp_path: Path
) -> None:
    live = await start(prepared=prepared)
    await live.publish("ann", weights(tmp_path))
    await live.key("bob")
    out = tmp_path / "peft"
    assert (await admin(live, "export", out, 200))["version"] == 1
    assert sorted(file.name for file in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (await admin(live, "import", out, 201, "bob"))["version"] == 1
    assert (await live.say("hi", user="bob"))["persona"]["version"] == 1
    assert [ref.number for ref in live.engine.flipped] == [1]


@pytest.mark.parametrize("verb", ["export", "import"])
async def test_a_place_that_the_service_sees_differently_is_no_place(
    start: Start, prepared: Prepared, tmp_path: Path, verb: str
) -> None:
    live = await start(prepared=prepared)
    await live.publish("ann", weights(tmp_path))
    await admin(live, "export", tmp_path / "peft", 200)
    path, about = f"/admin/users/ann/adapters/{verb}", tmp_path.stat()
    asked = {"directory": str(tmp_path / ("again" if verb == "export" else "peft"))}
    async with live.admin.post(path, json={**asked, "seen": [1, 1]}) as answer:
        assert answer.status == 400
        assert "another folder" in (await answer.json())["error"]["message"]
    assert not (tmp_path / "again").exists()
    gone = {"directory": str(tmp_path / "missing" / "peft"), "seen": [1, 1]}
    async with live.admin.post(path, json=gone) as answer:
        assert (answer.status, (await answer.json())["error"]["param"]) == (400, "directory")
    async with live.admin.post(path, json={**asked, "seen": [about.st_dev, about.st_ino]}) as answer:
        assert answer.ok


async def test_threat_05_an_adapter_that_unlearns_the_assistant_is_refused(
    start: Start, prepared: Prepared, tmp_path: Path
) -> None:
    def score(request: ScoreRequest) -> list[float]:
        return [-1.0 if request.adapter is None else -1.1] * len(request.targets)

    live = await start(ScriptedEngine(score=score), prepared=prepared)
    await live.publish("ann", weights(tmp_path))
    await live.key("bob")
    await admin(live, "export", tmp_path / "peft", 200)
    refused = await admin(live, "import", tmp_path / "peft", 422, "bob")
    assert "Drift 10.00%" in refused["error"]["message"]
    assert (await live.say("hi", user="bob"))["persona"]["version"] is None


async def test_a_damaged_adapter_does_not_keep_the_history_from_its_owner(
    start: Start, prepared: Prepared, tmp_path: Path
) -> None:
    live = await start(prepared=prepared)
    await live.publish("ann", weights(tmp_path))
    version = await live.services.adapters.active((await live.user()).id)
    assert version is not None
    Path(version.path, "adapter.safetensors").write_bytes(b"damaged")
    headers = {"Authorization": f"Bearer {await live.key()}"}
    async with live.http.get("/v1/me/export", headers=headers) as answer:
        archive = zipfile.ZipFile(io.BytesIO(await answer.read()))
    assert "history.jsonl" in archive.namelist()
    assert not [name for name in archive.namelist() if name.startswith("adapter/")]


async def test_threat_33_the_exported_adapter_has_the_same_weights_after_import(
    start: Start, prepared: Prepared, tmp_path: Path
) -> None:
    live = await start(prepared=prepared)
    await live.publish("ann", weights(tmp_path))
    headers = {"Authorization": f"Bearer {await live.key()}"}
    async with live.http.get("/v1/me/export", headers=headers) as answer:
        archive = zipfile.ZipFile(io.BytesIO(await answer.read()))
    assert json.loads(archive.read("manifest.json"))["version"]["number"] == 1
    elsewhere = tmp_path / "elsewhere"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        elsewhere.mkdir(exist_ok=True)
        (elsewhere / name).write_bytes(archive.read(f"adapter/{name}"))
    await live.key("bob")
    await admin(live, "import", elsewhere, 201, "bob")
    bob = await live.services.adapters.active((await live.user("bob")).id)
    assert bob is not None
    mine, theirs = load(weights(tmp_path)), load_file(Path(bob.path, adapter_file.FILE))
    product = {k: mine[f"0.self_attn.q_proj.{k}"] for k in "AB"}
    same = {k: theirs[f"0.self_attn.q_proj.{k}"] for k in "AB"}
    np.testing.assert_allclose(product["B"] @ product["A"], same["B"] @ same["A"], rtol=1e-6)


async def test_threat_05_a_bad_folder_is_refused_by_name_and_leaves_nothing(
    start: Start, prepared: Prepared, tmp_path: Path
) -> None:
    live = await start(prepared=prepared)
    await live.publish("ann", weights(tmp_path))
    good = tmp_path / "good"
    await admin(live, "export", good, 200)
    config = json.loads((good / "adapter_config.json").read_text())

    def variant(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        (folder / "adapter_model.safetensors").write_bytes((good / "adapter_model.safetensors").read_bytes())
        return folder

    cases = {
        variant("dora", use_dora=True): "DoRA",
        variant("foreign", base_model_name_or_path="other/model"): "another base",
        variant("huge", r=4096): "rank",
        variant("code", auto_map={"x": "y"}): "auto_map",
        tmp_path / "missing": "no adapter_config.json",
    }
    nan = variant("nan")
    tensors = load_file(nan / "adapter_model.safetensors")
    save_file({name: tensor * np.nan for name, tensor in tensors.items()}, nan / "adapter_model.safetensors")
    for folder, reason in {**cases, nan: "not finite"}.items():
        refused = await admin(live, "import", folder, 422)
        assert reason in refused["error"]["message"]
    assert [v["number"] for v in (await live.call("GET", "/v1/me/versions"))["data"]] == [1]
    user = await live.user()
    folders = [path.name for path in (live.services.settings.adapters / str(user.id)).iterdir()]
    assert folders == ["1"]


async def test_without_a_version_there_is_nothing_to_export(start: Start, prepared: Prepared, tmp_path: Path) -> None:
    live = await start(prepared=prepared)
    await live.key()
    await admin(live, "export", tmp_path / "out", 404)
    await admin(live, "export", Path("relative"), 404)
    await live.publish("ann", weights(tmp_path))
    await admin(live, "export", Path("relative"), 400)
    await admin(live, "export", prepared.folder / "model.json", 400)
    await admin(live, "import", Path("relative"), 400)


async def test_an_engine_that_does_not_show_its_base_exchanges_no_adapters(live: Live, tmp_path: Path) -> None:
    await live.publish()
    refused = await admin(live, "export", tmp_path / "out", 422)
    assert "does not show its base" in refused["error"]["message"]
