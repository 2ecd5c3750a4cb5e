"""From a checked recipe to objects: dataclasses, datasets, generator, rewards. No layer below reads a recipe."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from refreward_trl.errors import ConfigError

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

    from refreward_trl.data.pairs import PairDataset
    from refreward_trl.data.preferences import PreferenceGroup
    from refreward_trl.generators.base import Generator
    from refreward_trl.trainers.arguments import CropArguments, DataArguments, GeneratorArguments
    from refreward_trl.types import RewardFunction

EVALUATION_SEED = 0
"""Degradations of evaluation images do not follow the run's seed, so that runs can be compared."""

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2")
"""Attention and residual convolutions of a diffusers U-Net."""

Arguments = TypeVar("Arguments")
Row = dict[str, Any]


def build_config(config_class: type[Arguments], values: Mapping[str, Any]) -> Arguments:
    """Makes the trainer's configuration; several CPU processes get the settings that make them train together.

    Raises:
        ConfigError: The values contradict each other, by our own checks or by those of `TrainingArguments`.
    """
    try:
        config = build_arguments(config_class, {**launch_settings(), **values})
    except (ValueError, ImportError) as error:
        # transformers checks combinations (eval_steps against save_steps, bf16 against the hardware) by plain errors.
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            reason, where="the recipe and its flags", fix="change one of the settings that it names"
        ) from error
    _check_trackers(getattr(config, "report_to", []))
    return config


def build_arguments(arguments_class: type[Arguments], values: Mapping[str, Any]) -> Arguments:
    """Makes one dataclass of those recipe values that are its fields."""
    fields = {field.name for field in dataclasses.fields(arguments_class) if field.init}  # type: ignore[arg-type]
    return arguments_class(**{name: value for name, value in values.items() if name in fields})


def _check_trackers(names: Sequence[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    missing = [name for name in names if name not in ("none", *installed)]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} is not installed",
            where="report_to",
            fix=f"install it, or use {', '.join(['none', *installed])}; metrics.jsonl is always written",
        )


def launch_settings() -> dict[str, Any]:
    """Returns what a launch of several processes without a GPU must set.

    `use_cpu` makes accelerate wrap the model for DDP, and must stay away under DeepSpeed; both talk over gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return {}
    import torch

    if torch.cuda.is_available():
        return {}
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")
    return {"ddp_backend": "gloo"} if deepspeed else {"ddp_backend": "gloo", "use_cpu": True}


def build_generator(arguments: GeneratorArguments, *, scale: int, seed: int, weights: str | None = None) -> Generator:
    """Loads the generator, or makes an untrained one for "new".

    Args:
        arguments: Which generator.
        scale: The data's HR size over LR size, which must be the generator's.
        seed: Of an untrained generator's weights.
        weights: Folder of trained weights for a generator that is the user's own module.

    Raises:
        ConfigError: The generator enlarges by another factor than the data.
    """
    from refreward_trl.generators import load_generator

    check_generator_arguments(arguments)
    if arguments.generator == "new":
        from refreward_trl.generators.tiny import build_tiny_generator

        generator: Generator = build_tiny_generator(seed=seed, scale=scale)
    elif is_module(arguments.generator):
        generator = load_generator(arguments.generator, scale=scale, weights=weights)
    else:
        generator = load_generator(
            arguments.generator,
            color_fix=arguments.color_fix,
            family=arguments.generator_family,
            base_model=arguments.base_model,
            prompt=arguments.prompt,
            prompt_embeds=arguments.prompt_embeds,
        )
    if generator.scale != scale:
        raise ConfigError(
            f"the generator enlarges {generator.scale} times, the data {scale} times",
            where="scale",
            fix=f"set scale: {generator.scale}",
        )
    return generator


def check_prompts(generator: Generator, arguments: DataArguments) -> None:
    """Raises `ConfigError` if photos have prompts that the generator does not read."""
    if arguments.prompts is not None and not generator.takes_prompts:
        raise ConfigError(
            "the generator reads no prompts",
            where="prompts",
            fix="leave it out, or use a published checkpoint with its base model's text encoder",
        )


def check_generator_arguments(arguments: GeneratorArguments) -> None:
    """Raises `ConfigError` if options of published checkpoints are set for a generator that is none."""
    name = arguments.generator
    if name not in ("default", "new") and not is_module(name):
        return
    for option in ("generator_family", "base_model", "prompt", "prompt_embeds"):
        if getattr(arguments, option) is not None:
            raise ConfigError(
                f"it is set, but generator {name} is no published checkpoint",
                where=option,
                fix="leave it out, or set generator to the checkpoint's path",
            )


def is_module(source: str) -> bool:
    """Tells whether a recipe's `generator` names the user's own module, `package.module:attribute`."""
    from pathlib import Path

    return ":" in source and not Path(source).is_dir()


def build_lora(arguments: GeneratorArguments, generator: Generator) -> LoraConfig | None:
    """Returns the adapter to train; None for full fine-tuning, and for a generator that came with its own adapter."""
    if not arguments.use_peft or generator.has_policy_adapter:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=arguments.lora_dropout,
        target_modules=list(arguments.lora_target_modules or LORA_TARGETS),
    )


def build_train_dataset(arguments: DataArguments, crops: CropArguments, seed: int) -> Any:
    """Returns the training crops."""
    from refreward_trl.data.pairs import load_pairs

    return load_pairs(
        arguments.dataset,
        degradation=arguments.degradation,
        scale=arguments.scale,
        crop_size=arguments.crop_size,
        crops_per_image=crops.crops_per_image,
        augmentation=crops.augmentation,
        seed=seed,
        split=arguments.dataset_split,
        prompts=arguments.prompts,
    )


def build_eval_rows(arguments: DataArguments) -> list[Row]:
    """Returns the whole images by which the best checkpoint is chosen."""
    return _first_rows(find_eval_pairs(arguments), arguments)


def build_test_rows(arguments: DataArguments) -> list[Row]:
    """Returns the whole images that the summary measures on."""
    return _first_rows(find_test_pairs(arguments), arguments)


def find_eval_pairs(arguments: DataArguments) -> PairDataset:
    """Finds the whole images by which the best checkpoint is chosen."""
    return _whole_images(arguments.eval_dataset, arguments.eval_dataset_split, arguments)


def find_test_pairs(arguments: DataArguments) -> PairDataset:
    """Finds the whole images that the summary measures on."""
    return _whole_images(arguments.test_dataset or arguments.eval_dataset, arguments.test_dataset_split, arguments)


def _whole_images(source: str, split: str, arguments: DataArguments) -> PairDataset:
    from refreward_trl.data.pairs import load_pairs

    return load_pairs(
        source,
        degradation=arguments.degradation,
        scale=arguments.scale,
        seed=EVALUATION_SEED,
        split=split,
        prompts=arguments.prompts,
    )


def _first_rows(dataset: PairDataset, arguments: DataArguments) -> list[Row]:
    # A list: each is degraded once, however often it is measured.
    return [dataset[index] for index in range(min(len(dataset), arguments.max_eval_images or len(dataset)))]


def load_photos(source: str, split: str) -> dict[str, Tensor]:
    """Returns the HR images of a source, uint8 `(3, H, W)` by name, to construct candidates of.

    Raises:
        ConfigError: The source has no HR images.
    """
    from refreward_trl.data.pairs import load_pairs

    dataset = load_pairs(source, degradation="bicubic", scale=1, split=split)
    if not dataset.has_hr:
        raise ConfigError(
            "candidates are constructed from HR images, and there are none",
            where=f"dataset {source}",
            fix="name a folder of HR images",
        )
    return {row["sample_id"]: row["hr_image"] for row in (dataset[index] for index in range(len(dataset)))}


def constructed_groups(
    arguments: DataArguments,
    photos: str,
    split: str,
    seed: int,
    *,
    kinds: Sequence[str] | None = None,
    painted_share: float | None = None,
) -> Callable[[int], PreferenceGroup]:
    """Returns what constructs group number `i` from the HR images of a source.

    Args:
        arguments: Crops, scale and degradation.
        photos: The source.
        split: Its split.
        seed: Of everything that is drawn.
        kinds: Artefacts; None for those of the default judge.
        painted_share: See `data.candidates.constructed_group`; None for its default.
    """
    import functools

    from refreward_trl.data.candidates import JUDGE_KINDS, PAINTED_SHARE, constructed_group

    return functools.partial(
        constructed_group,
        load_photos(photos, split),
        seed=seed,
        crop_size=arguments.crop_size,
        scale=arguments.scale,
        kinds=JUDGE_KINDS if kinds is None else tuple(kinds),
        painted_share=PAINTED_SHARE if painted_share is None else painted_share,
        degradations=tuple(dict.fromkeys(("bicubic", arguments.degradation))),
    )


def build_rewards(entries: Sequence[Any]) -> tuple[list[RewardFunction], list[str], list[float]]:
    """Returns the rewards of a recipe's list with their names in metrics and their weights."""
    from refreward_trl.rewards import RewardSpec, load_reward, reward_names

    specs = [RewardSpec.from_entry(entry) for entry in entries]
    rewards = [load_reward(spec) for spec in specs]
    return rewards, reward_names(rewards), [spec.weight for spec in specs]
