"""Errors that a user can act on: what went wrong, where, and how to fix it.

The command line prints exactly `str(error)` and exits with `exit_code`; a traceback appears only with `--debug`.
"""

from __future__ import annotations

import errno

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the limit for one file",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EIO: "the disk reports an error",
}
"""What the operating system says about a disk, in words."""


class RefRewardError(Exception):
    """Base of every error the package raises on purpose.

    Args:
        what: What is wrong, in one sentence that names the offending value.
        where: The file, key, column, sample or step concerned.
        fix: What the user can do about it.
    """

    exit_code = 1
    reported_by: int | None = None
    """The rank that tells the user, where another one has the same error or caused it: this one keeps silent."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n  fix: {self.fix}" if self.fix else ""
        return f"{place}{self.what}{advice}"


class ConfigError(RefRewardError):
    """A recipe, flag or argument that cannot work."""

    exit_code = 2


class DataError(RefRewardError):
    """An image, dataset row or column that cannot be used."""

    exit_code = 3


class RewardError(RefRewardError):
    """A reward callable that raised, or returned something that is not a reward."""

    exit_code = 4


class CheckpointError(RefRewardError):
    """Saved weights or a training state that cannot be read or does not fit."""

    exit_code = 5


class SetupError(RefRewardError):
    """The machine, a missing package, or the way of launching."""

    exit_code = 6


class Preempted(RefRewardError):
    """A signal stopped a run, which is saved and can go on."""

    exit_code = 75


class TrainingError(RefRewardError):
    """A number went bad during training, or the start-up self-check failed; nothing was stepped."""

    exit_code = 7
