"""Intervals must cover what they promise, and agreement measures must equal slow definitions."""

from __future__ import annotations

from itertools import combinations
from math import isnan, nan

import numpy as np
import pytest
from scipy.stats import kendalltau, norm, spearmanr, t

from refreward_trl.errors import DataError
from refreward_trl.evaluation import statistics
from refreward_trl.evaluation.statistics import (
    clustered_bootstrap_ci,
    gain_minus_control,
    kendall_tau,
    order_agreement,
    pairwise_outcomes,
    spearman_rho,
    tau_b,
)


@pytest.mark.parametrize(("clusters", "per_cluster"), [(8, 1), (15, 12)])
def test_interval_covers_the_true_mean_about_95_times_in_100(clusters: int, per_cluster: int) -> None:
    labels = [f"photo{index // per_cluster}" for index in range(clusters * per_cluster)]
    covered, trials = 0, 400
    for trial in range(trials):
        random = np.random.default_rng(trial)
        effect = np.repeat(random.normal(size=clusters), per_cluster)
        values = 3.0 + effect + 0.3 * random.normal(size=len(labels))
        _, low, high = clustered_bootstrap_ci(values, labels, n=500, seed=trial)
        covered += low <= 3.0 <= high
    assert 0.92 <= covered / trials <= 0.98


def test_rows_of_one_cluster_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(0).normal(size=12)
    labels = [f"photo{index}" for index in range(12)]
    once = clustered_bootstrap_ci(values, labels)
    repeated = clustered_bootstrap_ci(np.repeat(values, 50), list(np.repeat(labels, 50)))
    assert repeated == pytest.approx(once)


def test_mean_lies_inside_the_interval_and_the_seed_decides() -> None:
    values, labels = np.random.default_rng(1).exponential(size=20), list(range(20))
    mean, low, high = clustered_bootstrap_ci(values, labels, seed=5)
    assert mean == pytest.approx(values.mean())
    assert low < mean < high
    assert clustered_bootstrap_ci(values, labels, seed=5) == (mean, low, high)
    assert clustered_bootstrap_ci(values, labels, seed=6) != (mean, low, high)


def test_order_of_rows_does_not_matter_within_clusters() -> None:
    labels = ["a", "a", "b", "b", "c", "c"]
    values = np.arange(6.0)
    swapped = [1.0, 0.0, 3.0, 2.0, 5.0, 4.0]
    assert clustered_bootstrap_ci(values, labels) == clustered_bootstrap_ci(swapped, labels)


def test_missing_scores_are_left_out_and_never_count_as_zero() -> None:
    assert clustered_bootstrap_ci([1.0, nan, 3.0], ["a", "b", "c"])[0] == 2.0
    assert clustered_bootstrap_ci([1.0, nan, 3.0], ["a", "b", "c"]) == clustered_bootstrap_ci([1.0, 3.0], ["a", "c"])
    assert all(isnan(value) for value in clustered_bootstrap_ci([nan, nan], ["a", "b"]))


def test_one_photo_gives_a_mean_but_no_interval() -> None:
    mean, low, high = clustered_bootstrap_ci([1.0, 2.0, 3.0], ["a"] * 3)
    assert mean == 2.0
    assert isnan(low) and isnan(high)


def test_wrong_number_of_labels_is_refused() -> None:
    with pytest.raises(DataError, match="3 values came with 2"):
        clustered_bootstrap_ci([1.0, 2.0, 3.0], ["a", "b"])


@pytest.mark.parametrize("clusters", [8, 15, 40])
def test_tail_level_matches_the_exact_student_quantile(clusters: int) -> None:
    exact = norm.cdf(-np.sqrt(clusters / (clusters - 1)) * t.ppf(0.975, clusters - 1))
    assert statistics._tail_level(clusters) == pytest.approx(exact, rel=0.05)
    assert statistics._tail_level(clusters) < 0.025


def test_gain_minus_control_cancels_what_every_photo_and_both_runs_share() -> None:
    random = np.random.default_rng(2)
    level, drift = random.normal(scale=10, size=14), random.normal(size=14)
    found = gain_minus_control(level, level + drift + 0.5, level, level + drift, list(range(14)))
    assert found.mean == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5)
    assert found.high == pytest.approx(0.5)
    assert gain_minus_control(level, level, level, level + 1.0, list(range(14))).mean == pytest.approx(-1.0)


def test_outcomes_score_ties_half_and_keep_missing() -> None:
    outcomes = pairwise_outcomes([2.0, 1.0, 1.0, nan], [1.0, 2.0, 1.0, 0.0])
    assert outcomes[:3].tolist() == [1.0, 0.0, 0.5]
    assert isnan(outcomes[3])


def test_kendall_tau_equals_scipys() -> None:
    random = np.random.default_rng(3)
    for _ in range(5):
        a, b = random.integers(0, 6, size=25), random.integers(0, 6, size=25)
        assert kendall_tau(a, b) == pytest.approx(kendalltau(a, b).statistic)
    assert isnan(kendall_tau([1, 1, 1], [1, 2, 3]))


def test_spearman_rho_equals_scipys() -> None:
    random = np.random.default_rng(5)
    for _ in range(5):
        a, b = random.integers(0, 6, size=25), random.integers(0, 6, size=25)
        assert spearman_rho(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman_rho([1.0, 2.0], [5.0, 9.0]) == pytest.approx(1.0)
    assert isnan(spearman_rho([1, 1, 1], [1, 2, 3]))


def test_tau_b_of_some_pairs_counts_these_alone() -> None:
    assert tau_b([1, 1, 1], [0.2, 3.0, -1.0]) == pytest.approx(1 / 3)
    assert tau_b([1, 0], [0.2, 3.0]) == pytest.approx(1 / np.sqrt(2))
    assert isnan(tau_b([1, 1], [0.0, 0.0]))


def test_order_agreement_counts_pairs_within_groups_only() -> None:
    random = np.random.default_rng(4)
    scores, truth = random.integers(0, 5, size=20).astype(float), random.integers(0, 5, size=20).astype(float)
    groups = [index % 4 for index in range(20)]
    agreed = [
        0.5 if scores[i] == scores[j] else float((scores[i] > scores[j]) == (truth[i] > truth[j]))
        for i, j in combinations(range(20), 2)
        if groups[i] == groups[j] and truth[i] != truth[j]
    ]
    assert order_agreement(scores, truth, groups) == pytest.approx(np.mean(agreed))
    assert order_agreement(truth, truth) == 1.0
    assert order_agreement(-truth, truth) == 0.0
    assert isnan(order_agreement([1.0, 2.0], [1.0, 1.0]))
