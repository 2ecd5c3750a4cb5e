"""Settings of `RefRewardTrainer`, on top of those of every run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from refreward_trl.errors import ConfigError
from refreward_trl.trainers.run_config import RunConfig, check_choice, check_range


@dataclass
class RefRewardConfig(RunConfig):
    """Configuration of `RefRewardTrainer`.

    One sample is one preference group: an LR image with its K candidates, so `per_device_train_batch_size` counts
    groups and the judge sees K times as many images.
    """

    judge: str = field(
        default="new",
        metadata={
            "help": "'new' (tiny untrained judge), 'conv' (untrained convolutional judge), 'default', a folder with a "
            "judge or a multimodal LLM, or its name on the hub"
        },
    )
    judge_spec: str | None = field(
        default=None, metadata={"help": "JSON file with how a multimodal LLM is asked; by default in plain words"}
    )
    quantization: Literal["8bit", "4bit"] | None = field(
        default=None, metadata={"help": "load the judge's weights in 8 or 4 bit (bitsandbytes); needs use_peft"}
    )
    judge_dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "precision of the judge's weights; those of an adapter are float32"}
    )
    use_peft: bool = field(default=False, metadata={"help": "train a LoRA adapter; false trains all weights"})
    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA adapter"})
    lora_alpha: float = field(default=32, metadata={"help": "LoRA scale times rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout in the LoRA adapter"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "layers that get a LoRA adapter; all linear layers of the LLM by default"}
    )
    freeze_vision: bool = field(default=False, metadata={"help": "leave the vision tower as it is"})
    loss_type: Literal["pairwise", "listwise", "fidelity"] = field(
        default="pairwise",
        metadata={
            "help": "pairwise (Bradley-Terry) and fidelity (Thurstone) take any order; listwise (Plackett-Luce) needs "
            "groups in which all candidates are ranked"
        },
    )
    aspect: Literal["overall", "consistency", "naturalness"] = field(
        default="overall",
        metadata={"help": "which labels are learned; a judge that is asked per aspect is asked for this one"},
    )
    temperature: float = field(
        default=0.5, metadata={"help": "score difference at which a preference counts as clear, at the start"}
    )
    learn_temperature: bool = field(default=True, metadata={"help": "learn the temperature with the weights"})
    center_rewards_coefficient: float = field(
        default=0.04,
        metadata={"help": "weight of the pull of the best candidate to the top rating and of the worst to the lowest"},
    )
    teachers: list[str] | None = field(
        default=None, metadata={"help": "folders of trained judges whose mean score is learned beside the order"}
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "weight of each teacher in the mean; equal by default"}
    )
    distillation_weight: float = field(
        default=3.0, metadata={"help": "weight of the distance to the teachers' scores; the order itself has 1"}
    )
    augment: bool = field(default=True, metadata={"help": "flip and turn whole groups at random"})
    max_groups: int = field(default=3000, metadata={"help": "training groups to construct"})
    eval_groups: int = field(default=64, metadata={"help": "evaluation groups to construct"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss_type", self.loss_type, ("pairwise", "listwise", "fidelity"))
        check_choice("aspect", self.aspect, ("overall", "consistency", "naturalness"))
        check_choice("judge_dtype", self.judge_dtype, ("float32", "bfloat16"))
        if self.quantization is not None:
            check_choice("quantization", self.quantization, ("8bit", "4bit"))
            if not self.use_peft:
                raise ConfigError(
                    f"{self.quantization} weights cannot be trained", where="quantization", fix="set use_peft: true"
                )
            if self.quantization == "4bit" and self.device.type == "cpu" and self.eval_strategy != "no":
                raise ConfigError(
                    "on a CPU, bitsandbytes packs 4-bit weights for good at the first evaluation",
                    where="eval_strategy",
                    fix="set eval_strategy: no, or quantization: 8bit",
                )
        if self.use_peft and self.judge == "conv":
            raise ConfigError("a convolutional judge takes no LoRA adapter", where="use_peft", fix="set it to false")
        check_range("lora_r", self.lora_r, low=1)
        check_range("lora_alpha", self.lora_alpha, low=0.0, low_included=False)
        check_range("lora_dropout", self.lora_dropout, low=0.0, high=1.0)
        check_range("temperature", self.temperature, low=0.0, low_included=False)
        check_range("center_rewards_coefficient", self.center_rewards_coefficient, low=0.0)
        if untrained := {"new", "conv"}.intersection(self.teachers or ()):
            raise ConfigError(
                f"{untrained.pop()!r} is an untrained judge", where="teachers", fix="give folders of trained judges"
            )
        if self.teacher_weights is not None:
            _check_weights(self.teacher_weights, count=len(self.teachers or ()))
        check_range("distillation_weight", self.distillation_weight, low=0.0)
        check_range("max_groups", self.max_groups, low=1)
        check_range("eval_groups", self.eval_groups, low=1)


def _check_weights(weights: list[float], *, count: int) -> None:
    if len(weights) != count:
        raise ConfigError(
            f"{len(weights)} weights for {count} teachers", where="teacher_weights", fix="give one per teacher"
        )
    if not all(weight >= 0 and math.isfinite(weight) for weight in weights) or sum(weights) == 0:
        raise ConfigError(f"{weights} cannot be weights of a mean", where="teacher_weights", fix="use numbers above 0")
