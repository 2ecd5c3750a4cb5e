"""Which images `refreward upscale` reads, and where each of them goes; settled before any of them is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from refreward_trl.errors import ConfigError, DataError

_WRITTEN = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp", ".tif": "tif", ".tiff": "tif"}
_OTHER = frozenset({".bmp", ".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".psd"})
"""Endings of images that are not written: `.bmp` is read, the others are refused by name rather than overlooked."""

_MOST_NAMES = 5


class Job(NamedTuple):
    """One image to upscale.

    Attributes:
        source: The image.
        target: Where its enlargement goes.
        kind: Format of `target`: "png", "jpg", "webp" or "tif".
    """

    source: Path
    target: Path
    kind: str


def find_jobs(source: Path, target: Path, *, kind: str | None = None, recursive: bool = False) -> list[Job]:
    """Pairs every input with its output.

    Args:
        source: An image or a folder.
        target: An image file or a folder. What is no folder yet and has no image ending becomes a folder.
        kind: Format of the outputs; by default that of the input's ending, png where that is not written.
        recursive: Take the folders below `source` too; the outputs lie in folders of the same names.

    Raises:
        DataError: There is no input, two have the same output, or an output would overwrite an input.
        ConfigError: `target` cannot be what it has to be.
    """
    if not source.exists():
        raise DataError("the image or folder does not exist", where=str(source), fix="check the path")
    jobs = _folder_jobs(source, target, kind, recursive) if source.is_dir() else [_file_job(source, target, kind)]
    _check_targets(jobs)
    return jobs


def _file_job(source: Path, target: Path, kind: str | None) -> Job:
    if target.is_dir() or not _is_image_name(target.name):
        return _job_in(target, source, Path(source.name), kind)
    ending = target.suffix.lower()
    if ending not in _WRITTEN:
        raise ConfigError(f"{ending} is not written", where=str(target), fix="use .png, .jpg, .webp or .tif")
    if kind not in (None, _WRITTEN[ending]):
        raise ConfigError(
            f"--format {kind} does not fit the ending", where=str(target), fix="leave --format out, or change the name"
        )
    return Job(source, target, _WRITTEN[ending])


def _folder_jobs(source: Path, target: Path, kind: str | None, recursive: bool) -> list[Job]:
    if target.exists() and not target.is_dir():
        raise ConfigError("the images of a folder go into a folder", where=str(target), fix="name a folder as OUT")
    if not target.exists() and _is_image_name(target.name):
        raise ConfigError(
            "it has an image's name, but the images of a folder go into a folder",
            where=str(target),
            fix="name a folder as OUT",
        )
    found = sorted(_images(source, target, recursive), key=Path.as_posix)
    if not found:
        hint = "" if recursive else "; add --recursive if they lie in folders below it"
        raise DataError("there is no image in this folder", where=str(source), fix=f"name a folder of images{hint}")
    return [_job_in(target, path, path.relative_to(source), kind) for path in found]


def _images(source: Path, target: Path, recursive: bool) -> Iterator[Path]:
    """Yields the images of a folder, but for outputs that lie inside it."""
    inside = os.path.realpath(target)
    own = inside == os.path.realpath(source)
    for parent, folders, files in os.walk(source, onerror=_raise_unreadable):
        folders[:] = [
            name
            for name in folders
            if recursive and not name.startswith(".") and (own or os.path.realpath(Path(parent, name)) != inside)
        ]
        yield from (Path(parent, name) for name in files if _is_image_name(name))


def _job_in(folder: Path, source: Path, name: Path, kind: str | None) -> Job:
    ending = name.suffix.lower()
    own = _WRITTEN.get(ending)
    if kind is None and own is not None:
        return Job(source, folder / name, own)
    kind = kind or "png"
    return Job(source, folder / (name if own == kind else name.with_suffix(f".{kind}")), kind)


def _check_targets(jobs: list[Job]) -> None:
    by_target: dict[Path, list[Job]] = {}
    for job in jobs:
        by_target.setdefault(job.target, []).append(job)
    doubled = [same for same in by_target.values() if len(same) > 1]
    if doubled:
        names = "; ".join(" and ".join(str(job.source) for job in same) for same in doubled[:_MOST_NAMES])
        more = ", ..." if len(doubled) > _MOST_NAMES else ""
        raise DataError(
            f"several inputs have the same output: {names}{more}",
            where=str(doubled[0][0].target),
            fix="rename them, or leave --format out",
        )
    inputs = {os.path.realpath(job.source) for job in jobs}
    lost = [job.target for job in jobs if os.path.realpath(job.target) in inputs]
    if lost:
        raise DataError("the output would overwrite an input", where=str(lost[0]), fix="name another OUT")


def _is_image_name(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in _WRITTEN.keys() | _OTHER


def _raise_unreadable(error: OSError) -> None:
    raise DataError(f"the folder cannot be listed: {error.strerror}", where=str(error.filename)) from error
