"""Every file of a checkpoint, damaged in every way: noticed, named, and the checkpoint before is used."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refreward_trl import checkpointing
from refreward_trl.errors import CheckpointError

pytestmark = pytest.mark.faults


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "one byte short": lambda content: content[:-1],
    "one bit flipped": flipped,
    "deleted": None,
}


@pytest.mark.parametrize("kind", ["rm-conv", "refl-full", "ddpo-lora"])
def test_every_damage_is_noticed(
    harness: SimpleNamespace,
    tally: Callable[[str], Any],
    tmp_path: Path,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = harness.make_trainer(kind, tmp_path / "run")
    trainer.train()
    before, newest = checkpointing.list_checkpoints(tmp_path / "run")
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 7
    for file in files:
        content = (newest / file).read_bytes()
        for damage, apply in DAMAGES.items():
            if apply is None:
                (newest / file).unlink()
            else:
                (newest / file).write_bytes(apply(content))
            with tally("damaged-file").trial():
                with pytest.raises(CheckpointError) as error:
                    trainer._choose_checkpoint(str(newest))
                assert file.name in str(error.value), damage
                caplog.clear()
                assert trainer._choose_checkpoint("auto") == str(before), damage
                assert file.name in caplog.text, damage
            (newest / file).write_bytes(content)
    assert trainer._choose_checkpoint("auto") == str(newest)


def test_every_bit_of_a_manifest_counts(harness: SimpleNamespace, tally: Callable[[str], Any], tmp_path: Path) -> None:
    harness.make_trainer("refl-lora", tmp_path / "run", max_steps=2).train()
    (folder,) = checkpointing.list_checkpoints(tmp_path / "run")
    manifest = folder / checkpointing.MANIFEST
    content = manifest.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        manifest.write_bytes(bytes(changed))
        with tally("damaged-manifest").trial(), pytest.raises(CheckpointError):
            checkpointing.read_manifest(folder)


def test_what_lies_beside_the_checkpoints_does_no_harm(harness: SimpleNamespace, tmp_path: Path) -> None:
    """Strangers in the folder of a run: files, links that lead nowhere or in circles, names that nearly fit."""
    trainer = harness.make_trainer("refl-lora", tmp_path / "run", max_steps=2)
    trainer.train()
    run = tmp_path / "run"
    for name in (".ipynb_checkpoints", "checkpoint-", "checkpoint-x", "checkpoint-2 (copy)", "checkpoint-9.tmp"):
        (run / name).mkdir()
    (run / "checkpoint-7").write_text("a file")
    (run / "checkpoint-8").symlink_to(run / "nowhere")
    (run / "checkpoint-10").symlink_to(run)
    (run / "checkpoint-11").mkdir()
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-12")
    (run / "checkpoint-12" / checkpointing.MANIFEST).write_text('{"format_version": 99, "files": {}}')
    shutil.copytree(run / "checkpoint-2", run / ".tmp-checkpoint-13-abc")
    assert trainer._choose_checkpoint("auto") == str(run / "checkpoint-2")
    assert not (run / ".tmp-checkpoint-13-abc").exists()
