"""What TRL's trainers share when they train a judge that reasons: opening it, asking it, and saving it as a judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from refreward_trl.errors import ConfigError
from refreward_trl.reward_model.families import judge_family
from refreward_trl.reward_model.judge import MLLMJudge
from refreward_trl.reward_model.loading import find_folder, open_network
from refreward_trl.reward_model.processors import build_processor, load_processor
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.tiny import build_tiny_judge
from refreward_trl.rewards.ranking import AnswerFormat, CorrectChoice, RankingFidelity, SwapConsistency
from refreward_trl.trainers.judge_adapter import LORA_TARGETS, VISION_PARTS, save_adapted
from refreward_trl.trainers.reasoning_rows import ReasoningRows, check_size
from refreward_trl.trainers.run_config import check_choice, check_range
from refreward_trl.trainers.sharding import keep_new_networks_whole

if TYPE_CHECKING:
    from peft import PeftConfig

NEW_REASONING_SPEC = JudgeSpec(
    name="tiny-reasoning",
    layout="images",
    tile=32,
    reason_prompt="think then rate the image against its reference",
    reason_compare_prompt="think then choose A and B",
    max_new_tokens=14,
)
"""How the judge `"new"` is asked."""


@dataclass
class ReasoningArguments:
    """Which judge is trained, and on which questions."""

    judge: str = field(
        default="new", metadata={"help": "folder or hub name of a multimodal LLM; 'new' (tiny, untrained) for rm-sft"}
    )
    judge_spec: str | None = field(
        default=None, metadata={"help": "JSON file with how it is asked; by default its own, or plain words"}
    )
    judge_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "precision of the judge's weights"}
    )
    style: Literal["pointwise", "pairwise"] = field(
        default="pointwise", metadata={"help": "rate one candidate at a time, or choose between two"}
    )
    mates: int = field(default=4, metadata={"help": "pointwise: candidates of an LR image that are asked about"})
    max_groups: int = field(default=3000, metadata={"help": "training groups"})
    eval_groups: int = field(default=32, metadata={"help": "held-out groups that are asked before and after"})
    eval_samples: int = field(default=4, metadata={"help": "answers to each question about a held-out group"})
    use_peft: bool = field(default=False, metadata={"help": "train a LoRA adapter; false trains all weights"})
    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA adapter"})
    lora_alpha: float = field(default=32, metadata={"help": "LoRA scale times rank"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "layers that get a LoRA adapter; all linear layers of the LLM by default"}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "leave the vision tower as it is"})
    format_weight: float = field(default=0.2, metadata={"help": "weight of the reward for the form of the answer"})
    swap_weight: float = field(
        default=0.5, metadata={"help": "pairwise: weight of the reward for the same choice in the other order"}
    )
    resume: str = field(
        default="auto", metadata={"help": "'auto' goes on from the newest checkpoint in output_dir, or 'never'"}
    )

    @property
    def block(self) -> int:
        """Rows of a group."""
        return self.mates if self.style == "pointwise" else 2

    def check(self) -> None:
        """Raises `ConfigError` for values out of range, and readies the process for opening a judge."""
        check_choice("style", self.style, ("pointwise", "pairwise"))
        check_choice("judge_dtype", self.judge_dtype, ("float32", "bfloat16"))
        check_choice("resume", self.resume, ("auto", "never"))
        check_range("mates", self.mates, low=2)
        check_range("format_weight", self.format_weight, low=0.0)
        check_range("swap_weight", self.swap_weight, low=0.0)
        for key in ("max_groups", "eval_groups", "eval_samples", "lora_r"):
            check_range(key, getattr(self, key), low=1)
        # The judge is opened between the configuration and the trainer.
        keep_new_networks_whole()

    def adapter(self) -> PeftConfig | None:
        """Returns the adapter to train, if `use_peft`."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]
            target_modules=list(self.lora_target_modules or LORA_TARGETS),
            exclude_modules=VISION_PARTS if self.freeze_vision else None,
        )


def style_rewards(config: ReasoningArguments, spec: JudgeSpec) -> tuple[list[Callable[..., Any]], list[float]]:
    """Returns the rewards of a style and their weights."""
    if config.style == "pointwise":
        return [RankingFidelity(*spec.rating_range), AnswerFormat()], [1.0, config.format_weight]
    tokens = [token.strip() for token in spec.choice_tokens]
    rewards = [CorrectChoice(tokens), SwapConsistency(tokens), AnswerFormat()]
    return rewards, [1.0, config.swap_weight, config.format_weight]


class OpenedJudge(NamedTuple):
    """A judge that TRL can train: `network` is a `PreTrainedModel`, `processor` a `ProcessorMixin`."""

    network: Any
    tokenizer: Any
    spec: JudgeSpec
    processor: Any


def open_reasoning_judge(args: ReasoningArguments, *, seed: int, may_be_new: bool) -> OpenedJudge:
    """Opens a judge for training.

    Args:
        args: Names it.
        seed: Of new weights.
        may_be_new: Whether an untrained judge makes sense: one that has to write readable answers needs a start.

    Raises:
        CheckpointError: It cannot be opened.
        ConfigError: `judge: new` where it makes no sense.
    """
    import torch

    if args.judge == "new":
        if not may_be_new:
            raise ConfigError(
                "an untrained judge writes nothing that could be rewarded",
                where="judge",
                fix="give it a start with `refreward rm-sft`, and name the folder that it writes",
            )
        new = build_tiny_judge(
            vision_dim=64,
            vision_heads=2,
            text_dim=64,
            text_heads=2,
            seed=seed,
            spec=NEW_REASONING_SPEC,
            reasoning=True,
        )
        processor = build_processor(new.model.config, new.tokenizer, new.spec)
        return OpenedJudge(new.model, new.tokenizer, new.spec, processor)
    folder = find_folder(args.judge)
    network, tokenizer, spec = open_network(folder, spec=args.judge_spec, dtype=getattr(torch, args.judge_dtype))
    return OpenedJudge(network, tokenizer, spec, load_processor(folder, network.config, tokenizer, spec))


def make_rows(make: Callable[[JudgeSpec], ReasoningRows], opened: OpenedJudge) -> ReasoningRows:
    """Returns the training rows, after making sure that the judge can see them as they are."""
    rows = make(opened.spec)
    family = judge_family(opened.network.config, opened.tokenizer, opened.spec)
    check_size(rows, opened.spec, square=family.square)
    return rows


def save_judge(trainer: Any, opened: OpenedJudge, folder: str | Path) -> None:
    """Writes the judge of a TRL trainer as a judge folder; collective, because ZeRO-3 gathers here."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.args.should_save:
        return
    judge = MLLMJudge(trainer.accelerator.unwrap_model(trainer.model), opened.tokenizer, opened.spec)
    if hasattr(judge.model, "peft_config"):
        save_adapted(judge, Path(folder), state)
    else:
        judge.save_pretrained(folder, state_dict=state)
