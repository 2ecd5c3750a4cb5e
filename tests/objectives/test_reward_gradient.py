from __future__ import annotations

import math

import torch

from refreward_trl.objectives.reward_gradient import reward_loss


def test_loss_is_the_negative_mean_and_climbs_every_reward() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    output = reward_loss(rewards)
    output.loss.backward()
    assert output.loss == -3
    torch.testing.assert_close(rewards.grad, torch.full((3,), -1 / 3))
    assert output.metrics["reward"] == 3
    torch.testing.assert_close(output.metrics["reward_std"], rewards.detach().std())
    assert output.metrics["frac_reward_capped"] == 0


def test_a_capped_reward_has_no_gradient() -> None:
    rewards = torch.tensor([1.0, 5.0], requires_grad=True)
    output = reward_loss(rewards, cap=2.0)
    output.loss.backward()
    assert output.loss == -1.5
    assert torch.equal(rewards.grad, torch.tensor([-0.5, 0.0]))
    assert output.metrics["frac_reward_capped"] == 0.5
    assert output.metrics["reward"] == 3


def test_missing_rewards_count_for_nothing_even_below_the_cap() -> None:
    for cap in (None, -1.0):
        rewards = torch.tensor([-4.0, math.nan, -2.0], requires_grad=True)
        output = reward_loss(rewards, cap=cap)
        output.loss.backward()
        assert output.loss == 2
        assert rewards.grad[1] == 0
        assert output.metrics["reward"] == -3


def test_a_batch_without_rewards_has_loss_zero_with_a_graph() -> None:
    rewards = torch.full((2,), math.nan, requires_grad=True)
    output = reward_loss(rewards)
    output.loss.backward()
    assert output.loss == 0
    assert torch.equal(rewards.grad, torch.zeros(2))


def test_computes_in_float32() -> None:
    assert reward_loss(torch.ones(2, dtype=torch.bfloat16)).loss.dtype == torch.float32
