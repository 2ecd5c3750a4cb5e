"""Intervals and agreement measures for small sets of photos: numpy only, every draw seeded.

Crops and pairs of one photo are not independent, so every interval here resamples whole photos ("clusters"). With the
dozen photos of a held-out split a plain percentile bootstrap is too narrow; the limits are therefore taken at levels
widened for the number of clusters (T. Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 4.2).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refreward_trl.errors import DataError


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval (`nan` limits: fewer than two clusters, no interval can be had)."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Returns `{"mean", "low", "high"}`."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def clustered_bootstrap_ci(
    values: ArrayLike, clusters: Sequence[Hashable], n: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of `values` with a 95 % bootstrap interval that resamples whole clusters.

    Args:
        values: `(N,)` numbers. NaN means "not scored": left out of the mean and of every resample.
        clusters: `N` labels, usually photo names. Rows of one label are drawn together or not at all.
        n: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        `(mean, low, high)`. The limits are NaN with fewer than two clusters; all three are NaN with nothing scored.
        An interval of width zero says that the clusters agree, not that the mean is certain.

    Raises:
        DataError: `values` and `clusters` differ in length.
    """
    numbers = np.asarray(values, dtype=np.float64).reshape(-1)
    if len(numbers) != len(clusters):
        raise DataError(
            f"{len(numbers)} values came with {len(clusters)} cluster labels",
            where="clustered_bootstrap_ci",
            fix="give each value the name of its photo",
        )
    scored = ~np.isnan(numbers)
    if not scored.any():
        return nan, nan, nan
    sums, counts = _cluster_totals(
        numbers[scored], [label for label, keep in zip(clusters, scored, strict=True) if keep]
    )
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return mean, nan, nan
    draws = np.random.default_rng(seed).integers(0, len(sums), size=(n, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    tail = _tail_level(len(sums))
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return mean, float(low), float(high)


def estimate(values: ArrayLike, clusters: Sequence[Hashable], n: int = 2000, seed: int = 0) -> Estimate:
    """`clustered_bootstrap_ci` as an `Estimate`."""
    return Estimate(*clustered_bootstrap_ci(values, clusters, n=n, seed=seed))


def gain_minus_control(
    before: ArrayLike,
    after: ArrayLike,
    control_before: ArrayLike,
    control_after: ArrayLike,
    clusters: Sequence[Hashable],
    n: int = 2000,
    seed: int = 0,
) -> Estimate:
    """How much more a run gained than its control: the paired difference of differences.

    Row `i` of all four arrays is the same image, so its own level cancels and only `(after - before) -
    (control_after - control_before)` is averaged and resampled by cluster.

    Args:
        before: `(N,)` scores before the run.
        after: `(N,)` scores after the run.
        control_before: `(N,)` scores before the control run.
        control_after: `(N,)` scores after the control run.
        clusters: `N` photo names.
        n: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        Mean of the paired difference of differences with its 95 % interval.
    """
    gain = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    control = np.asarray(control_after, dtype=np.float64) - np.asarray(control_before, dtype=np.float64)
    return estimate(gain - control, clusters, n=n, seed=seed)


def pairwise_outcomes(better: ArrayLike, worse: ArrayLike) -> NDArray[np.float64]:
    """1 where `better` scores higher, 0 where lower, 0.5 where equal, NaN where either is not scored. Shape `(N,)`."""
    margin = np.asarray(better, dtype=np.float64) - np.asarray(worse, dtype=np.float64)
    return np.where(np.isnan(margin), nan, (np.sign(margin) + 1.0) / 2.0)


def order_agreement(scores: ArrayLike, reference: ArrayLike, groups: Sequence[Hashable] | None = None) -> float:
    """Share of pairs that `scores` puts in the order of `reference`.

    Args:
        scores: `(N,)` scores; a tie counts one half.
        reference: `(N,)` oracle values, higher is better; pairs that the oracle ties are left out.
        groups: `N` labels; only pairs of one label are compared (candidates of one LR image). `None` compares all.

    Returns:
        Agreement in [0, 1], 0.5 by chance; NaN when no pair can be compared.
    """
    given, truth = np.asarray(scores, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    first, second = np.triu_indices(len(given), k=1)
    direction = np.sign(truth[first] - truth[second])
    comparable = (direction != 0) & ~np.isnan(direction)
    if groups is not None:
        _, label = np.unique([str(group) for group in groups], return_inverse=True)
        comparable &= label[first] == label[second]
    agreement = pairwise_outcomes(direction * given[first], direction * given[second])[comparable]
    return float(np.nanmean(agreement)) if np.isfinite(agreement).any() else nan


def kendall_tau(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b of two `(N,)` arrays, corrected for ties (Kendall 1945); NaN when one of them is constant."""
    first, second = np.triu_indices(np.asarray(a).reshape(-1).shape[0], k=1)
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return tau_b(left[first] - left[second], right[first] - right[second])


def tau_b(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's tau-b of what two sources say about the same pairs, which need not be all pairs there are.

    Args:
        a, b: `(N,)` per pair positive where its first element is ahead, negative where behind, 0 for a tie.

    Returns:
        Number in [-1, 1]; NaN when one of the sources ties all pairs.
    """
    left, right = np.sign(np.asarray(a, dtype=np.float64)), np.sign(np.asarray(b, dtype=np.float64))
    untied = sqrt(float(np.abs(left).sum())) * sqrt(float(np.abs(right).sum()))
    return float((left * right).sum() / untied) if untied > 0 else nan


def spearman_rho(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of two `(N,)` arrays, ties at their mean rank; NaN when one of them is constant."""
    left, right = (_mean_ranks(values) - (np.size(values) + 1) / 2 for values in (a, b))
    spread = sqrt(float((left**2).sum())) * sqrt(float((right**2).sum()))
    return float((left * right).sum() / spread) if spread > 0 else nan


def _mean_ranks(values: ArrayLike) -> NDArray[np.float64]:
    _, place, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)]


def _cluster_totals(values: NDArray[np.float64], labels: Sequence[Hashable]) -> tuple[NDArray, NDArray]:
    """Sum and number of the values of each cluster, in order of first appearance."""
    index = {label: position for position, label in enumerate(dict.fromkeys(labels))}
    place = np.array([index[label] for label in labels])
    return np.bincount(place, weights=values), np.bincount(place)


def _tail_level(clusters: int) -> float:
    """Quantile level of one tail, widened from 2.5 % for few clusters.

    The spread of a bootstrap mean is `sqrt((n - 1) / n)` of what it should be, and normal where Student's t is due.
    The level `Phi(-sqrt(n / (n - 1)) * t)` mends both, with t at 97.5 % from its expansion in 1 / (n - 1)
    (Abramowitz and Stegun 26.7.5); below five clusters the expansion, and any interval, says little.
    """
    freedom = clusters - 1
    z = NormalDist().inv_cdf(0.975)
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return NormalDist().cdf(-sqrt(clusters / freedom) * student)
