"""ReFL: climb the reward's own gradient through the decoder into the one-step generator."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from refreward_trl.errors import ConfigError, RewardError
from refreward_trl.generators import straight_through_clamp
from refreward_trl.objectives.reward_gradient import reward_loss
from refreward_trl.rewards.composite import RewardTable
from refreward_trl.trainers.base import AlignmentTrainer
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.types import LossOutput


class SRReFLTrainer(AlignmentTrainer):
    """Aligns a generator by reward gradients (ReFL, DRaFT-1): exact at one step, no sampling, no truncation.

    `loss = reward_weight * -mean(min(reward, cap)) + anchor_weight * anchor`. Rewards with a weight must return a
    tensor with a graph. The constructor is that of `AlignmentTrainer`.
    """

    config_class = SRReFLConfig
    args: SRReFLConfig

    def rollout(self, batch: dict[str, Any]) -> dict[str, Any]:
        cond = self.condition(batch)
        batch["encoded"] = self.generator.encode(cond)
        self.add_reference(batch, batch["encoded"], cond)
        return batch

    def objective(self, model: nn.Module, batch: dict[str, Any]) -> LossOutput:
        cond = self.condition(batch)
        mean = self.generator.predict(batch["encoded"], cond, model=model)
        image = self.generator.decode(mean, cond, checkpoint=self.args.checkpoint_decode)
        image = straight_through_clamp(self.generator.postprocess(image, cond))
        with nullcontext() if self.args.reward_weight else torch.no_grad():
            table = self.score(image, batch)
        if self.args.reward_weight:
            self._check_differentiable(table)
        reward = reward_loss(table.total, cap=self.args.reward_cap)
        # The last term keeps the graph of a batch whose rewards were all dropped: every rank runs a backward pass.
        loss = self.args.reward_weight * reward.loss + self.anchor(image, batch) + 0.0 * image.sum()
        return LossOutput(loss, {**reward.metrics, **table.metrics()})

    def _check_ready(self) -> None:
        super()._check_ready()
        if not self.reward_funcs:
            raise ConfigError("there is no reward to climb", where="reward_funcs", fix="name at least one reward")

    def _expects_gradient(self) -> bool:
        # The control run starts at its own anchor, where the gradient is rightly zero.
        return self.args.reward_weight > 0

    def _check_differentiable(self, table: RewardTable) -> None:
        for name, weight in zip(self.reward_names, self.reward_weights, strict=True):
            if weight and not table.failed[name] and not table.per_reward[name].requires_grad:
                raise RewardError(
                    "is not differentiable: it returned numbers without a graph to the image",
                    where=f"reward {name!r}",
                    fix="return a tensor computed from `completions` without detach, item or PIL; or give it weight 0;"
                    " or use ddpo, which needs no gradient",
                )
