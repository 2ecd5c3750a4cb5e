"""Preference records as a dataset of groups to train on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from refreward_trl.data.preference_records import PreferenceGroup, PreferenceRecord
from refreward_trl.errors import DataError
from refreward_trl.randomness import stateless_generator


class RecordGroups(Dataset):
    """Groups read from files on demand, cut to aligned crops.

    Row `i` is a pure function of `(seed, i)`: record `i % n`, at the place of its visit number `i // n`. There is one
    row per record, see `visited`.

    Args:
        records: The groups, see `read_preferences`.
        crop_size: Side in SR pixels of a crop; a side of an image that is shorter is taken whole.
        aspect: Whose labels are taken; groups without any are left out.
        seed: Seed of the places.

    Raises:
        DataError: No group has labels for the aspect.
    """

    def __init__(
        self,
        records: Sequence[PreferenceRecord],
        *,
        crop_size: int,
        aspect: str = "overall",
        seed: int = 0,
    ) -> None:
        self._records = [record for record in records if record.pairs(aspect)]
        if not self._records:
            raise DataError(
                f"none of {len(records)} groups says anything about {aspect!r}",
                where="preferences",
                fix="name the aspect that they were compared in; `refreward data stats` lists them",
            )
        self._length = len(self._records)
        self._crop_size, self._aspect, self._seed = crop_size, aspect, seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self._length:
            raise IndexError(f"group {index} of {self._length}")
        visit, number = divmod(index, len(self._records))
        return self.group(number, visit).as_row()

    def visited(self, length: int) -> RecordGroups:
        """Returns the same groups as `length` rows: the first ones, or each several times at different places."""
        groups = copy.copy(self)
        groups._length = length
        return groups

    def group(self, number: int, visit: int = 0) -> PreferenceGroup:
        """Returns record `number`, cropped for its visit number `visit`."""
        record = self._records[number]
        generator = stateless_generator(self._seed, "preference_crop", visit, record.sample_id)
        return crop_group(record.load(self._aspect), self._crop_size, generator)


def crop_group(group: PreferenceGroup, crop_size: int, generator: torch.Generator) -> PreferenceGroup:
    """Cuts the same place out of LR image and candidates, on LR pixels.

    Args:
        group: Candidates of one size; others are returned as they are.
        crop_size: Side in SR pixels, rounded down to whole LR pixels.
        generator: Chooses the place.

    Raises:
        DataError: The crop is smaller than one LR pixel.
    """
    candidates, lr_image = group.candidates, group.lr_image
    if not isinstance(candidates, Tensor):
        return group
    scale = candidates.shape[-1] // lr_image.shape[-1]
    if crop_size < scale:
        raise DataError(f"a crop of {crop_size} pixels holds no LR pixel at scale {scale}", where=group.sample_id)
    sides = [min(crop_size // scale, side) for side in lr_image.shape[-2:]]
    top, left = (
        int(torch.randint(whole - side + 1, (), generator=generator))
        for whole, side in zip(lr_image.shape[-2:], sides, strict=True)
    )
    return replace(
        group,
        lr_image=_cut(lr_image, top, left, sides, 1),
        candidates=_cut(candidates, top, left, sides, scale),
        hr_image=None,
    )


def _cut(image: Tensor, top: int, left: int, sides: Sequence[int], scale: int) -> Tensor:
    top, left, height, width = (scale * value for value in (top, left, *sides))
    return image[..., top : top + height, left : left + width].contiguous()
