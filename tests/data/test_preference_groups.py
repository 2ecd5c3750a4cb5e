import itertools

import pytest
import torch

from refreward_trl.data.preference_groups import RecordGroups, crop_group
from refreward_trl.data.preference_records import Candidate, PreferenceGroup, PreferenceRecord
from refreward_trl.errors import DataError


class Pixels:
    """An image that is in memory."""

    def __init__(self, pixels: torch.Tensor) -> None:
        self.pixels = pixels
        self.where = "memory"

    def size(self) -> tuple[int, int]:
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def read(self) -> torch.Tensor:
        return self.pixels


def record(name: str, *, ranks: tuple[int | None, ...] = (0, 1, 1), size: int = 8) -> PreferenceRecord:
    # Each LR pixel has its own value, and each SR pixel that of its LR pixel.
    lr_image = torch.arange(size * size).view(1, size, size).expand(3, -1, -1).to(torch.uint8)
    sr_image = lr_image.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    candidates = tuple(Candidate(Pixels(sr_image), generator=f"net{index}") for index in range(len(ranks)))
    return PreferenceRecord(name, name, Pixels(lr_image), candidates, ranks={"overall": ranks})


def test_crops_of_lr_and_candidates_show_the_same_place() -> None:
    groups = RecordGroups([record("a"), record("b")], crop_size=16).visited(10)
    for row in (groups[index] for index in range(10)):
        assert row["lr_image"].shape == (3, 4, 4)
        assert row["candidates"].shape == (3, 3, 16, 16)
        assert torch.equal(row["candidates"][1][:, ::4, ::4], row["lr_image"])
        assert row["better_worse"].tolist() == [[0, 1], [0, 2]]
        assert row["ties"].tolist() == [[1, 2]]


def test_rows_are_pure_functions_and_visits_differ() -> None:
    groups = RecordGroups([record("a")], crop_size=16).visited(8)
    rows = [groups[index]["lr_image"] for index in range(8)]
    assert all(torch.equal(rows[index], groups[index]["lr_image"]) for index in reversed(range(8)))
    assert len({tuple(row.flatten().tolist()) for row in rows}) > 2
    other = RecordGroups([record("a")], crop_size=16, seed=1).visited(8)
    assert any(not torch.equal(rows[index], other[index]["lr_image"]) for index in range(8))


@pytest.mark.parametrize(("crop_size", "side"), [(1000, 8), (32, 8), (31, 7), (18, 4), (4, 1)])
def test_crops_lie_on_lr_pixels_and_small_images_stay_whole(crop_size: int, side: int) -> None:
    row = RecordGroups([record("a")], crop_size=crop_size)[0]
    assert row["lr_image"].shape == (3, side, side)
    assert row["candidates"].shape == (3, 3, 4 * side, 4 * side)


def test_groups_without_labels_for_the_aspect_are_left_out() -> None:
    records = [record("a"), record("b", ranks=(None, None))]
    assert len(RecordGroups(records, crop_size=16)) == 1
    with pytest.raises(DataError, match="none of 2 groups says anything about 'naturalness'"):
        RecordGroups(records, crop_size=16, aspect="naturalness")


@pytest.mark.parametrize("count", range(2, 9))
def test_groups_of_two_to_eight(count: int) -> None:
    row = RecordGroups([record("a", ranks=tuple(range(count)))], crop_size=16)[0]
    assert row["better_worse"].tolist() == [list(pair) for pair in itertools.combinations(range(count), 2)]


def test_a_crop_without_an_lr_pixel_is_refused() -> None:
    group = record("a").load()
    with pytest.raises(DataError, match="holds no LR pixel"):
        crop_group(group, 3, torch.Generator())


def test_candidates_of_different_sizes_are_left_whole() -> None:
    images = (torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 16, 16, dtype=torch.uint8))
    group = PreferenceGroup("a", "a", torch.zeros(3, 4, 4, dtype=torch.uint8), images, ((0, 1),), ("", ""))
    assert crop_group(group, 4, torch.Generator()) is group
