"""Gains are paired by photo and only count beyond the control."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from refreward_trl.errors import DataError
from refreward_trl.evaluation.alignment_benchmark import AlignmentResult, telling_photos
from refreward_trl.evaluation.sr_benchmark import Row

PHOTOS = [f"photo{index}" for index in range(12)]


def rows(offset: float = 0.0, *, drift: float = 0.0, heldout: float = 0.0) -> list[Row]:
    """Figures of twelve photos whose levels differ by far more than any gain."""
    random = np.random.default_rng(0)
    levels, noise = random.normal(scale=5.0, size=12), random.normal(scale=0.02, size=12)
    return [
        {
            "sample_id": photo,
            "reward/judge": level + offset + drift * noise[index] / 0.02,
            "reward/other": 0.1 * level + heldout,
            "lr_psnr": 30.0 - offset,
            "hr_psnr": 24.0,
            "ssim": 0.7,
            "gradient_energy": 0.002,
        }
        for index, (photo, level) in enumerate(zip(PHOTOS, levels.tolist(), strict=True))
    ]


def result(after: list[Row], control: list[Row]) -> AlignmentResult:
    return AlignmentResult("ReFL", "judge", "other", 10, 80, 12.5, rows(), after, control)


def test_a_gain_far_below_the_spread_of_photos_is_found() -> None:
    found = result(rows(0.3, drift=0.05), rows(0.1, drift=0.02))
    assert found.change("reward/judge").mean == pytest.approx(0.3, abs=0.05)
    assert found.gain_minus_control().mean == pytest.approx(0.2, abs=0.05)
    assert 0.1 < found.gain_minus_control().low < found.gain_minus_control().high < 0.3
    assert found.spread > 3


def test_a_gain_that_the_control_has_too_is_none() -> None:
    found = result(rows(0.3, drift=0.05), rows(0.3, drift=-0.05)).gain_minus_control()
    assert found.low < 0 < found.high


def test_summary_names_every_figure_and_adds_up() -> None:
    summary = result(rows(0.3, heldout=0.02), rows(0.1)).summary()
    assert summary["gain"] == pytest.approx(summary["reward_after"] - summary["reward_before"])
    assert summary["gain"] - summary["control_gain"] == pytest.approx(0.2)
    assert summary["heldout_after"] - summary["heldout_before"] == pytest.approx(0.02)
    assert summary["lr_psnr_after"] - summary["lr_psnr_before"] == pytest.approx(-0.3)
    assert summary["gain_minus_control_ci95"] == pytest.approx([0.2, 0.2])
    assert (summary["steps"], summary["images"], summary["seconds"]) == (10, 80, 12.5)


def test_rows_of_other_photos_are_refused() -> None:
    with pytest.raises(DataError, match="same photos"):
        result(list(reversed(rows())), rows())
    with pytest.raises(DataError, match="same photos"):
        result(rows(), rows()[:-1])


def test_telling_photos_are_the_extremes_without_repeats() -> None:
    after = rows()
    after[3]["reward/judge"] += 2.0
    after[5]["reward/judge"] -= 1.0
    before_images = {photo: torch.zeros(3, 8, 8) for photo in PHOTOS}
    after_images = {photo: torch.full((3, 8, 8), 0.01) for photo in PHOTOS}
    after_images["photo7"] = torch.full((3, 8, 8), 0.5)
    assert telling_photos(result(after, rows()), before_images, after_images) == [
        ("photo3", "largest gain"),
        ("photo5", "smallest gain"),
        ("photo7", "most changed"),
    ]
    after_images["photo3"] = torch.full((3, 8, 8), 0.9)
    assert telling_photos(result(after, rows()), before_images, after_images) == [
        ("photo3", "largest gain, most changed"),
        ("photo5", "smallest gain"),
    ]
