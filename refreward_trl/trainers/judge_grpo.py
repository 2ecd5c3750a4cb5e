"""Training a judge that reasons by TRL's GRPO on ranking rewards: the way of RefReward-SR and VisualQuality-R1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import GRPOConfig, GRPOTrainer

from refreward_trl.errors import ConfigError
from refreward_trl.trainers.judge_adapter import train_weights
from refreward_trl.trainers.reasoning_judge import (
    ReasoningArguments,
    make_rows,
    open_reasoning_judge,
    save_judge,
    style_rewards,
)

if TYPE_CHECKING:
    from refreward_trl.reward_model.spec import JudgeSpec
    from refreward_trl.trainers.reasoning_rows import ReasoningRows


@dataclass
class JudgeGRPOConfig(ReasoningArguments, GRPOConfig):
    """Configuration of a judge's GRPO, on top of TRL's.

    Defaults that differ from TRL's: rows are not shuffled, because those of one group must stay together
    (`ReasoningRows` gives the groups in any order); every column is kept; fp32 unless asked otherwise, and no
    recomputation; a small pull to the judge at the start.
    """

    beta: float = field(default=0.001, metadata={"help": "weight of the KL divergence to the judge at the start"})
    shuffle_dataset: bool | None = field(
        default=False, metadata={"help": "keep false: the rows of a group must stay together"}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "keep false: the rewards read the columns"}
    )
    bf16: bool | None = field(default=False, metadata={"help": "compute in bfloat16"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute activations in the backward pass, for less memory"}
    )
    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "trackers: none, tensorboard, wandb, trackio, ..."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        if self.shuffle_dataset:
            raise ConfigError("it would tear groups apart", where="shuffle_dataset", fix="leave it false")
        self._check_batch()

    def _check_batch(self) -> None:
        """A process must get whole groups: TRL hands it rows in their order, each `num_generations` times."""
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        answers = self.per_device_train_batch_size * steps
        whole = self.block * (self.num_generations or 1)
        if answers % whole:
            raise ConfigError(
                f"a process writes {answers} answers (per_device_train_batch_size x steps_per_generation): no whole "
                f"groups of {self.block} questions with {self.num_generations} answers each",
                where="per_device_train_batch_size",
                fix=f"make the product a multiple of {whole}",
            )


class JudgeGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` for a judge: opens it, asks it, and saves it as a judge folder.

    Args:
        args: The configuration; `args.judge` names the judge.
        rows: Makes the training rows for a spec, for example `ReasoningRows`.
        callbacks: As in TRL.

    Raises:
        CheckpointError: The judge cannot be opened, or is asked with clips.
        ConfigError: The rows do not fit the judge.
    """

    def __init__(
        self,
        args: JudgeGRPOConfig,
        rows: Callable[[JudgeSpec], ReasoningRows],
        *,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        self.opened = open_reasoning_judge(args, seed=args.seed, may_be_new=False)
        train_weights(self.opened.network, freeze_vision=args.freeze_vision)
        rewards: Any
        rewards, args.reward_weights = style_rewards(args, self.opened.spec)
        super().__init__(
            model=self.opened.network,
            reward_funcs=rewards,
            args=args,
            train_dataset=make_rows(rows, self.opened).as_dataset(),
            processing_class=self.opened.processor,
            peft_config=args.adapter(),
            callbacks=list(callbacks or ()),
        )

    def save_judge(self, folder: str | Path) -> None:
        """Writes a judge folder, on all ranks."""
        save_judge(self, self.opened, folder)
