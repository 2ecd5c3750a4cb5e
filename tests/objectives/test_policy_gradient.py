from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from refreward_trl.errors import ConfigError
from refreward_trl.objectives.policy_gradient import (
    RunningAdvantage,
    clipped_policy_loss,
    default_clip_range,
    group_advantages,
)

NAN = math.nan


def table(groups: int = 3, candidates: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(groups, candidates, generator=torch.Generator().manual_seed(seed)) * 3 + 10


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_group_sum_to_zero(scale: str) -> None:
    advantages, _ = group_advantages(table(), scale=scale)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(3), atol=1e-4, rtol=0)


def test_group_scale_gives_unit_standard_deviation() -> None:
    advantages, metrics = group_advantages(table())
    torch.testing.assert_close(advantages.std(1), torch.ones(3), rtol=1e-3, atol=0)
    torch.testing.assert_close(metrics["reward"], table().mean())
    torch.testing.assert_close(metrics["reward_std"], table().std(1).mean())
    assert metrics["frac_reward_zero_std"] == 0


def test_scale_names_divide_by_what_they_say() -> None:
    centred = table() - table().mean(1, keepdim=True)
    torch.testing.assert_close(group_advantages(table(), scale="none")[0], centred)
    torch.testing.assert_close(group_advantages(table(), scale="batch", eps=0.0)[0], centred / table().std())
    torch.testing.assert_close(group_advantages(table(), eps=0.5)[0], centred / (table().std(1, keepdim=True) + 0.5))
    with pytest.raises(ConfigError, match="unknown scale"):
        group_advantages(table(), scale="image")


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_missing_rewards_get_no_advantage_and_change_nobody_elses(scale: str) -> None:
    rewards = table()
    rewards[1, 2] = NAN
    advantages, metrics = group_advantages(rewards, scale=scale)
    assert advantages[1, 2] == 0
    assert advantages.isfinite().all()
    present = [0, 1, 3, 4]
    alone, _ = group_advantages(rewards[1:2, present], scale="none")
    expected = alone[0] / (alone[0].std() + 1e-4) if scale == "group" else alone[0]
    ratio = advantages[1, present] / expected
    torch.testing.assert_close(ratio, ratio[:1].expand(4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(metrics["reward"], rewards.nanmean())


def test_flat_groups_and_groups_without_two_rewards_get_exactly_zero() -> None:
    flat = [0.7] * 7
    assert torch.tensor(flat).sum() / 7 != torch.tensor(0.7)  # in float32: rounding must not become an advantage
    rewards = torch.tensor([flat, [NAN] * 6 + [5.0], [NAN] * 7, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    advantages, metrics = group_advantages(rewards, eps=1e-12)
    assert torch.equal(advantages[:3], torch.zeros(3, 7))
    assert advantages[3].abs().max() > 0.9
    assert metrics["frac_reward_zero_std"] == 0.75


def test_a_batch_without_any_reward_gives_zeros() -> None:
    for scale in ("group", "batch", "none"):
        advantages, metrics = group_advantages(torch.full((2, 3), NAN), scale=scale)
        assert torch.equal(advantages, torch.zeros(2, 3))
        assert metrics["reward"].isnan()


def test_advantages_follow_a_permutation_of_candidates_and_groups() -> None:
    advantages, _ = group_advantages(table())
    order, groups = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 1])
    torch.testing.assert_close(group_advantages(table()[groups][:, order])[0], advantages[groups][:, order])


def test_advantages_ignore_a_shift_of_a_group() -> None:
    shift = torch.tensor([[5.0], [0.0], [-2.0]])
    torch.testing.assert_close(
        group_advantages(table() + shift)[0], group_advantages(table())[0], rtol=1e-4, atol=1e-4
    )


def test_running_advantage_uses_the_whole_window_and_resumes() -> None:
    running = RunningAdvantage(window=6)
    running(table(2, 2))
    advantages, metrics = running(table(2, 2, seed=1))
    seen = torch.cat([table(2, 2).flatten(), table(2, 2, seed=1).flatten()])[-6:]
    torch.testing.assert_close(advantages, (table(2, 2, seed=1) - seen.mean()) / (seen.std() + 1e-4))
    torch.testing.assert_close(metrics["reward_std"], seen.std())

    resumed = RunningAdvantage(window=6)
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    assert torch.equal(resumed(table(2, 2, seed=2))[0], running(table(2, 2, seed=2))[0])


def test_running_advantage_skips_missing_rewards() -> None:
    running = RunningAdvantage()
    advantages, _ = running(torch.tensor([1.0, NAN, 3.0]))
    assert advantages[1] == 0
    assert running.state_dict() == {"rewards": [1.0, 3.0]}
    assert torch.equal(RunningAdvantage()(torch.tensor([NAN]))[0], torch.zeros(1))
    assert torch.equal(RunningAdvantage()(torch.tensor([2.0]))[0], torch.zeros(1))
    with pytest.raises(ConfigError, match="window"):
        RunningAdvantage(window=1)


def test_first_update_has_ratio_one_and_the_plain_policy_gradient() -> None:
    log_prob = torch.tensor([-3.0, -1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    output = clipped_policy_loss(log_prob, log_prob.detach(), advantages, 1e-4)
    output.loss.backward()
    assert output.metrics["policy/ratio"] == 1
    assert output.metrics["policy/clip_fraction"] == 0
    assert output.metrics["policy/approx_kl"] == 0
    torch.testing.assert_close(log_prob.grad, -advantages / 3)


@pytest.mark.parametrize(
    ("shift", "advantage", "moves"),
    [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False), (0.1, 1.0, True)],
)
def test_the_clip_stops_only_what_goes_further_the_rewarded_way(shift: float, advantage: float, moves: bool) -> None:
    log_prob = torch.tensor([shift], requires_grad=True)
    output = clipped_policy_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    output.loss.backward()
    assert bool(log_prob.grad != 0) is moves
    assert output.metrics["policy/clip_fraction"] == (0 if moves else 1)
    if moves:
        torch.testing.assert_close(log_prob.grad, torch.tensor([-advantage * math.exp(shift)]))


def test_old_log_probs_get_no_gradient() -> None:
    log_prob, old = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    clipped_policy_loss(log_prob, old, torch.ones(2), 0.2).loss.backward()
    assert old.grad is None


def test_missing_advantages_and_zero_weights_count_for_nothing() -> None:
    log_prob = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    advantages = torch.tensor([1.0, NAN, 1.0])
    output = clipped_policy_loss(log_prob, torch.zeros(3), advantages, 1.0, torch.tensor([1.0, NAN, 0.0]))
    output.loss.backward()
    assert output.loss.isfinite()
    assert log_prob.grad[1] == log_prob.grad[2] == 0
    torch.testing.assert_close(output.loss, -torch.tensor(0.1).exp() / 3)


def test_a_broken_log_prob_is_not_hidden() -> None:
    assert clipped_policy_loss(torch.tensor([NAN, 0.0]), torch.zeros(2), torch.ones(2), 0.2).loss.isnan()


def test_a_huge_log_ratio_stays_finite_and_has_a_finite_gradient() -> None:
    log_prob = torch.tensor([500.0, -500.0, 500.0, -500.0], requires_grad=True)
    output = clipped_policy_loss(log_prob, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2)
    output.loss.backward()
    assert output.loss.isfinite()
    assert log_prob.grad.isfinite().all()


def test_micro_batches_average_to_the_loss_of_the_batch() -> None:
    log_prob, advantages = torch.linspace(-1, 1, 8), table(1, 8)[0]
    advantages[2] = NAN
    weights = torch.arange(8.0)
    whole = clipped_policy_loss(log_prob, torch.zeros(8), advantages, 0.2, weights).loss
    parts = [
        clipped_policy_loss(log_prob[i : i + 2], torch.zeros(2), advantages[i : i + 2], 0.2, weights[i : i + 2]).loss
        for i in range(0, 8, 2)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_default_clip_range_is_tied_to_the_reduction() -> None:
    assert default_clip_range("sum") == 0.2
    assert 1e-4 <= default_clip_range("mean") <= 1e-3
    with pytest.raises(ConfigError, match="unknown reduction"):
        default_clip_range("max")
