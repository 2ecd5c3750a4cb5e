"""The settings that every alignment trainer shares, on top of `transformers.TrainingArguments`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from refreward_trl.errors import ConfigError


@dataclass
class AlignmentConfig(TrainingArguments):
    """Configuration of `AlignmentTrainer`.

    Defaults that differ from `TrainingArguments`: every dataset column is kept, a line is logged every 10 steps, a
    loss that is not finite is never hidden, and at least two checkpoints are kept.
    """

    remove_unused_columns: bool | None = field(
        default=False,
        metadata={"help": "keep false: images and ids are columns that the network's forward does not name"},
    )
    logging_steps: float = field(default=10, metadata={"help": "log every so many updates"})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "keep false: true would log 0.0 in the place of a loss that is not finite"}
    )
    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "trackers beside metrics.jsonl: none, tensorboard, wandb, trackio, ..."}
    )
    save_total_limit: int | None = field(
        default=None, metadata={"help": "checkpoints to keep, at least 2 and the best one; null keeps all"}
    )
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
    log_image_steps: int = field(
        default=0, metadata={"help": "write an image grid every so many updates; 0 for never"}
    )
    num_log_images: int = field(default=4, metadata={"help": "rows of the image grid"})
    resume: str = field(
        default="auto",
        metadata={
            "help": "'auto' goes on from the newest intact checkpoint in output_dir, 'never', or a checkpoint's folder"
        },
    )
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
        for key in ("log_image_steps", "num_log_images", "hacking_patience"):
            check_range(key, getattr(self, key), low=0)
        if self.remove_unused_columns:
            raise ConfigError(
                "remove_unused_columns is true, which would drop the images and the sample ids",
                where="remove_unused_columns",
                fix="leave it false",
            )
        if self.save_total_limit is not None:
            # One checkpoint is none: the only one may be the one that a crash has just cut short.
            self.save_total_limit = max(2, self.save_total_limit)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()

    @property
    def anchored(self) -> bool:
        """Whether a fidelity anchor is part of the loss."""
        return self.anchor != "none" and self.anchor_weight > 0


def check_choice(key: str, value: Any, choices: Sequence[str]) -> None:
    """Raises `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{key} is {value!r}", where=key, fix=f"use one of {', '.join(choices)}")


def check_range(
    key: str,
    value: float | None,
    *,
    low: float,
    high: float = float("inf"),
    low_included: bool = True,
    high_included: bool = True,
) -> None:
    """Raises `ConfigError` unless `value` is None or lies between `low` and `high`."""
    if value is None:
        return
    above = value >= low if low_included else value > low
    below = value <= high if high_included else value < high
    if not (above and below):
        least = f"{'at least' if low_included else 'above'} {low:g}"
        most = "" if high == float("inf") else f" and {'at most' if high_included else 'below'} {high:g}"
        raise ConfigError(f"{key} is {value}", where=key, fix=f"use a value {least}{most}")
