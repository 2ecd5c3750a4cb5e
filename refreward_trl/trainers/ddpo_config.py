"""Settings of `SRDDPOTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from refreward_trl.errors import ConfigError
from refreward_trl.generators.policies import NOISE_KINDS
from refreward_trl.objectives.policy_gradient import default_clip_range
from refreward_trl.trainers.alignment_config import AlignmentConfig
from refreward_trl.trainers.run_config import check_choice, check_range


@dataclass
class SRDDPOConfig(AlignmentConfig):
    """Configuration of policy-gradient training with a Gaussian on the predicted latent."""

    num_generations: int = field(default=8, metadata={"help": "candidates per LR image"})
    sigma: float = field(default=0.1, metadata={"help": "standard deviation of the policy in units of the latent's"})
    noise: Literal["residual", "lowfreq", "white"] = field(
        default="residual",
        metadata={"help": "along what the generator adds, which learns fastest; smooth noise; or white noise"},
    )
    noise_cell: int = field(default=8, metadata={"help": "latent pixels per coordinate of residual or lowfreq noise"})
    antithetic: bool = field(default=True, metadata={"help": "draw candidates in pairs of mirrored noise"})
    advantage: Literal["group", "running"] = field(
        default="group",
        metadata={"help": "against the candidates of the same LR image (GRPO), or the latest rewards (DDPO)"},
    )
    scale_rewards: Literal["group", "batch", "none"] = field(
        default="group",
        metadata={"help": "divide group advantages by the deviation of the group, of the rollout, or not"},
    )
    clip_range: float | None = field(
        default=None, metadata={"help": "clip of the likelihood ratio; null: 5e-4 for reduction mean, 0.2 for sum"}
    )
    log_prob_reduction: Literal["mean", "sum"] = field(
        default="sum",
        metadata={"help": "over the coordinates of a latent; the clip range means something only with it"},
    )
    anchor_weight: float = field(
        default=4.0,
        metadata={"help": "weight of the anchor in the loss; the default belongs to log_prob_reduction sum"},
    )
    beta: float = field(default=0.0, metadata={"help": "weight of the KL divergence to the reference"})
    num_iterations: int = field(default=1, metadata={"help": "updates per rollout"})
    advantage_clip: float = field(default=5.0, metadata={"help": "largest absolute advantage"})
    shuffle_advantages: bool = field(
        default=False, metadata={"help": "the control run: advantages shuffled inside each group"}
    )
    reward_batch_size: int = field(
        default=16, metadata={"help": "candidates decoded and rewarded at a time; whole groups, at least one"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma > 0:
            raise ConfigError(
                f"sigma is {self.sigma}: a deterministic policy has no log-probability, hence no policy gradient",
                where="sigma",
                fix="use a small sigma above 0, such as 0.05, or align by reward gradients (refl)",
            )
        check_choice("noise", self.noise, NOISE_KINDS)
        check_choice("advantage", self.advantage, ("group", "running"))
        check_choice("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        check_choice("log_prob_reduction", self.log_prob_reduction, ("mean", "sum"))
        check_range("num_generations", self.num_generations, low=2)
        check_range("beta", self.beta, low=0.0)
        check_range("clip_range", self.clip_range, low=0.0, low_included=False)
        check_range("advantage_clip", self.advantage_clip, low=0.0, low_included=False)
        for key in ("noise_cell", "num_iterations", "reward_batch_size"):
            check_range(key, getattr(self, key), low=1)
        if self.antithetic and self.num_generations % 2:
            raise ConfigError(
                f"antithetic pairs need an even num_generations, not {self.num_generations}",
                where="num_generations",
                fix="use an even number, or set antithetic to false",
            )

    @property
    def effective_clip_range(self) -> float:
        """The clip range, or the default that belongs to the reduction."""
        return default_clip_range(self.log_prob_reduction) if self.clip_range is None else self.clip_range
