"""The settings that every trainer of the package shares, on top of `transformers.TrainingArguments`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from refreward_trl.errors import ConfigError
from refreward_trl.trainers.sharding import keep_new_networks_whole


@dataclass
class RunConfig(TrainingArguments):
    """Configuration of `ResumableTrainer`.

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
    resume: str = field(
        default="auto",
        metadata={
            "help": "'auto' goes on from the newest intact checkpoint in output_dir, 'never', or a checkpoint's folder"
        },
    )

    rank_check_steps: int = field(
        default=50, metadata={"help": "compare the weights of all ranks every so many updates; 0 never compares"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.remove_unused_columns:
            raise ConfigError(
                "remove_unused_columns is true, which would drop the images and the sample ids",
                where="remove_unused_columns",
                fix="leave it false",
            )
        check_range("rank_check_steps", self.rank_check_steps, low=0)
        if self.save_total_limit is not None:
            # One checkpoint is none: the only one may be the one that a crash has just cut short.
            self.save_total_limit = max(2, self.save_total_limit)
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self._set_timeout()
        # Rewards and judges may be built between the configuration and the trainer.
        keep_new_networks_whole()

    def _set_timeout(self) -> None:
        """Sets `ddp_timeout`, which transformers forgets on CPUs: a rank that stands still held the others for 30
        minutes."""
        distributed = torch.distributed.is_available() and self.device.type == "cpu"
        if distributed and torch.distributed.is_initialized():
            torch.distributed.distributed_c10d._set_pg_timeout(self.ddp_timeout_delta)


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
