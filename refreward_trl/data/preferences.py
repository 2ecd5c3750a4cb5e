"""Preference groups: the K candidates of one LR image and which of them is better, and pairs for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class PreferenceGroup:
    """The candidates of one LR image with a partial order known by construction or given by a named source.

    Attributes:
        sample_id: Group key, `"<photo>@<draw>"`.
        photo: Name of the photo; the cluster for confidence intervals and for splits.
        lr_image: uint8 `(3, h, w)`.
        candidates: uint8 `(K, 3, H, W)`.
        better_worse: Index pairs `(better, worse)` into `candidates`.
        kinds: How each candidate was made.
        source: Where the order comes from: `"constructed"`, or the name of a metric. Human only if people were asked.
    """

    sample_id: str
    photo: str
    lr_image: UInt8[Tensor, "3 h w"]
    candidates: UInt8[Tensor, "k 3 H W"]
    better_worse: tuple[tuple[int, int], ...]
    kinds: tuple[str, ...]
    source: str = "constructed"

    def as_row(self) -> dict[str, Any]:
        """Returns the dataset row that `RefRewardTrainer` collates."""
        return {
            "sample_id": self.sample_id,
            "lr_image": self.lr_image,
            "candidates": self.candidates,
            "better_worse": torch.tensor(self.better_worse, dtype=torch.long).reshape(-1, 2),
            "kinds": list(self.kinds),
        }


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
