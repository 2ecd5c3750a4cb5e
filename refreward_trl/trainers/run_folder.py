"""The folder of a run: one run at a time writes to it, and it has room for what will be written."""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

import safetensors
from filelock import FileLock, Timeout

from refreward_trl.errors import DISK_ERRORS, SetupError

LOCK_FILE = ".lock"
LOCK_PATIENCE = 15.0
"""Seconds to wait for the lock: the data loader's workers of a killed run hold it until they notice."""
TORCH_WRITE_ERRORS = ("PytorchStreamWriter", "unexpected pos", "iostream error", "Parent directory")
"""Parts of the messages of the RuntimeErrors by which `torch.save` reports what the operating system refused."""


def lock_run_folder(folder: Path, patience: float = LOCK_PATIENCE) -> FileLock:
    """Returns the lock on a run's folder, held. The operating system gives it back when the process dies.

    Raises:
        SetupError: Another run holds it, or the folder cannot be written to.
    """
    check_writable(folder)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise SetupError(
            "another run is writing to this folder", where=str(folder), fix="wait for it, or choose another output_dir"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise SetupError(f"the folder cannot be locked: {explain(error)}", where=str(folder)) from error
    return lock


def check_writable(folder: Path) -> None:
    """Creates the folder and writes and deletes a small file in it.

    Raises:
        SetupError: Saying what the operating system says.
    """
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        raise unwritable(folder, error) from error


def unwritable(folder: Path | str, error: OSError) -> SetupError:
    """Returns the error for a run's folder in which nothing can be written."""
    return SetupError(
        f"the folder cannot be written to: {explain(error)}", where=str(folder), fix="choose another output_dir"
    )


def check_space(folder: Path, checkpoint_bytes: int, kept: int) -> None:
    """Makes sure that the checkpoints fit onto the disk, before hours of training.

    Args:
        folder: The existing folder of the run.
        checkpoint_bytes: Expected size of a checkpoint.
        kept: Checkpoints that are kept; one more is on the disk while it is written.

    Raises:
        SetupError: They do not fit.
    """
    free, needed = shutil.disk_usage(folder).free, checkpoint_bytes * (kept + 1)
    if needed > free:
        raise SetupError(
            f"{kept + 1} checkpoints of {readable(checkpoint_bytes)} need {readable(needed)}, but {readable(free)} "
            "are free",
            where=str(folder),
            fix="free space, choose another output_dir, or lower save_total_limit",
        )


def is_write_error(error: BaseException) -> bool:
    """Whether an exception says that something could not be written."""
    if isinstance(error, RuntimeError):
        return any(part in str(error) for part in TORCH_WRITE_ERRORS)
    return isinstance(error, (OSError, safetensors.SafetensorError))


def explain(error: BaseException) -> str:
    """Returns what a failed write means, in words."""
    number = getattr(error, "errno", None)
    if number:
        return DISK_ERRORS.get(number, os.strerror(number))
    return f"a write was cut short, as on a full disk ({str(error).strip().splitlines()[0]})"


def readable(size: int) -> str:
    """Returns a number of bytes as text, such as "1.5 GB"."""
    amount, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.3g} {unit}"
