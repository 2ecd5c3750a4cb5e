"""Scores that were computed once: an SQLite file keyed by judge, question and pixels."""

from __future__ import annotations

import hashlib
import math
import sqlite3
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from refreward_trl.errors import ConfigError

BUSY_SECONDS = 30.0
"""How long a process waits for another one that writes."""


class ScoreCache:
    """A file of scores that several runs and ranks may share.

    An entry that is damaged, or a file that is no database, counts as a miss and never as a score: each value carries
    a checksum of itself and its key.

    Args:
        path: The file; made at the first use, its folder too.
        identity: What names the judge and its question, for example digest of the weights and hash of the spec.

    Raises:
        ConfigError: The path is a folder, or its folder cannot be made.
    """

    def __init__(self, path: str | Path, *, identity: str) -> None:
        self.path = Path(path)
        self.identity = identity
        self.hits = 0
        self.misses = 0
        if self.path.is_dir():
            raise ConfigError(f"{self.path} is a folder", where="cache", fix="name a file")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"its folder cannot be made ({error})", where=f"cache {self.path}") from error
        self._database: sqlite3.Connection | None = self._open()

    def key(self, lr_image: Tensor, sr_image: Tensor) -> bytes:
        """Returns the key of one pair of images: 32 bytes from identity, shapes and exact pixels."""
        digest = hashlib.sha256(self.identity.encode())
        for image in (lr_image, sr_image):
            pixels = image.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"|{tuple(pixels.shape)}|".encode())
            digest.update(pixels.numpy().tobytes())
        return digest.digest()

    def find(self, keys: Sequence[bytes]) -> list[float | None]:
        """Returns the stored scores, None for what is not there or damaged."""
        if self._database is None:
            return [None] * len(keys)
        try:
            found = [
                self._database.execute("SELECT entry FROM scores WHERE key = ?", (key,)).fetchone() for key in keys
            ]
        except sqlite3.Error as error:
            self._give_up(error)
            return [None] * len(keys)
        scores = [None if row is None else _read(key, row[0]) for key, row in zip(keys, found, strict=True)]
        missing = scores.count(None)
        self.misses += missing
        self.hits += len(scores) - missing
        return scores

    def store(self, scores: Mapping[bytes, float]) -> None:
        """Keeps finite scores; others are no scores."""
        entries = [(key, _entry(key, score)) for key, score in scores.items() if math.isfinite(score)]
        if self._database is None or not entries:
            return
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", entries)
        except sqlite3.Error as error:
            self._give_up(error)

    def _open(self) -> sqlite3.Connection | None:
        try:
            database = sqlite3.connect(self.path, timeout=BUSY_SECONDS, check_same_thread=False)
            with database:
                database.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, entry BLOB)")
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return database

    def _give_up(self, error: sqlite3.Error) -> None:
        self._database = None
        warnings.warn(
            f"the score cache {self.path} cannot be used ({error}): every score is computed. Delete it to start anew.",
            RuntimeWarning,
            stacklevel=3,
        )


def _entry(key: bytes, score: float) -> bytes:
    value = struct.pack("<d", score)
    return value + hashlib.sha256(key + value).digest()[:8]


def _read(key: bytes, entry: object) -> float | None:
    if not isinstance(entry, bytes) or len(entry) != 16:
        return None
    (score,) = struct.unpack("<d", entry[:8])
    return score if entry == _entry(key, score) and math.isfinite(score) else None
