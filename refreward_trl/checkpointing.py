"""Checkpoints that are either complete or invisible.

A checkpoint is written to a hidden staging folder, every file is flushed to disk, a manifest with the size and the
SHA-256 of every file, and of itself, is written last, and one rename makes it visible as `checkpoint-<step>`. Older
ones are deleted only afterwards. Whoever loads one verifies it against its manifest first, so a damaged file is named
and never half loaded.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from refreward_trl.errors import CheckpointError

MANIFEST = "manifest.json"
OWN_DIGEST = "manifest_sha256"
NO_DIGEST = "0" * 64
FORMAT_VERSION = 1
CHECKPOINT_PREFIX = "checkpoint-"
STAGING_PREFIX = ".tmp-checkpoint-"
RETIRED_PREFIX = ".old-checkpoint-"
MIN_KEPT = 2

logger = logging.getLogger(__name__)


def checkpoint_folder(run_folder: str | Path, step: int) -> Path:
    """Returns where the checkpoint of `step` becomes visible."""
    return Path(run_folder) / f"{CHECKPOINT_PREFIX}{step}"


def staging_folder(run_folder: str | Path, step: int, token: str) -> Path:
    """Returns the hidden folder to write the checkpoint of `step` into; `token` must be the same on all ranks."""
    return Path(run_folder) / f"{STAGING_PREFIX}{step}-{token}"


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Flushes every file of `folder` to disk and then writes the manifest.

    Args:
        folder: The staging folder; all ranks have finished writing to it.
        facts: What else the manifest says: step, world size, versions.
    """
    files = {}
    for path in _files(folder):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    for subfolder in sorted({path.parent for path in _files(folder)}):
        _flush(subfolder)
    manifest = {"format_version": FORMAT_VERSION, **facts, "files": files}
    write_durably(folder / MANIFEST, manifest_text(manifest))
    _flush(folder)


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Returns a manifest as JSON that holds the SHA-256 of its own text, taken with zeros in the digest's place."""
    text = json.dumps({OWN_DIGEST: NO_DIGEST, **manifest}, indent=2)
    return text.replace(NO_DIGEST, _sha256_of(text), 1)


def commit(staged: Path, final: Path) -> None:
    """Makes a sealed folder visible under its final name, in one rename.

    A folder that already has that name (a damaged checkpoint that the run has just replaced) is moved out of the way
    and deleted.
    """
    retired = final.with_name(final.name.replace(CHECKPOINT_PREFIX, RETIRED_PREFIX, 1) + staged.name[-9:])
    if final.exists():
        final.rename(retired)
    staged.rename(final)
    _flush(final.parent)
    if retired.exists():
        _delete(retired)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint.

    Raises:
        CheckpointError: If there is none, or it cannot be read, or is of an unknown version.
    """
    path = Path(folder) / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        version, files = manifest["format_version"], manifest["files"]
        own_digest = str(manifest.pop(OWN_DIGEST))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {MANIFEST}, so the checkpoint is not complete",
            where=str(folder),
            fix="use another checkpoint of the run, or resume: auto",
        ) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{MANIFEST} cannot be read: {error}", where=str(folder), fix="use another checkpoint of the run"
        ) from error
    if version != FORMAT_VERSION or not isinstance(files, dict):
        raise CheckpointError(
            f"{MANIFEST} has format version {version!r}; this version of the package reads {FORMAT_VERSION}",
            where=str(folder),
            fix="resume with the version that wrote it",
        )
    if own_digest != _sha256_of(text.replace(own_digest, NO_DIGEST, 1)):
        raise CheckpointError(
            f"{MANIFEST} does not match its own SHA-256: the content has changed",
            where=str(folder),
            fix="use another checkpoint of the run, or resume: auto",
        )
    return manifest


def verify(folder: str | Path) -> dict[str, Any]:
    """Checks every file of a checkpoint against its manifest, and returns the manifest.

    Raises:
        CheckpointError: Naming the first file that is missing, of another size, or of another content.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        problem = _problem(Path(folder), name, expected)
        if problem:
            raise CheckpointError(
                f"{name} {problem}", where=str(folder), fix="use another checkpoint of the run, or resume: auto"
            )
    return manifest


def size(folder: str | Path) -> int:
    """Returns the bytes of a checkpoint's files, from its manifest."""
    return sum(int(expected["size"]) for expected in read_manifest(folder)["files"].values())


def list_checkpoints(run_folder: str | Path) -> list[Path]:
    """Returns the visible checkpoints of a run, oldest step first."""
    found = []
    for path in Path(run_folder).glob(f"{CHECKPOINT_PREFIX}*"):
        match = re.fullmatch(rf"{CHECKPOINT_PREFIX}(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found)]


def newest_intact(run_folder: str | Path) -> Path | None:
    """Returns the newest checkpoint whose every file verifies, or None. A damaged one is skipped with a warning that
    names the file."""
    for folder in reversed(list_checkpoints(run_folder)):
        try:
            verify(folder)
        except CheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
        else:
            return folder
    return None


def rotate(run_folder: str | Path, limit: int | None, protected: Collection[str | Path | None] = ()) -> None:
    """Deletes the oldest checkpoints beyond `limit`, never below the two newest, and never a protected one.

    Args:
        run_folder: The run's output folder.
        limit: Number to keep; None keeps all.
        protected: Folders to keep besides, such as the best checkpoint.
    """
    if limit is None:
        return
    kept = {Path(folder).name for folder in protected if folder is not None}
    for folder in list_checkpoints(run_folder)[: -max(limit, MIN_KEPT)]:
        if folder.name not in kept:
            # Hidden first: a deletion that is cut short must not leave a visible, damaged checkpoint.
            hidden = folder.with_name(folder.name.replace(CHECKPOINT_PREFIX, RETIRED_PREFIX, 1))
            folder.rename(hidden)
            _delete(hidden)


def remove_leftovers(run_folder: str | Path) -> None:
    """Deletes staging and retired folders that an interrupted save or rotation left behind."""
    for prefix in (STAGING_PREFIX, RETIRED_PREFIX):
        for folder in Path(run_folder).glob(f"{prefix}*"):
            _delete(folder)


def write_durably(path: Path, text: str) -> None:
    """Writes a text file and flushes it to disk."""
    path.write_text(text, encoding="utf-8")
    _flush(path)


def _delete(folder: Path) -> None:
    """Deletes a folder; of a link, or a file of that name, only itself."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def _problem(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    if "\0" in name or not isinstance(expected, Mapping) or not {"size", "sha256"} <= expected.keys():
        return f"is no entry that the manifest can hold: {name!r}"
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return "lies outside the checkpoint"
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != expected["size"]:
        return f"has {path.stat().st_size} bytes, the manifest says {expected['size']}"
    if _sha256(path) != expected["sha256"]:
        return "does not match its SHA-256: the content has changed"
    return None


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
