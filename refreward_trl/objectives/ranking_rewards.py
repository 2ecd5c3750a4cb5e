"""Rewards for a judge that writes its answer: how well the answer ranks the candidates of an LR image.

Pure functions of ratings and choices; what reads them from text is `reward_model.answers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

VARIANCE_FLOOR = 1e-6
"""Added to the variances of two candidates, so that two that always got the same rating compare as equal."""


def thurstone_probability(rating: float, others: Sequence[float], own: Sequence[float]) -> float:
    """Returns how likely a candidate with this rating is better than another one (Thurstone 1927, case III).

    `Phi((q - mean(others)) / sqrt(var(own) + var(others) + floor))`, as VisualQuality-R1 (arXiv 2505.14460) compares
    one sampled rating of an image with the mean of another image's samples.

    Args:
        rating: The sampled rating `q`.
        others: All readable ratings of the other candidate; at least one.
        own: All readable ratings of this candidate, `q` among them.
    """
    spread = math.sqrt(_variance(own) + _variance(others) + VARIANCE_FLOOR)
    return 0.5 * (1 + math.erf((rating - _mean(others)) / spread / math.sqrt(2)))


def fidelity(likely: float, truth: float) -> float:
    """Returns `sqrt(p g) + sqrt((1 - p)(1 - g))`, 1 where the two probabilities are equal.

    Args:
        likely: `p`, what the judge thinks.
        truth: `g`: 1 if the first is better, 0.5 for a tie, 0 if the second is better.
    """
    return math.sqrt(likely * truth) + math.sqrt((1 - likely) * (1 - truth))


def pointwise_rewards(
    ratings: Sequence[Sequence[float]], truths: Mapping[tuple[int, int], float]
) -> list[list[float | None]]:
    """Returns the ranking reward of every sampled rating of the candidates of one LR image.

    The mean fidelity of its comparisons with all labelled mates. A rating that could not be read (NaN) gets 0, the
    least that a comparison can give, and takes no part in the comparisons of its mates.

    Args:
        ratings: One list of sampled ratings per candidate.
        truths: `(i, j)` -> 1 if candidate i is better, 0.5 for a tie, 0 if j is better; each pair once, in any order.

    Returns:
        As `ratings`; None where a candidate has no labelled mate with a readable rating, so that nothing is known.
    """
    readable = [[rating for rating in samples if not math.isnan(rating)] for samples in ratings]
    known = {**truths, **{(second, first): 1 - truth for (first, second), truth in truths.items()}}
    rewards: list[list[float | None]] = []
    for index, samples in enumerate(ratings):
        mates = {other: truth for (first, other), truth in known.items() if first == index and readable[other]}
        rewards.append([_pointwise(rating, readable[index], readable, mates) for rating in samples])
    return rewards


def _pointwise(
    rating: float, own: Sequence[float], readable: Sequence[Sequence[float]], mates: Mapping[int, float]
) -> float | None:
    if math.isnan(rating):
        return 0.0
    if not mates:
        return None
    likely = {other: thurstone_probability(rating, readable[other], own) for other in mates}
    return _mean([fidelity(likely[other], truth) for other, truth in mates.items()])


def swap_agreement(choice: int | None, swapped: Sequence[int | None]) -> float:
    """Returns how many answers to the swapped question name the same candidate.

    Args:
        choice: Candidate that an answer named; None if it could not be read.
        swapped: Candidates that the answers named to the same question with the candidates in the other order.

    Returns:
        A share from 0 to 1; 0 for an unreadable answer and if no answer to the swapped question could be read.
    """
    named = [other for other in swapped if other is not None]
    if choice is None or not named:
        return 0.0
    return sum(other == choice for other in named) / len(named)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    """Unbiased; 0 for one value."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)
