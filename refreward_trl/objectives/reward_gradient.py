"""The ReFL objective: climb the reward's own gradient."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from refreward_trl.types import LossOutput


def reward_loss(rewards: Float[Tensor, " b"], *, cap: float | None = None) -> LossOutput:
    """Returns `-sum(min(reward, cap)) / b`.

    A reward at the cap gives no more gradient, which takes away the incentive to push an image that is already good
    into whatever the judge overrates. Missing rewards (NaN) count 0 and have no gradient.

    Args:
        rewards: With their graph; NaN where not scored.
        cap: Largest reward worth climbing to, None for no limit.

    Returns:
        The loss with metrics `reward` and `reward_std` over the scored samples, and `frac_reward_capped`.
    """
    rewards = rewards.float()
    scored = rewards.isfinite()
    capped = rewards if cap is None else rewards.clamp(max=cap)
    kept = rewards.detach()[scored]
    at_cap = kept.new_zeros(()) if cap is None else (kept >= cap).float().mean()
    return LossOutput(
        loss=-capped.masked_fill(~scored, 0.0).mean(),
        metrics={
            "reward": kept.mean(),
            "reward_std": kept.std() if len(kept) > 1 else kept.new_zeros(()),
            "frac_reward_capped": at_cap,
        },
    )
