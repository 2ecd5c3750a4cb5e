"""Advantages and the clipped policy-gradient loss: DDPO with running statistics, GRPO with group-relative ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import ConfigError
from refreward_trl.types import LossOutput

MAX_LOG_RATIO = 20.0
"""Beyond it exp() would overflow; a policy that far off has long been clipped or is broken."""


def group_advantages(
    rewards: Float[Tensor, "g k"], *, scale: Literal["group", "batch", "none"] = "group", eps: float = 1e-4
) -> tuple[Float[Tensor, "g k"], dict[str, Tensor]]:
    """Returns how much better each candidate is than the mean of its group.

    Missing rewards (NaN) are left out of mean and standard deviation and get advantage 0; a flat group gets exactly 0.
    With several processes pass the gathered rewards, so that scale "batch" and the metrics are those of the whole
    batch.

    Args:
        rewards: `(groups, candidates)`; NaN where not scored.
        scale: Divide by the standard deviation of the "group", of all rewards of the "batch", or by "none" (as TRL's
            `scale_rewards`).
        eps: Added to the standard deviation.

    Returns:
        Advantages in the shape of `rewards`, float32, no graph; metrics `reward` (mean), `reward_std` (mean standard
        deviation within groups) and `frac_reward_zero_std` (share of groups without a signal).

    Raises:
        ConfigError: For an unknown scale.
    """
    rewards = rewards.detach().float()
    scored = rewards.isfinite()
    count = scored.sum(1, keepdim=True)
    mean = _masked(rewards, scored).sum(1, keepdim=True) / count.clamp(min=1)
    centred = _masked(rewards - mean, scored)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    # By comparison, not by the standard deviation: the mean of equal numbers need not be that number in floating
    # point.
    flat = rewards.masked_fill(~scored, -torch.inf).amax(1) <= rewards.masked_fill(~scored, torch.inf).amin(1)
    centred = centred.masked_fill(flat[:, None], 0.0)
    metrics = {
        "reward": rewards[scored].mean(),
        "reward_std": std.masked_fill(flat[:, None], 0.0).mean(),
        "frac_reward_zero_std": flat.float().mean(),
    }
    return centred / _divisor(scale, std, rewards[scored], eps), metrics


class RunningAdvantage:
    """Advantages against the last rewards of the whole dataset, as in DDPO; for groups of one, or rewards without
    groups.

    Args:
        window: How many past rewards count. Bounded, because rewards of a policy long gone would bias the baseline.
        eps: Added to the standard deviation.
    """

    def __init__(self, window: int = 1024, eps: float = 1e-4) -> None:
        if window < 2:
            raise ConfigError(f"window is {window}", where="window", fix="use at least 2 rewards")
        self.eps = eps
        self._rewards: deque[float] = deque(maxlen=window)

    def __call__(self, rewards: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], dict[str, Tensor]]:
        """Takes up `rewards` (NaN where not scored) and returns their advantages and the metrics `reward` and
        `reward_std`.

        With several processes pass the gathered rewards, so that all hold the same statistics.
        """
        rewards = rewards.detach().float()
        scored = rewards.isfinite()
        self._rewards.extend(rewards[scored].flatten().tolist())
        seen = torch.tensor(self._rewards, dtype=torch.float32, device=rewards.device)
        std = seen.std() if len(seen) > 1 else torch.zeros((), device=rewards.device)
        mean = seen.mean() if len(seen) else torch.zeros((), device=rewards.device)
        advantages = _masked(rewards - mean, scored) / (std + self.eps)
        return advantages, {"reward": rewards[scored].mean(), "reward_std": std}

    def state_dict(self) -> dict[str, Any]:
        """Returns the rewards in the window; plain numbers, so that any checkpoint format can hold them."""
        return {"rewards": list(self._rewards)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._rewards.clear()
        self._rewards.extend(state["rewards"])


def clipped_policy_loss(
    log_prob: Float[Tensor, " b"],
    old_log_prob: Float[Tensor, " b"],
    advantages: Float[Tensor, " b"],
    clip_range: float,
    weights: Float[Tensor, " b"] | None = None,
) -> LossOutput:
    """Returns PPO's clipped loss, `-mean(w min(r A, clip(r, 1 - c, 1 + c) A))` with `r = exp(log_prob -
    old_log_prob)`.

    A NaN advantage counts as weight 0. A NaN log-probability is a broken policy and stays NaN, so that the step is
    stopped.

    Args:
        log_prob: Under the current policy, with its graph.
        old_log_prob: Under the policy that sampled; the same reduction.
        advantages: One per sample.
        clip_range: `c`. What it means depends on the reduction of the log-probabilities, see `default_clip_range`.
        weights: One per sample; the sum is divided by the number of samples, not by the sum of weights.

    Returns:
        The loss with metrics `policy/ratio`, `policy/clip_fraction` (samples whose gradient the clip stopped) and
        `policy/approx_kl` (mean of `r - 1 - log r`).
    """
    log_ratio = (log_prob.float() - old_log_prob.detach().float()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    advantages = advantages.detach().float()
    scored = advantages.isfinite()
    advantages = _masked(advantages, scored)
    weights = scored.float() if weights is None else _masked(weights.detach().float(), scored)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    stopped = ((ratio - 1) * advantages.sign() > clip_range).float()
    return LossOutput(
        loss=-(weights * objective).mean(),
        metrics={
            "policy/ratio": ratio.detach().mean(),
            "policy/clip_fraction": stopped.mean(),
            "policy/approx_kl": (ratio - 1 - log_ratio).detach().mean(),
        },
    )


def default_clip_range(reduction: str) -> float:
    """Returns the clip range that belongs to a reduction of the log-probability.

    "sum": 0.2, as for language models: the ratio is the true likelihood ratio, usable while the policy has few
    coordinates. "mean": 5e-4: the ratio is the D-th root of the true one for D coordinates, so a range of 0.2 would
    never clip; useful values lie between 1e-4 and 1e-3, and 0.2 over the 512 coordinates of a smooth policy on a 128
    px image is 4e-4.

    Raises:
        ConfigError: For an unknown reduction.
    """
    defaults = {"mean": 5e-4, "sum": 0.2}
    if reduction not in defaults:
        raise ConfigError(
            f"unknown reduction {reduction!r}", where="log_prob_reduction", fix=f"use one of {', '.join(defaults)}"
        )
    return defaults[reduction]


def _divisor(scale: str, group_std: Tensor, scored_rewards: Tensor, eps: float) -> Tensor | float:
    if scale == "group":
        return group_std + eps
    if scale == "batch":
        return (scored_rewards.std() if len(scored_rewards) > 1 else scored_rewards.new_zeros(())) + eps
    if scale == "none":
        return 1.0
    raise ConfigError(f"unknown scale {scale!r}", where="scale_rewards", fix="use group, batch or none")


def _masked(values: Tensor, keep: Tensor) -> Tensor:
    """Zeros what is not kept; by selection, since NaN times 0 is NaN."""
    return values.masked_fill(~keep, 0.0)
