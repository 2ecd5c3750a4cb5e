"""A visible checkpoint is complete; a damaged one is named and never used."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from refreward_trl import checkpointing
from refreward_trl.errors import CheckpointError


def save(run: Path, step: int) -> Path:
    staged = checkpointing.staging_folder(run, step, "abcd1234")
    (staged / "part").mkdir(parents=True)
    (staged / "weights.bin").write_bytes(bytes(range(200)) + bytes([step]))
    (staged / "part" / "state.json").write_text("{}")
    checkpointing.seal(staged, {"step": step})
    assert (
        not checkpointing.list_checkpoints(run) or checkpointing.list_checkpoints(run)[-1].name != f"checkpoint-{step}"
    )
    checkpointing.commit(staged, checkpointing.checkpoint_folder(run, step))
    return checkpointing.checkpoint_folder(run, step)


def test_a_committed_checkpoint_verifies_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    manifest = checkpointing.verify(folder)
    assert manifest["step"] == 3
    assert manifest["files"].keys() == {"weights.bin", "part/state.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("file", ["weights.bin", "part/state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["deleted", "shortened", "one bit", "emptied"])
def test_every_damage_to_every_file_is_found_and_named(tmp_path: Path, file: str, damage: str) -> None:
    path = save(tmp_path, 1) / file
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    elif damage == "shortened":
        path.write_bytes(content[:-1])
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(CheckpointError, match=file):
        checkpointing.verify(tmp_path / "checkpoint-1")


def test_the_newest_intact_one_is_chosen_and_the_bad_one_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    assert checkpointing.newest_intact(tmp_path) == newest
    (newest / "weights.bin").write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        assert checkpointing.newest_intact(tmp_path) == tmp_path / "checkpoint-9"
    assert "checkpoint-10" in caplog.text
    assert "weights.bin" in caplog.text


def test_nothing_intact_gives_none(tmp_path: Path) -> None:
    assert checkpointing.newest_intact(tmp_path) is None
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-five").mkdir()
    (tmp_path / "checkpoint-6").write_text("a file")
    assert checkpointing.newest_intact(tmp_path) is None


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (tmp_path / "secret").write_text("x")
    manifest = checkpointing.read_manifest(folder)
    manifest["files"]["../secret"] = manifest["files"].pop("part/state.json")
    (folder / "manifest.json").write_text(checkpointing.manifest_text(manifest))
    with pytest.raises(CheckpointError, match="outside"):
        checkpointing.verify(folder)


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power may fail between any two lines: files, their folders, the manifest, its folder, the rename, the parent."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        done.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def watched_rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    save(tmp_path, 1)
    staged = ".tmp-checkpoint-1-abcd1234"
    assert set(done[:4]) == {"flush weights.bin", "flush state.json", f"flush {staged}", "flush part"}
    assert done[4:] == ["flush manifest.json", f"flush {staged}", "rename", f"flush {tmp_path.name}"]


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(CheckpointError, match="99"):
        checkpointing.verify(folder)


def test_rotation_keeps_two_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    checkpointing.rotate(tmp_path, None)
    assert len(checkpointing.list_checkpoints(tmp_path)) == 4
    checkpointing.rotate(tmp_path, 1, [None, str(tmp_path / "checkpoint-1")])
    assert [path.name for path in checkpointing.list_checkpoints(tmp_path)] == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-10",
    ]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    (save(tmp_path, 4) / "weights.bin").write_bytes(b"broken")
    checkpointing.verify(save_again(tmp_path, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def save_again(run: Path, step: int) -> Path:
    staged = checkpointing.staging_folder(run, step, "ef567890")
    staged.mkdir()
    (staged / "weights.bin").write_bytes(b"new")
    checkpointing.seal(staged, {"step": step})
    checkpointing.commit(staged, checkpointing.checkpoint_folder(run, step))
    return checkpointing.checkpoint_folder(run, step)


def test_leftovers_of_an_interrupted_save_are_removed(tmp_path: Path) -> None:
    kept = save(tmp_path, 2)
    checkpointing.staging_folder(tmp_path, 3, "dead0000").mkdir()
    (tmp_path / ".old-checkpoint-1").mkdir()
    checkpointing.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
