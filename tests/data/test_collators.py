"""Rows -> batches."""

from __future__ import annotations

import pickle

import pytest
import torch

from refreward_trl.data.collators import collate_pairs
from refreward_trl.errors import DataError


def row(sample_id: str, size: int = 8, **columns: object) -> dict[str, object]:
    image = torch.full((3, size, size), len(sample_id), dtype=torch.uint8)
    return {"sample_id": sample_id, "lr_image": image, "hr_image": image.repeat(1, 4, 4), **columns}


def test_equal_sizes_are_stacked_and_stay_uint8() -> None:
    rows = [row("a", prompt="x", mos=0.5), row("bb", prompt="y", mos=None)]
    batch = collate_pairs(rows)
    assert batch["sample_id"] == ["a", "bb"]
    assert isinstance(batch["lr_image"], torch.Tensor) and isinstance(batch["hr_image"], torch.Tensor)
    assert batch["lr_image"].shape == (2, 3, 8, 8) and batch["hr_image"].shape == (2, 3, 32, 32)
    assert batch["lr_image"].dtype == torch.uint8
    assert torch.equal(batch["lr_image"][1], rows[1]["lr_image"])  # type: ignore[arg-type]
    assert {name: batch[name] for name in ("prompt", "mos")} == {"prompt": ["x", "y"], "mos": [0.5, None]}  # type: ignore[literal-required]


def test_different_sizes_stay_a_list() -> None:
    batch = collate_pairs([row("a", 8), row("b", 12)])
    assert [tuple(image.shape) for image in batch["lr_image"]] == [(3, 8, 8), (3, 12, 12)]
    assert [tuple(image.shape) for image in batch["hr_image"]] == [(3, 32, 32), (3, 48, 48)]
    assert isinstance(batch["lr_image"], list) and isinstance(batch["hr_image"], list)


def test_rows_without_hr_image_give_a_batch_without_it() -> None:
    rows = [row("a"), row("b")]
    for one in rows:
        del one["hr_image"]
    assert set(collate_pairs(rows)) == {"sample_id", "lr_image"}


def test_mixed_columns_are_refused_naming_sample_and_column() -> None:
    with pytest.raises(DataError, match="column prompt") as caught:
        collate_pairs([row("first"), row("second", prompt="x")])
    assert "second" in str(caught.value)


def test_missing_columns_are_refused_naming_what_is_there() -> None:
    with pytest.raises(DataError, match=r"no column lr_image; there are: sample_id, image"):
        collate_pairs([{"sample_id": "a", "image": torch.zeros(3, 4, 4)}])


def test_the_collator_reaches_worker_processes() -> None:
    assert pickle.loads(pickle.dumps(collate_pairs)) is collate_pairs
