"""Judges of known behaviour on pairs made here: the table must say what they are."""

from __future__ import annotations

from math import nan

import numpy as np
import pytest
import torch
from torch import Tensor

from refreward_trl.data.preferences import PreferencePair
from refreward_trl.errors import DataError
from refreward_trl.evaluation.reward_benchmark import (
    BASELINES,
    benchmark_judge,
    by_kind,
    foreign_partners,
    judge_column,
    plain_columns,
    pooled,
    projected_columns,
    unseen_columns,
)
from refreward_trl.resampling import downscale, upscale


def make_pairs(column: str = "artefact", count: int = 12) -> list[PreferencePair]:
    """Pairs whose better side is smooth and fits the LR image; the worse side is noisy or another image."""
    random = torch.Generator().manual_seed(0)
    pairs = []
    for index in range(count):
        better = upscale(torch.rand((1, 3, 8, 8), generator=random), 4)
        other = upscale(torch.rand((1, 3, 8, 8), generator=random), 4)
        kind = ("noise", "other")[index % 2]
        noise = 0.1 * torch.randn(better.shape, generator=random)
        worse = (better + noise).clamp(0, 1) if kind == "noise" else other
        lr_image = downscale(better, 4).clamp(0, 1)
        images = [(image[0] * 255).round().byte() for image in (lr_image, better, worse)]
        pairs.append(PreferencePair(f"p{index % 4}@{index}", f"p{index % 4}", column, kind, *images))
    return pairs


def consistent(lr_image: Tensor, sr_image: Tensor) -> Tensor:
    return -(downscale(sr_image, 4) - lr_image).abs().mean(dim=(1, 2, 3))


def blind_to_lr(lr_image: Tensor, sr_image: Tensor) -> Tensor:
    return -sr_image.diff(dim=-1).abs().mean(dim=(1, 2, 3))


def test_a_judge_that_reads_the_lr_image_needs_it_and_a_blind_one_does_not() -> None:
    pairs = make_pairs()
    assert judge_column(consistent, pairs).accuracy.mean == 1.0
    shuffled = judge_column(consistent, pairs, shuffle_lr=True).accuracy.mean
    assert shuffled < 0.9
    assert judge_column(blind_to_lr, pairs).outcomes.tolist() == (
        judge_column(blind_to_lr, pairs, shuffle_lr=True).outcomes.tolist()
    )


def test_a_reversed_judge_is_wrong_and_a_constant_one_ties() -> None:
    pairs = make_pairs()
    assert judge_column(lambda *images: -consistent(*images), pairs).accuracy.mean == 0.0
    assert judge_column(lambda _, sr_image: torch.zeros(len(sr_image)), pairs).accuracy.mean == 0.5


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_change_nothing(batch_size: int) -> None:
    pairs = make_pairs()
    expected = judge_column(blind_to_lr, pairs)
    assert judge_column(blind_to_lr, pairs, batch_size=batch_size).outcomes.tolist() == expected.outcomes.tolist()


def test_missing_scores_are_counted_not_guessed() -> None:
    def sometimes(lr_image: Tensor, sr_image: Tensor) -> Tensor:
        scores = consistent(lr_image, sr_image)
        scores[0] = nan
        return scores

    result = judge_column(sometimes, make_pairs(), batch_size=12)
    assert result.missing == 1
    assert result.accuracy.mean == 1.0


def test_kinds_are_separated_and_the_worst_comes_first() -> None:
    table = by_kind([judge_column(blind_to_lr, make_pairs())])
    assert next(iter(table)) == "other"
    assert table["noise"] == (1.0, 6)
    assert table["other"][1] == 6


def test_the_foreign_lr_image_is_never_of_the_same_photo() -> None:
    photos = [f"p{index % 3}" for index in range(30)]
    partners = foreign_partners(photos, seed=0)
    assert all(photos[partner] != photo for photo, partner in zip(photos, partners, strict=True))
    assert partners == foreign_partners(photos, seed=0)
    assert partners != foreign_partners(photos, seed=1)
    with pytest.raises(DataError, match="the photo 'a'"):
        foreign_partners(["a", "a"], seed=0)


def test_baselines_see_what_their_names_say() -> None:
    sharp = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    lr_image = downscale(sharp, 4).clamp(0, 1)
    smooth = upscale(lr_image, 4)
    assert BASELINES["psnr_to_upsampled_lr"](lr_image, smooth) > 90
    assert BASELINES["psnr_down_sr_to_lr"](lr_image, sharp) > BASELINES["psnr_down_sr_to_lr"](lr_image, smooth)
    assert BASELINES["laplacian_variance"](lr_image, sharp) > BASELINES["laplacian_variance"](lr_image, smooth)
    assert BASELINES["laplacian_variance"](lr_image, torch.full_like(sharp, 0.5)).item() == pytest.approx(0, abs=1e-9)


def test_columns_fall_into_three_sorts() -> None:
    names = ["artefact", "severity", "unseen_artefact", "projected_artefact", "projected_unseen_artefact"]
    assert plain_columns(names) == ["artefact", "severity"]
    assert unseen_columns(names) == ["unseen_artefact"]
    assert projected_columns(names) == ["projected_artefact", "projected_unseen_artefact"]


def test_a_report_holds_every_column_the_shuffle_and_the_baselines() -> None:
    columns = [make_pairs(name, count=8) for name in ("artefact", "severity", "unseen_artefact", "projected_artefact")]
    watched: list[str] = []
    report = benchmark_judge(consistent, columns, watch=lambda result: watched.append(result.column))
    assert watched == ["artefact", "severity", "unseen_artefact", "projected_artefact"]
    assert list(report.shuffled) == ["artefact", "severity"]
    assert all(list(table) == watched for table in report.baselines.values())
    summary = report.summary()
    assert summary["pairs"] == 32
    assert summary["accuracy"] == 1.0
    assert summary["accuracy_lr_shuffled"] < 0.9
    assert summary["baselines"]["psnr_down_sr_to_lr"] == 1.0
    assert set(summary["projected_baselines"]) == set(BASELINES)
    assert set(summary["by_kind"]) == {"noise", "other"}
    outcomes = np.concatenate([report.own[name].outcomes for name in ("artefact", "severity")])
    assert pooled(report.own[name] for name in ("artefact", "severity")).mean == pytest.approx(outcomes.mean())
    assert report.best_baseline(plain_columns)[1] == max(summary["baselines"].values())


def test_mixed_columns_and_wrong_score_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="one column"):
        judge_column(consistent, [*make_pairs(), *make_pairs("severity")])
    with pytest.raises(DataError, match="one column"):
        judge_column(consistent, [])
    with pytest.raises(DataError, match="one score per image"):
        judge_column(lambda _, sr_image: sr_image.mean(), make_pairs())
