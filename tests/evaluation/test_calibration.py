"""Margins of known meaning: what is measured of them must be what they mean."""

from __future__ import annotations

from math import inf, isnan, nan

import numpy as np
import pytest

from refreward_trl.evaluation.calibration import (
    FOLDS,
    calibrate,
    fit_temperature,
    margin_auc,
    outcomes_with_ties,
    photo_folds,
    tie_threshold,
)


def calibrated(count: int, temperature: float = 3.0, photos: int = 50, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Margins that are right as often as `sigmoid(|margin| / temperature)` says."""
    random = np.random.default_rng(seed)
    sizes = temperature * random.exponential(1.5, count)
    right = random.random(count) < 1 / (1 + np.exp(-sizes / temperature))
    return np.where(right, sizes, -sizes), [f"photo{number % photos}" for number in range(count)]


def test_calibrated_margins_have_almost_no_error_and_their_own_temperature() -> None:
    margins, photos = calibrated(40_000)
    found = calibrate(margins, photos)
    assert found.ece < 0.01
    assert found.temperature == pytest.approx(3.0, rel=0.05)
    assert sum(part.count for part in found.bins) == len(margins)
    assert all(part.accuracy == pytest.approx(part.confidence, abs=0.03) for part in found.bins)


def test_margins_whose_size_says_nothing_are_not_calibrated() -> None:
    margins, photos = calibrated(20_000)
    random = np.random.default_rng(1)
    unsure = np.sign(margins) * random.permutation(np.abs(margins)) ** 3
    assert calibrate(unsure, photos).ece > 0.05


def test_the_temperature_of_a_photo_does_not_come_from_itself() -> None:
    # One photo's margins are wrong and large: had it been fitted on them, it would know that it knows nothing.
    margins = np.array([1.0, 2.0] * 40 + [-30.0] * 8)
    photos = [f"photo{number % 20}" for number in range(80)] + ["wrong"] * 8
    assert fit_temperature(margins) == inf
    bins = calibrate(margins, photos).bins
    confident = bins[-1]
    assert confident.confidence > 0.95 and confident.accuracy < 0.95


def test_one_photo_and_no_score_give_no_calibration() -> None:
    assert isnan(calibrate([1.0, -2.0], ["a", "a"]).ece)
    assert isnan(calibrate([nan, nan], ["a", "b"]).ece)
    assert isnan(fit_temperature([]))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_units_do_not_matter(scale: float) -> None:
    margins, photos = calibrated(2000)
    assert fit_temperature(scale * margins) == pytest.approx(scale * fit_temperature(margins))
    assert calibrate(scale * margins, photos).ece == pytest.approx(calibrate(margins, photos).ece)


def test_a_scorer_without_errors_is_sure_and_one_that_is_always_wrong_knows_nothing() -> None:
    photos = [f"photo{number % 5}" for number in range(50)]
    sure = calibrate(np.full(50, 0.2), photos)
    assert sure.ece < 1e-6 and sure.bins[-1].confidence > 1 - 1e-6
    wrong = calibrate(np.full(50, -0.2), photos)
    assert wrong.bins[0].confidence == 0.5 and wrong.ece == 0.5


def test_auc_is_the_share_of_right_margins_above_wrong_ones() -> None:
    margins = np.array([0.5, -0.2, 1.0, 0.2, nan])
    right = margins[:4]
    expected = np.mean([[(a > -b) + 0.5 * (a == -b) for b in right] for a in right])
    assert margin_auc(margins) == pytest.approx(expected)
    assert margin_auc([1.0, 2.0]) == 1.0 and margin_auc([-1.0, -2.0]) == 0.0 and margin_auc([0.0, 0.0]) == 0.5
    assert isnan(margin_auc([nan]))
    random = np.random.default_rng(0).normal(size=4000)
    assert margin_auc(random) == pytest.approx(0.5, abs=0.03)


def test_auc_sees_that_the_wrong_margins_are_large() -> None:
    small, large = np.array([1.0] * 8 + [-0.5] * 2), np.array([1.0] * 8 + [-5.0] * 2)
    assert margin_auc(small) > margin_auc(large)


def test_the_tie_threshold_is_the_best_one() -> None:
    random = np.random.default_rng(3)
    ties = random.random(200) < 0.3
    margins = np.where(ties, random.normal(0, 0.3, 200), random.normal(1, 0.8, 200))

    def accuracy(threshold: float) -> float:
        return float(np.where(ties, np.abs(margins) <= threshold, margins > threshold).mean())

    best = tie_threshold(margins, ties)
    assert accuracy(best) == max(accuracy(value) for value in [0.0, *np.abs(margins)])
    assert tie_threshold([0.4, -0.1], [False, False]) == 0.0
    assert tie_threshold([0.4, -0.1], [True, True]) == 0.4


def test_outcomes_with_ties_are_judged_by_the_threshold_of_other_photos() -> None:
    photos = [f"photo{number}" for number in range(20) for _ in range(2)]
    margins, ties = np.tile([0.1, 1.0], 20), np.tile([True, False], 20)
    assert outcomes_with_ties(margins, ties, photos).tolist() == [1.0] * 40
    margins[:2] = 5.0, nan
    outcomes = outcomes_with_ties(margins, ties, photos)
    assert outcomes[0] == 0.0 and isnan(outcomes[1]) and set(outcomes[2:]) == {1.0}


def test_folds_keep_photos_whole_and_do_not_know_the_order_of_rows() -> None:
    photos = [f"photo{number % 23}" for number in range(100)]
    folds = photo_folds(photos, seed=4)
    assert len({(photo, fold) for photo, fold in zip(photos, folds, strict=True)}) == 23
    sizes = np.bincount(photo_folds([f"photo{number}" for number in range(23)], seed=4))
    assert len(sizes) == FOLDS and sizes.max() - sizes.min() <= 1
    order = np.random.default_rng(0).permutation(100)
    assert photo_folds([photos[place] for place in order], seed=4).tolist() == folds[order].tolist()
