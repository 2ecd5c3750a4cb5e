"""The settings that every alignment trainer shares, on top of those of every run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from refreward_trl.trainers.run_config import RunConfig, check_choice, check_range


@dataclass
class AlignmentConfig(RunConfig):
    """Configuration of `AlignmentTrainer`."""

    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "decay of the averaged weights that are evaluated and saved, such as 0.99; null for no average"
        },
    )
    anchor: Literal["reference", "reference_lr", "lr_consistency", "hr", "none"] = field(
        default="reference_lr",
        metadata={
            "help": "what holds the SR image: the frozen policy's image (reference), only its drift at LR resolution "
            "(reference_lr), the LR image, the HR image, or nothing"
        },
    )
    anchor_weight: float = field(default=1.0, metadata={"help": "weight of the anchor in the loss"})
    self_check: bool = field(
        default=True,
        metadata={"help": "check ratio, gradient and rewards on the first batch, before the first update"},
    )
    reward_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = field(
        default="sum_then_normalize", metadata={"help": "order of weighting and normalising several rewards"}
    )
    reward_timeout: float | None = field(
        default=600.0, metadata={"help": "seconds that one call of a reward may take; null for no limit"}
    )
    on_bad_reward: Literal["stop", "drop"] = field(
        default="stop",
        metadata={"help": "when a reward raises, hangs or returns no rewards: stop, or leave its candidates out"},
    )
    max_failed_rewards: int = field(
        default=3, metadata={"help": "failed calls within 50 updates and one rank that drop puts up with"}
    )
    cache_lr_latents: int = field(
        default=0,
        metadata={
            "help": "MiB of CPU memory for latents of LR images, where the same ones come again: whole pairs, not "
            "random crops; 0 encodes them each time"
        },
    )
    log_image_steps: int = field(
        default=0, metadata={"help": "write an image grid every so many updates; 0 for never"}
    )
    num_log_images: int = field(default=4, metadata={"help": "rows of the image grid"})
    hacking_patience: int = field(
        default=0,
        metadata={"help": "stop after so many evaluations in a row that look like reward hacking; 0 never stops"},
    )
    hacking_heldout_margin: float = field(
        default=0.0,
        metadata={"help": "how far a held-out reward may fall below its start before it counts as hacking"},
    )
    hacking_psnr_margin: float = field(
        default=0.5, metadata={"help": "how many dB eval_lr_psnr may fall below its start before it counts as hacking"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("anchor", self.anchor, ("reference", "reference_lr", "lr_consistency", "hr", "none"))
        check_choice("reward_aggregation", self.reward_aggregation, ("sum_then_normalize", "normalize_then_sum"))
        check_range("anchor_weight", self.anchor_weight, low=0.0)
        check_range("ema_decay", self.ema_decay, low=0.0, high=1.0, high_included=False)
        check_choice("on_bad_reward", self.on_bad_reward, ("stop", "drop"))
        check_range("reward_timeout", self.reward_timeout, low=0.0, low_included=False)
        counts = ("max_failed_rewards", "log_image_steps", "num_log_images", "hacking_patience", "cache_lr_latents")
        for key in counts:
            check_range(key, getattr(self, key), low=0)

    @property
    def anchored(self) -> bool:
        """Whether a fidelity anchor is part of the loss."""
        return self.anchor != "none" and self.anchor_weight > 0
