"""A start for a judge that is to reason: it learns the form of an answer from constructed ones, by TRL's SFT.

GRPO can only reward what a judge already writes now and then. The answers here are built from the labels and a stock
thought; nobody thought them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import SFTConfig, SFTTrainer

from refreward_trl.trainers.judge_adapter import train_weights
from refreward_trl.trainers.reasoning_judge import ReasoningArguments, make_rows, open_reasoning_judge, save_judge
from refreward_trl.trainers.reasoning_rows import rationale

if TYPE_CHECKING:
    from refreward_trl.reward_model.spec import JudgeSpec
    from refreward_trl.trainers.reasoning_rows import ReasoningRows


@dataclass
class JudgeSFTConfig(ReasoningArguments, SFTConfig):
    """Configuration of a judge's cold start, on top of TRL's.

    Defaults that differ from TRL's: every column is kept and nothing is cut, because both would lose the images; fp32
    unless asked otherwise, and no recomputation.
    """

    max_length: int | None = field(default=None, metadata={"help": "keep null: a cut prompt loses its images"})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "keep false: the images are a column"})
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
        # The rows are made when they are asked for: there is nothing to prepare.
        given: Any = self.dataset_kwargs or {}
        self.dataset_kwargs = {**given, "skip_prepare_dataset": True}


class JudgeSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer` for a judge that learns constructed answers; see `JudgeGRPOTrainer` for the arguments."""

    def __init__(
        self,
        args: JudgeSFTConfig,
        rows: Callable[[JudgeSpec], ReasoningRows],
        *,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        self.opened = open_reasoning_judge(args, seed=args.seed, may_be_new=True)
        train_weights(self.opened.network, freeze_vision=args.freeze_vision)
        questions = make_rows(rows, self.opened)
        spec = self.opened.spec
        super().__init__(
            model=self.opened.network,
            args=args,
            train_dataset=questions.as_dataset(
                answer=lambda row: [{"role": "assistant", "content": rationale(row, spec)}]
            ),
            processing_class=self.opened.processor,
            peft_config=args.adapter(),
            callbacks=list(callbacks or ()),
        )

    def save_judge(self, folder: str | Path) -> None:
        """Writes a judge folder, on all ranks."""
        save_judge(self, self.opened, folder)
