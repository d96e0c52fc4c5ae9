"""Versions from workspace to pointer, and back."""

import errno
import hashlib
import json
import shutil
import stat
from pathlib import Path

import pytest

from persona.domain import VersionState
from persona.errors import AdapterError, Busy, ConfigurationError, NotFound, StorageFull
from storage import files
from storage.adapters import Adapters


async def publish(adapters: Adapters, user_id: int, content: bytes = b"weights", folder: Path | None = None):
    folder = folder or await adapters.workspace(user_id)
    (folder / "adapter.safetensors").write_bytes(content)
    return await adapters.publish(
        user_id, folder, watermark=3, parent=None, base="base", run_id=None, metrics={"loss": 2.0}, plan={"rank": 4}
    )


async def test_a_candidate_is_complete_on_disk_and_does_not_serve(adapters, ann, root):
    version = await publish(adapters, ann.id)
    assert (version.number, version.state, version.watermark, version.metrics) == (
        1,
        VersionState.CANDIDATE,
        3,
        {"loss": 2.0},
    )
    assert version.path == str(root / str(ann.id) / "1")
    assert version.sha256 == hashlib.sha256(b"weights").hexdigest()
    manifest = json.loads((Path(version.path) / "manifest.json").read_text())
    assert manifest == {
        "number": 1,
        "watermark": 3,
        "parent": None,
        "base": "base",
        "sha256": version.sha256,
        "bytes": 7,
        "created": version.created.isoformat(),
        "plan": {"rank": 4},
    }
    assert await adapters.active(ann.id) is None
    assert await adapters.get(ann.id, 1) == version
    assert [path.name for path in (root / str(ann.id)).iterdir()] == ["1"]


async def test_what_a_workspace_holds_beside_the_weights_is_not_published(adapters, ann):
    folder = await adapters.workspace(ann.id)
    (folder / "optimizer").mkdir()
    (folder / "optimizer" / "state").write_text("x")
    (folder / "log").write_text("x")
    version = await publish(adapters, ann.id, folder=folder)
    assert sorted(path.name for path in Path(version.path).iterdir()) == ["adapter.safetensors", "manifest.json"]


async def test_published_files_are_read_only(adapters, ann):
    version = await publish(adapters, ann.id)
    for path in Path(version.path).iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o400


async def test_workspaces_are_private_and_distinct_and_can_be_discarded(adapters, ann, root):
    one, two = await adapters.workspace(ann.id), await adapters.workspace(ann.id)
    assert one != two
    assert stat.S_IMODE(one.stat().st_mode) == 0o700
    (one / "adapter.safetensors").write_bytes(b"half")
    await adapters.discard(one)
    await adapters.discard(one)
    assert list((root / str(ann.id)).iterdir()) == [two]


async def test_a_workspace_without_weights_is_refused_and_removed(adapters, ann, root, tmp_path):
    folder = await adapters.workspace(ann.id)
    (tmp_path / "elsewhere").write_bytes(b"weights")
    (folder / "adapter.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError):
        await adapters.publish(ann.id, folder, watermark=0, parent=None, base="b", run_id=None, metrics={}, plan={})
    assert list((root / str(ann.id)).iterdir()) == []
    assert await adapters.list(ann.id) == []


async def test_threat_23_a_full_disk_while_publishing_leaves_nothing_behind(adapters, ann, root, monkeypatch):
    folder = await adapters.workspace(ann.id)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(StorageFull):
        await publish(adapters, ann.id, folder=folder)
    monkeypatch.undo()
    assert list((root / str(ann.id)).iterdir()) == []
    assert await adapters.list(ann.id) == []


async def test_the_pointer_moves_to_the_version_that_is_pointed_at(adapters, users, ann):
    await publish(adapters, ann.id)
    await adapters.point(ann.id, 1)
    active = await adapters.active(ann.id)
    assert (active.number, active.state) == (1, VersionState.PUBLISHED)
    assert (await users.get("ann")).active == 1
    await adapters.point(ann.id, 1)
    assert (await adapters.active(ann.id)).number == 1


async def test_a_rejected_version_never_serves_and_its_files_go(adapters, ann):
    version = await publish(adapters, ann.id)
    await adapters.reject(ann.id, 1)
    assert (await adapters.get(ann.id, 1)).state == VersionState.REJECTED
    assert not Path(version.path).exists()
    with pytest.raises(NotFound):
        await adapters.point(ann.id, 1)
    with pytest.raises(NotFound):
        await adapters.reject(ann.id, 1)


async def test_a_published_version_is_not_rejected(make, adapters, ann):
    version = await make(ann.id)
    with pytest.raises(NotFound):
        await adapters.reject(ann.id, 1)
    await adapters.verify(version)


async def test_numbers_are_never_given_again(adapters, ann):
    for number in (1, 2, 3):
        assert (await publish(adapters, ann.id)).number == number
        await adapters.reject(ann.id, number)
    assert [version.number for version in await adapters.list(ann.id)] == [1, 2, 3]


async def test_rollback_goes_one_back_to_a_number_or_to_the_base(make, adapters, ann):
    for _ in range(3):
        await make(ann.id)
    assert (await adapters.rollback(ann.id, None)).number == 2
    assert (await adapters.rollback(ann.id, 3)).number == 3
    assert (await adapters.rollback(ann.id, 1)).number == 1
    assert await adapters.rollback(ann.id, None) is None
    assert await adapters.active(ann.id) is None
    with pytest.raises(NotFound):
        await adapters.rollback(ann.id, None)
    assert (await adapters.rollback(ann.id, 2)).number == 2
    assert await adapters.rollback(ann.id, 0) is None
    assert await adapters.rollback(ann.id, 0) is None


async def test_rollback_skips_what_is_not_published(make, adapters, ann):
    for _ in range(2):
        await make(ann.id)
    await publish(adapters, ann.id)
    await adapters.reject(ann.id, 3)
    await make(ann.id)
    assert (await adapters.rollback(ann.id, None)).number == 2
    for number in (3, 5, -1):
        with pytest.raises(NotFound):
            await adapters.rollback(ann.id, number)
    assert (await adapters.active(ann.id)).number == 2


async def test_threat_02_versions_of_others_are_unknown(make, adapters, ann, bob):
    await make(ann.id)
    assert await adapters.get(bob.id, 1) is None
    assert await adapters.list(bob.id) == []
    for act in (adapters.point, adapters.rollback):
        with pytest.raises(NotFound):
            await act(bob.id, 1)


async def test_threat_06_every_damaged_byte_is_found_before_a_load(adapters, ann):
    content = bytes(range(256)) * 4
    version = await publish(adapters, ann.id, content)
    await adapters.verify(version)
    path = Path(version.path) / "adapter.safetensors"
    path.chmod(0o600)
    for at in range(0, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(AdapterError):
            await adapters.verify(version)
    for damaged in (content[:-1], content[:512] + bytes(512), b"", content + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(AdapterError):
            await adapters.verify(version)
    path.write_bytes(content)
    await adapters.verify(version)


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"sha256": "0"}', None])
async def test_threat_06_a_damaged_or_missing_manifest_is_found(adapters, ann, manifest):
    version = await publish(adapters, ann.id)
    path = Path(version.path) / "manifest.json"
    path.unlink()
    if manifest is not None:
        path.write_text(manifest)
    with pytest.raises(AdapterError):
        await adapters.verify(version)


async def test_a_version_whose_files_went_on_purpose_is_not_called_corrupt(make, adapters, ann):
    await make(ann.id, serve=False)
    await adapters.reject(ann.id, 1)
    assert await adapters.quarantine(ann.id, 1, "its file is missing") is None
    assert (await adapters.get(ann.id, 1)).state is VersionState.REJECTED


async def test_threat_06_a_quarantined_version_hands_over_to_the_one_before(make, adapters, ann):
    for _ in range(3):
        await make(ann.id)
    assert (await adapters.quarantine(ann.id, 3, "its checksum is wrong")).number == 2
    broken = await adapters.get(ann.id, 3)
    assert broken.state == VersionState.QUARANTINED
    assert broken.metrics == {"loss": 1.5, "quarantined": "its checksum is wrong"}
    assert (await adapters.quarantine(ann.id, 1, "its checksum is wrong")).number == 2
    assert await adapters.quarantine(ann.id, 2, "its checksum is wrong") is None
    with pytest.raises(NotFound):
        await adapters.rollback(ann.id, 3)
    with pytest.raises(NotFound):
        await adapters.quarantine(ann.id, 9, "unknown")


async def test_pruning_keeps_the_newest_and_the_serving_version(make, adapters, ann):
    made = [await make(ann.id) for _ in range(6)]
    await adapters.rollback(ann.id, 2)
    assert await adapters.prune(ann.id, keep=3) == [1, 3, 4]
    left = [version.number for version in await adapters.list(ann.id) if version.state == VersionState.PUBLISHED]
    assert left == [2, 5, 6]
    assert [Path(version.path).exists() for version in made] == [False, True, False, False, True, True]
    assert (await adapters.active(ann.id)).number == 2
    assert await adapters.prune(ann.id, keep=3) == []
    assert await adapters.prune(ann.id, keep=1) == [5, 6]
    assert (await adapters.get(ann.id, 5)).state == VersionState.RETIRED


async def test_pruning_removes_damaged_files_and_spares_sound_ones_that_may_serve_again(make, adapters, ann):
    made = [await make(ann.id) for _ in range(3)]
    weights = Path(made[2].path) / "adapter.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(b"damaged")
    for number in (2, 3):
        await adapters.quarantine(ann.id, number, "the engine did not take it")
    assert await adapters.prune(ann.id, keep=5) == []
    assert [Path(version.path).exists() for version in made] == [True, True, False]
    made += [await make(ann.id) for _ in range(2)]
    assert await adapters.prune(ann.id, keep=2) == [1]
    assert [Path(version.path).exists() for version in made] == [False, False, False, True, True]


async def test_threat_06_nothing_is_called_damaged_while_the_folder_is_away(make, adapters, ann, root):
    await make(ann.id)
    root.rename(root.with_name("elsewhere"))
    for there in (False, True):  # not there, or there and empty, as a place to which nothing is mounted
        if there:
            root.mkdir()
        with pytest.raises(Busy, match="folder of adapters"):
            await adapters.quarantine(ann.id, 1, "its file is missing")
    root.rmdir()
    root.with_name("elsewhere").rename(root)
    assert (await adapters.active(ann.id)).number == 1


async def test_remove_user_removes_every_file_of_that_user_alone(make, adapters, ann, bob, root):
    await make(ann.id)
    await make(bob.id)
    await adapters.workspace(ann.id)
    await adapters.remove_user(ann.id)
    await adapters.remove_user(ann.id)
    assert [path.name for path in root.iterdir()] == [str(bob.id)]


async def test_repair_of_a_sound_folder_mends_nothing(make, adapters, ann):
    await make(ann.id)
    assert await adapters.repair() == []
    assert (await adapters.active(ann.id)).number == 1


async def test_threat_07_repair_makes_disk_rows_and_pointer_agree(make, adapters, ann, bob, root, users):
    made = [await make(ann.id) for _ in range(4)]
    (Path(made[3].path) / "manifest.json").unlink()
    (Path(made[2].path) / "adapter.safetensors").chmod(0o600)
    (Path(made[2].path) / "adapter.safetensors").write_bytes(b"")
    await publish(adapters, ann.id)  # 5: never judged
    await adapters.workspace(ann.id)
    (root / str(ann.id) / "77").mkdir()
    (root / "4711" / "1").mkdir(parents=True)
    mended = await adapters.repair()
    assert len(mended) == 7, mended
    assert (await adapters.active(ann.id)).number == 2
    states = [version.state.value for version in await adapters.list(ann.id)]
    assert states == ["published", "published", "quarantined", "quarantined", "rejected"]
    assert sorted(path.name for path in (root / str(ann.id)).iterdir()) == ["1", "2", "3", "4"]
    await adapters.repair()  # the folder of user 4711, now empty
    assert await adapters.repair() == []
    assert [path.name for path in root.iterdir()] == [str(ann.id)]


@pytest.mark.parametrize("away", ["missing", "empty", "another disk"])
async def test_threat_07_where_the_folder_of_all_versions_is_not_mounted_nothing_is_repaired(
    make, adapters, ann, bob, root, tmp_path, away
):
    for user in (ann, ann, bob):
        await make(user.id)
    kept = root.rename(tmp_path / "elsewhere")
    if away != "missing":
        root.mkdir()
    if away == "another disk":
        (root / "lost+found").mkdir()
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="names versions in it: mount it"):
            await adapters.repair()
    if away != "missing":
        shutil.rmtree(root)
    kept.rename(root)
    assert await adapters.repair() == []
    assert (await adapters.active(ann.id)).number == 2
    for version in await adapters.list(ann.id):
        await adapters.verify(version)


async def test_whoever_says_that_all_versions_are_lost_starts_without_them_and_says_it_once(make, adapters, ann, root):
    await make(ann.id)
    shutil.rmtree(root)
    (root / "gone").mkdir(parents=True)
    assert len(await adapters.repair()) == 1
    assert await adapters.active(ann.id) is None
    assert list(root.iterdir()) == []
    assert await adapters.repair() == []
    await make(ann.id)
    shutil.rmtree(root)
    with pytest.raises(ConfigurationError):
        await adapters.repair()


async def test_threat_04_a_path_is_built_from_integers_only(adapters, root):
    for user_id, number in [("../../etc", 1), (1, "../b"), ("1/2", 1), (1, "\0")]:
        with pytest.raises(ValueError):
            files.folder(root, user_id, number)
