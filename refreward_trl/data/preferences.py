"""Preferences: groups of candidates of one LR image, their files, pairs for evaluation, and datasets of groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset

from refreward_trl.data.preference_files import read_preferences, write_preferences
from refreward_trl.data.preference_records import (
    ASPECTS,
    Candidate,
    OrderedPair,
    PreferenceChoice,
    PreferenceGroup,
    PreferenceRecord,
)

__all__ = [
    "ASPECTS",
    "CachedGroups",
    "Candidate",
    "GroupDataset",
    "OrderedPair",
    "PreferenceChoice",
    "PreferenceGroup",
    "PreferencePair",
    "PreferenceRecord",
    "read_preferences",
    "write_preferences",
]


@dataclass(frozen=True)
class PreferencePair:
    """Two candidates of one LR image, ordered, as a row of an evaluation column.

    Attributes:
        sample_id: Unique within the column.
        photo: Cluster for confidence intervals.
        column: Which question the pair asks, see `data.candidates.EVALUATION_COLUMNS`.
        kind: The artefact that makes the worse one worse.
        lr_image: uint8 `(3, h, w)`.
        better, worse: uint8 `(3, H, W)`.
    """

    sample_id: str
    photo: str
    column: str
    kind: str
    lr_image: UInt8[Tensor, "3 h w"]
    better: UInt8[Tensor, "3 H W"]
    worse: UInt8[Tensor, "3 H W"]


class GroupDataset(Dataset):
    """Preference groups built on demand: row `i` is a pure function of `i`, the same in any worker and on any rank."""

    def __init__(self, build: Callable[[int], PreferenceGroup], length: int) -> None:
        self._build = build
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._length:
            raise IndexError(f"group {index} of {self._length}")
        return self._build(index).as_row()


class CachedGroups(Dataset):
    """Preference groups held in memory as uint8, for trainings that visit every group several times."""

    def __init__(self, groups: Sequence[PreferenceGroup]) -> None:
        self._groups = list(groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._groups[index].as_row()
