import math
import random

import pytest

from refreward_trl.objectives.ranking_rewards import (
    fidelity,
    pointwise_rewards,
    swap_agreement,
    thurstone_probability,
)

NAN = math.nan


def test_thurstone_is_the_normal_probability_of_the_difference() -> None:
    own, others = [3.0, 5.0], [2.0, 2.0, 2.0]  # variances 2 and 0
    expected = 0.5 * (1 + math.erf((4.0 - 2.0) / math.sqrt(2.0) / math.sqrt(2)))
    assert thurstone_probability(4.0, others, own) == pytest.approx(expected, abs=1e-5)
    assert thurstone_probability(3.0, [3.0], [3.0]) == 0.5


def test_thurstone_is_antisymmetric_for_equal_spreads() -> None:
    draws = random.Random(0)
    for _ in range(50):
        a, b = draws.uniform(1, 5), draws.uniform(1, 5)
        assert thurstone_probability(a, [b], [a]) + thurstone_probability(b, [a], [b]) == pytest.approx(1)


def test_fidelity_is_largest_where_the_probabilities_are_equal() -> None:
    for truth in (0.0, 0.5, 1.0):
        assert fidelity(truth, truth) == pytest.approx(1)
        assert all(fidelity(likely / 20, truth) <= 1 + 1e-12 for likely in range(21))
    assert fidelity(0.0, 1.0) == 0.0
    assert fidelity(0.5, 1.0) == pytest.approx(math.sqrt(0.5))


def test_a_perfect_ranking_earns_one_and_its_reverse_nothing() -> None:
    truths = {(0, 1): 1.0, (0, 2): 1.0, (1, 2): 1.0}
    perfect = pointwise_rewards([[5.0, 5.0], [3.0, 3.0], [1.0, 1.0]], truths)
    reverse = pointwise_rewards([[1.0, 1.0], [3.0, 3.0], [5.0, 5.0]], truths)
    assert all(reward == pytest.approx(1) for rewards in perfect for reward in rewards)
    assert all(reward == pytest.approx(0, abs=1e-6) for rewards in reverse for reward in rewards)


def test_within_a_candidate_the_better_placed_rating_earns_more() -> None:
    (better, _) = pointwise_rewards([[2.0, 4.0], [3.0, 3.0]], {(0, 1): 1.0})
    assert better[1] > better[0]  # type: ignore[operator]


def test_the_order_in_which_a_pair_is_written_does_not_matter() -> None:
    ratings = [[4.0, 2.0], [3.0, 5.0], [1.0, 1.0]]
    one = pointwise_rewards(ratings, {(0, 1): 1.0, (2, 1): 0.0, (0, 2): 0.5})
    other = pointwise_rewards(ratings, {(1, 0): 0.0, (1, 2): 1.0, (2, 0): 0.5})
    assert one == other


def test_relabelling_the_candidates_relabels_the_rewards() -> None:
    ratings = [[4.0, 2.0], [3.0, 5.0], [1.0, NAN]]
    straight = pointwise_rewards(ratings, {(0, 1): 1.0, (1, 2): 0.5})
    turned = pointwise_rewards(ratings[::-1], {(2, 1): 1.0, (1, 0): 0.5})
    assert straight == turned[::-1]


def test_an_unreadable_rating_earns_nothing_and_disturbs_no_mate() -> None:
    truths = {(0, 1): 1.0}
    with_one = pointwise_rewards([[4.0, 4.0, NAN], [2.0, 2.0, 2.0]], truths)
    without = pointwise_rewards([[4.0, 4.0], [2.0, 2.0, 2.0]], truths)
    assert with_one[0][2] == 0.0
    assert with_one[0][:2] == without[0]
    assert with_one[1] == without[1]


def test_nothing_is_known_about_a_candidate_without_readable_labelled_mates() -> None:
    assert pointwise_rewards([[4.0], [2.0], [3.0]], {(0, 1): 1.0})[2] == [None]
    assert pointwise_rewards([[4.0], [NAN]], {(0, 1): 1.0}) == [[None], [0.0]]


@pytest.mark.parametrize("count", range(2, 9))
def test_groups_of_two_to_eight(count: int) -> None:
    truths = {(i, j): 1.0 for i in range(count) for j in range(i + 1, count)}
    rewards = pointwise_rewards([[float(count - i)] * 2 for i in range(count)], truths)
    assert all(reward == pytest.approx(1) for each in rewards for reward in each)


def test_swap_agreement_is_the_share_that_names_the_same_candidate() -> None:
    assert swap_agreement(1, [1, 1, 0, None]) == pytest.approx(2 / 3)
    assert swap_agreement(None, [1, 1]) == 0.0
    assert swap_agreement(1, [None, None]) == 0.0
