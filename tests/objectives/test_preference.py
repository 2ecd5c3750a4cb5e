from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.objectives.preference import (
    centering_penalty,
    fidelity_loss,
    listwise_loss,
    pairs_from_ranks,
    pairwise_loss,
)

RANKS = torch.tensor([[0, 1, 2, 3], [2, 0, 2, 1], [-1, 5, 3, 4]])


def scores(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


def test_pairs_leave_out_ties_and_ignored_candidates() -> None:
    pairs = pairs_from_ranks(RANKS)
    assert pairs[:6].tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert sorted(map(tuple, pairs[6:11].tolist())) == [(5, 4), (5, 6), (5, 7), (7, 4), (7, 6)]
    assert sorted(map(tuple, pairs[11:].tolist())) == [(10, 9), (10, 11), (11, 9)]


def test_pairwise_loss_is_logistic_in_the_margin_and_groups_count_the_same() -> None:
    values = scores()
    flat = values.flatten()
    per_pair = [-F.logsigmoid((flat[b] - flat[w]) / 0.5) for b, w in pairs_from_ranks(RANKS).tolist()]
    expected = sum(torch.stack(group).mean() for group in (per_pair[:6], per_pair[6:11], per_pair[11:])) / 3
    torch.testing.assert_close(pairwise_loss(values, pairs_from_ranks(RANKS), temperature=0.5).loss, expected)


def test_listwise_loss_is_the_plackett_luce_likelihood() -> None:
    values = scores()[:1]
    order = torch.tensor([[2, 0, 3, 1]])
    sequence = values[0, order[0].argsort()]
    likelihood = torch.stack([sequence[i:].softmax(0)[0] for i in range(3)]).prod()
    torch.testing.assert_close(listwise_loss(values, order).loss, -likelihood.log() / 3)


def test_plackett_luce_likelihoods_of_all_orders_sum_to_one() -> None:
    values = scores()[:1, :3]
    orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    total = sum((-2 * listwise_loss(values, torch.tensor([order])).loss).exp() for order in orders)
    torch.testing.assert_close(total, torch.tensor(1.0))


def test_with_two_candidates_both_losses_agree() -> None:
    values, ranks = scores()[:, :2], torch.tensor([[0, 1], [1, 0], [4, 4]])
    listwise = listwise_loss(values, ranks, temperature=0.7)
    pairwise = pairwise_loss(values, pairs_from_ranks(ranks), temperature=0.7)
    torch.testing.assert_close(listwise.loss, pairwise.loss)
    assert listwise.metrics == pairwise.metrics


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
class TestBothLosses:
    def loss(self, kind: str, values: Tensor, ranks: Tensor = RANKS, **options: object):
        if kind == "pairwise":
            return pairwise_loss(values, pairs_from_ranks(ranks), **options)
        return listwise_loss(values, ranks, **options)

    def test_descending_it_puts_scores_in_order(self, kind: str) -> None:
        values = scores().requires_grad_()
        for _ in range(200):
            (gradient,) = torch.autograd.grad(self.loss(kind, values).loss, values)
            values = (values - gradient).detach().requires_grad_()
        output = self.loss(kind, values)
        assert output.metrics["accuracy"] == 1
        assert output.metrics["margin"] > 1

    def test_gradient_of_a_group_sums_to_zero(self, kind: str) -> None:
        values = scores().requires_grad_()
        self.loss(kind, values).loss.backward()
        torch.testing.assert_close(values.grad.sum(1), torch.zeros(3), atol=1e-6, rtol=0)

    def test_follows_a_permutation_of_the_candidates(self, kind: str) -> None:
        order = torch.tensor([2, 3, 0, 1])
        torch.testing.assert_close(
            self.loss(kind, scores()[:, order], RANKS[:, order]).loss, self.loss(kind, scores()).loss
        )

    def test_ignored_and_unscored_candidates_count_for_nothing(self, kind: str) -> None:
        values = scores()
        values[2, 0] = math.nan
        values.requires_grad_()
        output = self.loss(kind, values)
        output.loss.backward()
        torch.testing.assert_close(output.loss, self.loss(kind, scores()).loss)
        assert values.grad.isfinite().all()
        assert values.grad[2, 0] == 0
        missing = scores()
        missing[0, 3] = math.nan
        ranks = RANKS.clone()
        ranks[0, 3] = -1
        torch.testing.assert_close(self.loss(kind, missing).loss, self.loss(kind, scores(), ranks).loss)

    def test_a_group_of_ties_has_loss_zero_and_stays_in_the_count(self, kind: str) -> None:
        ranks = torch.cat([RANKS, torch.zeros_like(RANKS[:1])])
        values = torch.cat([scores(), scores(1)[:1]]).requires_grad_()
        output = self.loss(kind, values, ranks)
        output.loss.backward()
        torch.testing.assert_close(output.loss, self.loss(kind, scores()).loss * 3 / 4)
        assert torch.equal(values.grad[3], torch.zeros(4))

    def test_temperature_is_learnable(self, kind: str) -> None:
        temperature = torch.tensor(2.0, requires_grad=True)
        output = self.loss(kind, scores(), temperature=temperature)
        output.loss.backward()
        assert temperature.grad.abs() > 0
        torch.testing.assert_close(output.loss, self.loss(kind, scores() / 2).loss)

    def test_metrics_read_the_scores(self, kind: str) -> None:
        values = torch.tensor([[3.0, 1.0, 1.0]])
        output = self.loss(kind, values, torch.tensor([[1, 0, 2]]))
        assert output.metrics["accuracy"] == 0.5
        torch.testing.assert_close(output.metrics["margin"], torch.tensor(0.0))
        torch.testing.assert_close(output.metrics["mean_reward"], torch.tensor(5 / 3))


def test_weights_scale_their_pairs() -> None:
    pairs = torch.tensor([[0, 1], [0, 2]])
    single = pairwise_loss(scores(), pairs[:1]).loss
    weighted = pairwise_loss(scores(), pairs, weights=torch.tensor([1.0, 0.0])).loss
    torch.testing.assert_close(weighted, single / 2)


def test_pairs_across_groups_are_refused() -> None:
    with pytest.raises(DataError, match="two LR images"):
        pairwise_loss(scores(), torch.tensor([[0, 4]]))


def test_no_pair_at_all_gives_zero() -> None:
    values = scores().requires_grad_()
    output = pairwise_loss(values, torch.zeros(0, 2, dtype=torch.long))
    output.loss.backward()
    assert output.loss == 0
    assert output.metrics["accuracy"].isnan()


def test_centering_penalty_is_the_squared_group_mean() -> None:
    values = torch.tensor([[1.0, 3.0], [math.nan, -1.0]], requires_grad=True)
    penalty = centering_penalty(values)
    penalty.backward()
    assert penalty == 2.5
    assert values.grad.isfinite().all()
    assert centering_penalty(torch.tensor([[-2.0, 2.0]])) == 0


def test_a_tie_pulls_two_scores_together() -> None:
    tie, half = torch.tensor([[0, 1]]), torch.tensor([0.5])
    for loss in (pairwise_loss, fidelity_loss):
        apart = torch.tensor([[2.0, -1.0]], requires_grad=True)
        output = loss(apart, tie, targets=half)
        (gradient,) = torch.autograd.grad(output.loss, apart)
        assert gradient[0, 0] > 0 > gradient[0, 1]
        together = loss(torch.zeros(1, 2), tie, targets=half)
        assert together.loss < output.loss
        assert math.isnan(float(together.metrics["accuracy"]))  # a tie is no order


def test_fidelity_loss_is_zero_for_certainty_and_bounded_for_the_opposite() -> None:
    pair = torch.tensor([[0, 1]])
    sure = fidelity_loss(torch.tensor([[50.0, -50.0]]), pair).loss
    wrong = fidelity_loss(torch.tensor([[-50.0, 50.0]]), pair).loss
    assert float(sure) == pytest.approx(0.0, abs=1e-6)
    assert float(wrong) == pytest.approx(1.0, abs=1e-3)
    even = fidelity_loss(torch.tensor([[1.0, 1.0]]), pair).loss
    assert float(even) == pytest.approx(1 - math.sqrt(0.5))
    assert float(fidelity_loss(torch.zeros(1, 2), pair, targets=torch.tensor([0.5])).loss) == pytest.approx(
        0, abs=1e-6
    )


def test_fidelity_loss_is_thurstones_probability() -> None:
    scores, temperature = torch.tensor([[1.3, 0.2]]), 0.7
    likely = 0.5 * (1 + math.erf((1.3 - 0.2) / (math.sqrt(2) * temperature) / math.sqrt(2)))
    loss = fidelity_loss(scores, torch.tensor([[0, 1]]), temperature=temperature).loss
    assert float(loss) == pytest.approx(1 - math.sqrt(likely), abs=1e-6)


def test_a_margin_asks_for_a_lead() -> None:
    scores, pair = torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]])
    asked = pairwise_loss(scores, pair, margins=torch.tensor([1.0])).loss
    torch.testing.assert_close(asked, torch.tensor(math.log(2)))


def test_both_pair_losses_leave_out_candidates_without_a_score() -> None:
    scores = torch.tensor([[1.0, math.nan, 0.0]], requires_grad=True)
    pairs = torch.tensor([[0, 1], [0, 2]])
    for loss in (pairwise_loss, fidelity_loss):
        output = loss(scores, pairs)
        torch.testing.assert_close(output.loss, loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]])).loss)
        (gradient,) = torch.autograd.grad(output.loss, scores)
        assert gradient.isfinite().all()
