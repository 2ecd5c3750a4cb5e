"""Whether margins can be believed: confidence, calibration, ties. numpy only.

A margin is a scorer's opinion of a pair, oriented by its label: positive where the scorer agrees with it. Whatever is
fitted here, a temperature or a threshold for ties, is fitted on other photos than those that it is measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refreward_trl.evaluation.statistics import pairwise_outcomes
from refreward_trl.randomness import stateless_seed

BINS = 10
"""Bins of equal width between the confidences 0.5 and 1."""
FOLDS = 5
STEEPEST = 50.0
"""The most logits that the mean margin may be worth: without errors to learn from, the best temperature would be 0."""
_HALVINGS = 60

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """Pairs of about the same confidence: their number, mean confidence, and the share that is right."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """How far confidences keep what they promise.

    Attributes:
        ece: Expected calibration error, the mean over pairs of |accuracy - confidence| of their bin (Guo et al. 2017);
            NaN where nothing can be fitted. With few pairs it is above 0 also for a calibrated scorer.
        temperature: Fitted on all photos, for use elsewhere; infinite for a scorer that is no better than chance.
        bins: The reliability curve: bins that are not empty, the least confident first.
    """

    ece: float
    temperature: float
    bins: tuple[Bin, ...]


def calibrate(margins: ArrayLike, photos: Sequence[str], *, seed: int = 0) -> Calibration:
    """Measures the calibration of `sigmoid(|margin| / temperature)`, the temperature fitted on other photos.

    Args:
        margins: `(N,)` margins of pairs whose label is no tie; NaN is left out.
        photos: Their photos.
        seed: Of the folds.
    """
    given = np.asarray(margins, dtype=np.float64)
    confidence = cross_fitted(
        given, photos, lambda train: fit_temperature(given[train]), lambda test, T: _confidence(given[test], T), seed
    )
    scored = np.isfinite(confidence)
    correct = pairwise_outcomes(given, np.zeros_like(given))
    bins = reliability(confidence[scored], correct[scored])
    gaps = [part.count * abs(part.accuracy - part.confidence) for part in bins]
    ece = float(np.sum(gaps) / scored.sum()) if scored.any() else nan
    return Calibration(ece, fit_temperature(given), tuple(bins))


def reliability(confidence: Floats, correct: Floats) -> list[Bin]:
    """Returns the bins of a reliability curve that are not empty; confidences in [0.5, 1]."""
    place = np.minimum((2 * BINS * (confidence - 0.5)).astype(int), BINS - 1)
    members = [place == number for number in range(BINS)]
    return [
        Bin(int(member.sum()), float(confidence[member].mean()), float(correct[member].mean()))
        for member in members
        if member.any()
    ]


def fit_temperature(margins: ArrayLike) -> float:
    """Returns the temperature that makes `sigmoid(margin / temperature)` most likely; NaN is left out.

    The likelihood is concave in the inverse temperature, so its slope is halved in on; infinite where it is best to
    know nothing, NaN without margins.
    """
    given = np.asarray(margins, dtype=np.float64)
    given = given[~np.isnan(given)]
    size = float(np.abs(given).mean()) if len(given) else nan
    if not len(given):
        return nan
    if not given.mean() > 0:
        return inf
    low, high = 0.0, STEEPEST / size
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        rising = float((given * _sigmoid(-middle * given)).mean()) > 0
        low, high = (middle, high) if rising else (low, middle)
    return 1 / high


def margin_auc(margins: ArrayLike) -> float:
    """Area under the ROC curve of the margin, each pair given in both orders: the chance that a margin of the right
    order is above one of the wrong order.

    It asks more than accuracy: margins must be comparable between groups, the wrong ones small. 0.5 by chance, NaN
    without scored pairs.
    """
    right = np.asarray(margins, dtype=np.float64)
    right = right[~np.isnan(right)]
    if not len(right):
        return nan
    wrong = np.sort(-right)
    below = np.searchsorted(wrong, right, "left") + np.searchsorted(wrong, right, "right")
    return float(below.mean() / (2 * len(right)))


def outcomes_with_ties(margins: ArrayLike, ties: ArrayLike, photos: Sequence[str], *, seed: int = 0) -> Floats:
    """Returns 1 where a scorer that may say "tie" is right, 0 where wrong, NaN where not scored.

    It says so where |margin| is at most a threshold, chosen on the other photos: tie calibration, and the outcomes
    whose mean is acc_eq (Deutsch, Foster and Freitag 2023), which counts a tie that is called for as right.

    Args:
        margins: `(N,)` margins; of a labelled tie in any orientation.
        ties: `(N,)` whether the label is a tie.
        photos: Their photos.
        seed: Of the folds.
    """
    given, tied = np.asarray(margins, dtype=np.float64), np.asarray(ties, dtype=bool)
    return cross_fitted(
        given,
        photos,
        lambda train: tie_threshold(given[train], tied[train]),
        lambda test, threshold: _right_with_ties(given[test], tied[test], threshold),
        seed,
    )


def tie_threshold(margins: ArrayLike, ties: ArrayLike) -> float:
    """Returns the least threshold with which a scorer that calls `|margin| <= threshold` a tie is right most often."""
    given, tied = np.asarray(margins, dtype=np.float64), np.asarray(ties, dtype=bool)
    tied, given = tied[~np.isnan(given)], given[~np.isnan(given)]
    thresholds = np.unique(np.append(np.abs(given), 0.0))
    called = np.searchsorted(np.sort(np.abs(given[tied])), thresholds, "right")
    orders = np.sort(given[~tied])
    right = len(orders) - np.searchsorted(orders, thresholds, "right")
    return float(thresholds[np.argmax(called + right)])


def cross_fitted(
    values: Floats,
    photos: Sequence[str],
    fit: Callable[[NDArray[np.bool_]], float],
    apply: Callable[[NDArray[np.bool_], float], Floats],
    seed: int = 0,
) -> Floats:
    """Returns `(N,)` what `apply` makes of each photo's rows with what `fit` learns from the rows of other folds.

    NaN where there is nothing to learn from: with one photo, or where `values` of the other folds are NaN.
    """
    made = np.full(len(values), nan)
    folds = photo_folds(photos, seed)
    for fold in np.unique(folds):
        test, train = folds == fold, folds != fold
        if not np.isnan(values[train]).all():
            made[test] = apply(test, fit(train))
    made[np.isnan(values)] = nan
    return made


def photo_folds(photos: Sequence[str], seed: int = 0) -> NDArray[np.int64]:
    """Returns `(N,)` the fold of each row: whole photos, spread evenly, whatever the order of the rows."""
    names = sorted(set(photos), key=lambda name: (stateless_seed(seed, "fold", name), name))
    fold = {name: number % FOLDS for number, name in enumerate(names)}
    return np.array([fold[name] for name in photos], dtype=np.int64)


def _right_with_ties(margins: Floats, ties: NDArray[np.bool_], threshold: float) -> Floats:
    return np.where(ties, np.abs(margins) <= threshold, margins > threshold).astype(np.float64)


def _confidence(margins: Floats, temperature: float) -> Floats:
    return _sigmoid(np.abs(margins) / temperature) if isfinite(temperature) else np.full(len(margins), 0.5)


def _sigmoid(x: Floats) -> Floats:
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        return np.exp(-np.logaddexp(0.0, -x))
