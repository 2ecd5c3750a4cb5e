"""Makes `schema.json` from the dataclasses: `python -m refreward_trl.cli.schema`.

The command line reads that file instead of the dataclasses, because importing `TrainingArguments` imports torch and
takes seconds. A test compares it with the installed classes.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import textwrap
import types
import typing
from typing import Any, Literal

from refreward_trl.cli.keys import SCHEMA_FILE

BOUNDS = {
    "adam_beta1": ">= 0, < 1",
    "adam_beta2": ">= 0, < 1",
    "adam_epsilon": "> 0",
    "advantage_clip": "> 0",
    "anchor_weight": ">= 0",
    "artefacts_per_group": ">= 0",
    "beta": ">= 0",
    "cache_lr_latents": ">= 0",
    "candidates_per_group": ">= 2",
    "center_rewards_coefficient": ">= 0",
    "clip_range": "> 0",
    "crop_size": ">= 8",
    "crops_per_image": ">= 1",
    "data_seed": ">= 0",
    "dataloader_num_workers": ">= 0",
    "dataloader_prefetch_factor": ">= 1",
    "ddp_bucket_cap_mb": ">= 1",
    "ddp_timeout": "> 0",
    "distillation_weight": ">= 0",
    "ema_decay": "> 0, < 1",
    "eval_accumulation_steps": ">= 1",
    "eval_delay": ">= 0",
    "eval_groups": ">= 1",
    "eval_steps": "> 0",
    "gradient_accumulation_steps": ">= 1",
    "gradient_weight": ">= 0",
    "hacking_heldout_margin": ">= 0",
    "hacking_patience": ">= 0",
    "hacking_psnr_margin": ">= 0",
    "label_smoothing_factor": ">= 0, <= 1",
    "latent_jitter": ">= 0",
    "latent_weight": ">= 0",
    "learning_rate": ">= 0",
    "log_image_steps": ">= 0",
    "logging_steps": "> 0",
    "lora_alpha": "> 0",
    "lora_dropout": ">= 0, < 1",
    "lora_r": ">= 1",
    "max_eval_images": ">= 1",
    "max_failed_rewards": ">= 0",
    "max_grad_norm": ">= 0",
    "max_groups": ">= 1",
    "max_steps": ">= -1",
    "min_difference": ">= 0",
    "neftune_noise_alpha": ">= 0",
    "noise_cell": ">= 1",
    "num_generations": ">= 2",
    "num_iterations": ">= 1",
    "num_log_images": ">= 1",
    "num_train_epochs": "> 0",
    "per_device_eval_batch_size": ">= 1",
    "per_device_train_batch_size": ">= 1",
    "perceptual_weight": ">= 0",
    "pixel_weight": ">= 0",
    "rank_check_steps": ">= 0",
    "reward_batch_size": ">= 1",
    "reward_timeout": "> 0",
    "reward_weight": ">= 0",
    "save_steps": "> 0",
    "save_total_limit": ">= 1",
    "scale": ">= 1",
    # NumPy takes 32 bits.
    "seed": ">= 0, < 4294967296",
    # Zero is let through to the policy, which refuses it and says why a density needs a width.
    "sigma": ">= 0",
    "temperature": "> 0",
    "test_pairs": ">= 0",
    "tie_margin": ">= 0",
    "torch_empty_cache_steps": ">= 1",
    "warmup_steps": ">= 0",
    "weight_decay": ">= 0",
}

CHOICES = {
    "ddp_backend": ("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"),
    "log_level": ("debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("debug", "info", "warning", "error", "critical", "passive"),
}
"""Texts that `TrainingArguments` accepts without saying so in its annotations."""

HELP = {
    "deepspeed": "a DeepSpeed JSON file, for launchers that know nothing of DeepSpeed",
    "eval_steps": "updates between evaluations, with eval_strategy: steps",
    "eval_strategy": "when to evaluate",
    "gradient_accumulation_steps": "batches per update",
    "learning_rate": "peak learning rate",
    "load_best_model_at_end": "end with the best checkpoint, not the last",
    "logging_steps": "updates between two lines of metrics.jsonl",
    "lr_scheduler_type": "course of the learning rate",
    "max_steps": "updates to make; -1 counts num_train_epochs instead",
    "num_train_epochs": "passes over the data, where max_steps is -1",
    "optim": "the optimizer",
    "output_dir": "folder for checkpoints, metrics.jsonl, summary.json and the result",
    "per_device_train_batch_size": "LR images per process and batch",
    "save_steps": "updates between checkpoints",
    "seed": "of crops, degradations, noise and order",
}
"""Our words for the fields of `TrainingArguments` that a recipe is most likely to set."""

LEFT_OUT = {
    "debug": "`--debug` is the command line's own flag",
    "hub_token": "a secret does not belong in a file; use the HF_TOKEN environment variable",
    "local_rank": "the launcher's business",
    "parallelism_config": "an object, set by the launcher",
}
"""Fields of `TrainingArguments` that are no keys of a recipe, and why."""

_SIMPLE = {int: "int", float: "float", bool: "bool", str: "str", dict: "dict"}


def describe_type(annotation: Any) -> dict[str, Any]:
    """Describes a field's annotation.

    Args:
        annotation: A resolved annotation: simple types, enumerations, `Literal`, lists, dicts, and unions of these.

    Returns:
        `types` (names as in `cli.keys`), and where they apply `nullable` and `choices`.

    Raises:
        TypeError: The annotation cannot be written in a recipe.
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _describe_union(typing.get_args(annotation))
    if origin is Literal:
        return _describe_literal(typing.get_args(annotation))
    if origin is list:
        (entry,) = typing.get_args(annotation)
        if typing.get_origin(entry) is dict:
            return {"types": ["list[reward]"]}
        return {"types": [f"list[{describe_type(entry)['types'][0]}]"]}
    if origin is dict:
        return {"types": ["dict"]}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return {"types": ["str"], "choices": [member.value for member in annotation]}
    if annotation in _SIMPLE:
        return {"types": [_SIMPLE[annotation]]}
    raise TypeError(f"{annotation!r} cannot be written in a recipe")


def _describe_union(members: tuple[Any, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {"types": []}
    for member in members:
        if member is type(None):
            found["nullable"] = True
            continue
        facts = describe_type(member)
        found["types"] += [name for name in facts["types"] if name not in found["types"]]
        found["choices"] = found.get("choices", []) + facts.get("choices", [])
        found["nullable"] = found.get("nullable", False) or facts.get("nullable", False)
    return {name: value for name, value in found.items() if value}


def _describe_literal(values: tuple[Any, ...]) -> dict[str, Any]:
    facts: dict[str, Any] = {"types": sorted({_SIMPLE[type(value)] for value in values if value is not None})}
    texts = [value for value in values if isinstance(value, str)]
    if texts:
        facts["choices"] = texts
    if None in values:
        facts["nullable"] = True
    return facts


def describe_class(cls: type, base: type | None = None) -> dict[str, dict[str, Any]]:
    """Describes the fields of a dataclass that `base` lacks or has with another type or default."""
    hints = typing.get_type_hints(cls)
    inherited = describe_class(base) if base is not None else {}
    is_training = any(parent.__name__ == "TrainingArguments" for parent in cls.__mro__)
    described = {}
    for field in dataclasses.fields(cls):
        if not field.init or field.name in LEFT_OUT:
            continue
        facts = describe_type(hints[field.name])
        if field.name in CHOICES:
            facts["choices"] = list(CHOICES[field.name])
        if field.name in BOUNDS:
            facts["bounds"] = BOUNDS[field.name]
        facts["default"] = _plain_default(field)
        words = HELP.get(field.name) if is_training else None
        facts["help"] = words or _first_sentence(field.metadata.get("help", ""))
        if facts != inherited.get(field.name):
            described[field.name] = facts
    return described


def _plain_default(field: dataclasses.Field) -> Any:
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    return default.value if isinstance(default, enum.Enum) else default


def _first_sentence(text: str) -> str:
    sentence = " ".join(text.split()).split(". ")[0]
    sentence = sentence if sentence.endswith("...") else sentence.removesuffix(".")
    return textwrap.shorten(sentence, width=160, placeholder=" ...")


def generate() -> dict[str, Any]:
    """Returns the content of `schema.json` for the installed classes."""
    from transformers import TrainingArguments
    from trl import GRPOConfig, SFTConfig

    from refreward_trl.data.preference_building import BuildArguments
    from refreward_trl.rewards import REWARD_NAMES
    from refreward_trl.trainers.alignment_config import AlignmentConfig
    from refreward_trl.trainers.arguments import (
        CropArguments,
        DataArguments,
        GeneratorArguments,
        JudgeArguments,
        RewardArguments,
    )
    from refreward_trl.trainers.ddpo_config import SRDDPOConfig
    from refreward_trl.trainers.finetune_config import SRFinetuneConfig
    from refreward_trl.trainers.judge_grpo import JudgeGRPOConfig
    from refreward_trl.trainers.judge_sft import JudgeSFTConfig
    from refreward_trl.trainers.ref_reward_config import RefRewardConfig
    from refreward_trl.trainers.refl_config import SRReFLConfig
    from refreward_trl.trainers.run_config import RunConfig

    plain = (
        *(TrainingArguments, GeneratorArguments, DataArguments, CropArguments, RewardArguments, JudgeArguments),
        BuildArguments,
    )
    derived = {
        RunConfig: TrainingArguments,
        AlignmentConfig: RunConfig,
        SRFinetuneConfig: AlignmentConfig,
        SRReFLConfig: AlignmentConfig,
        SRDDPOConfig: AlignmentConfig,
        RefRewardConfig: RunConfig,
        GRPOConfig: TrainingArguments,
        JudgeGRPOConfig: GRPOConfig,
        SFTConfig: TrainingArguments,
        JudgeSFTConfig: SFTConfig,
    }
    run = ["TrainingArguments", "RunConfig"]
    alignment = [*run, "AlignmentConfig", "GeneratorArguments", "DataArguments", "CropArguments"]
    return {
        "methods": {
            "finetune": [*alignment, "SRFinetuneConfig"],
            "rm": [*run, "DataArguments", "JudgeArguments", "RefRewardConfig"],
            "rm-sft": ["TrainingArguments", "SFTConfig", "DataArguments", "JudgeArguments", "JudgeSFTConfig"],
            "rm-grpo": ["TrainingArguments", "GRPOConfig", "DataArguments", "JudgeArguments", "JudgeGRPOConfig"],
            "refl": [*alignment, "RewardArguments", "SRReFLConfig"],
            "ddpo": [*alignment, "RewardArguments", "SRDDPOConfig"],
            "data build": ["BuildArguments"],
        },
        "reward_names": list(REWARD_NAMES),
        "classes": {cls.__name__: describe_class(cls) for cls in plain}
        | {cls.__name__: describe_class(cls, base) for cls, base in derived.items()},
    }


def as_text(schema: dict[str, Any]) -> str:
    """Writes the schema as JSON with one key of a recipe a line, so that a change shows as a short diff."""
    classes = []
    for name, keys in schema["classes"].items():
        lines = [f"   {json.dumps(key)}: {json.dumps(facts, sort_keys=True)}" for key, facts in keys.items()]
        classes.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    head = "".join(f" {json.dumps(name)}: {json.dumps(schema[name])},\n" for name in ("methods", "reward_names"))
    return "{\n" + head + ' "classes": {\n' + ",\n".join(classes) + "\n }\n}\n"


def main() -> None:
    """Writes `schema.json` beside this module."""
    SCHEMA_FILE.write_text(as_text(generate()), encoding="utf-8")
    print(f"wrote {SCHEMA_FILE}")


if __name__ == "__main__":
    main()
