"""`--dry-run`: everything that a recipe names is looked for, nothing is loaded, downloaded or trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.cli.building import (
    build_arguments,
    build_config,
    build_rewards,
    build_train_dataset,
    check_generator_arguments,
    find_eval_pairs,
    find_test_pairs,
    is_module,
)
from refreward_trl.cli.training import read_rows
from refreward_trl.errors import CheckpointError, RefRewardError

if TYPE_CHECKING:
    from refreward_trl.cli.recipe import Recipe
    from refreward_trl.trainers.arguments import DataArguments, GeneratorArguments

_WIDTH = 12

JUDGE_METHODS = ("rm", "rm-sft", "rm-grpo")
"""The commands that train a judge and no generator."""


def show_plan(recipe: Recipe) -> None:
    """Prints one line for each thing that the run needs, where it comes from, and what is missing.

    Raises:
        RefRewardError: The first thing that is missing or wrong, after all lines have been printed.
    """
    problems: list[RefRewardError] = []
    for label, describe in _parts(recipe).items():
        try:
            line = describe()
        except RefRewardError as error:
            problems.append(error)
            line = f"MISSING OR WRONG: {str(error).splitlines()[0]}"
        if line:
            print(f"{label:<{_WIDTH}} {line}")
    if problems:
        raise problems[0]
    print(f"{'':<{_WIDTH}} nothing was loaded or trained (--dry-run)")


def _parts(recipe: Recipe) -> Mapping[str, Callable[[], str]]:
    if recipe.method == "data build":
        from refreward_trl.cli.data_build import plan

        return plan(recipe)
    from refreward_trl.trainers.arguments import (
        CropArguments,
        DataArguments,
        GeneratorArguments,
        JudgeArguments,
        RewardArguments,
    )

    data = build_arguments(DataArguments, recipe.values)
    parts: dict[str, Callable[[], str]] = {"run": lambda: _describe_run(recipe)}
    if recipe.method in JUDGE_METHODS:
        judged = build_arguments(JudgeArguments, recipe.values)
        if judged.preferences is not None:
            parts["preferences"] = lambda: _describe_preferences(str(judged.preferences), data)
    else:
        source = build_arguments(GeneratorArguments, recipe.values)
        parts["generator"] = lambda: describe_generator(source)
        if source.generator_family or _is_file(source):
            parts["base model"] = lambda: describe_base(source)
        parts["adapter"] = lambda: _describe_adapter(source)
        crops = build_arguments(CropArguments, recipe.values)
        parts["train images"] = lambda: _describe_images(build_train_dataset(data, crops, 0))
        parts["eval images"] = lambda: _describe_images(find_eval_pairs(data))
        parts["test images"] = lambda: _describe_images(find_test_pairs(data))
    if recipe.method in ("refl", "ddpo"):
        wanted = build_arguments(RewardArguments, recipe.values)
        parts["rewards"] = lambda: _describe_rewards(wanted.rewards)
        parts["held out"] = lambda: _describe_rewards(wanted.heldout_rewards)
        if wanted.control is not None:
            control = Path(wanted.control)
            parts["control"] = lambda: f"{control}, {len(read_rows(control))} images"
    return parts


def describe_generator(source: GeneratorArguments) -> str:
    """Says what a recipe's generator is, from its files alone.

    Raises:
        CheckpointError: It is not there; with where its family can be had, if it names one.
    """
    from refreward_trl.generators.families import FAMILIES

    check_generator_arguments(source)
    name = source.generator
    if name in ("default", "new") or is_module(name):
        return {"default": "the shipped one", "new": "a new one, untrained"}.get(name, f"{name}, your own module")
    path = Path(name)
    family = FAMILIES.get(source.generator_family or "")
    if not path.exists():
        where = f"; get it from {family.source}" if family is not None else ""
        raise CheckpointError(f"the checkpoint is not there{where}", where=name, fix="set generator to its path")
    if family is None:
        return f"{path}, a saved generator" if path.is_dir() else f"{path}, its family read from the file"
    notes = f"; {family.note}" if family.note else ""
    return f"{path}: {family.title}; licence: {family.license}{notes}"


def describe_base(source: GeneratorArguments) -> str:
    """Says where the base model of a published checkpoint will come from. Downloads nothing."""
    from refreward_trl.generators.base_models import check_base_model, locate_base_model
    from refreward_trl.generators.families import family_of

    if source.generator_family is None:
        return source.base_model or "as the checkpoint's format says; set generator_family to see more"
    base = family_of(source.generator_family).base
    folder = locate_base_model(base, source.base_model)
    if folder is None:
        names = (source.base_model,) if source.base_model else base.sources
        return f"{base.title}: to be downloaded, from the first that has it of {', '.join(map(str, names))}"
    check_base_model(base, folder)
    return f"{base.title}: {folder}"


def _is_file(source: GeneratorArguments) -> bool:
    return Path(source.generator).is_file()


def _describe_run(recipe: Recipe) -> str:
    config = build_config(_config_class(recipe.method), recipe.values)
    images = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    steps = f"{config.max_steps} updates" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    return f"{recipe.method}, {steps} of {images} LR images on {config.world_size} process(es), to {config.output_dir}"


def _config_class(method: str) -> Any:
    from refreward_trl.trainers.ddpo_config import SRDDPOConfig
    from refreward_trl.trainers.finetune_config import SRFinetuneConfig
    from refreward_trl.trainers.judge_grpo import JudgeGRPOConfig
    from refreward_trl.trainers.judge_sft import JudgeSFTConfig
    from refreward_trl.trainers.ref_reward_config import RefRewardConfig
    from refreward_trl.trainers.refl_config import SRReFLConfig

    return {
        "finetune": SRFinetuneConfig,
        "rm": RefRewardConfig,
        "rm-sft": JudgeSFTConfig,
        "rm-grpo": JudgeGRPOConfig,
        "refl": SRReFLConfig,
        "ddpo": SRDDPOConfig,
    }[method]


def _describe_preferences(source: str, data: DataArguments) -> str:
    from refreward_trl.data.preferences import read_preferences

    counts = [len(read_preferences(source, split=split)) for split in (data.dataset_split, data.eval_dataset_split)]
    return f"{source}: {counts[0]} groups to learn from, {counts[1]} to evaluate on"


def _describe_adapter(source: GeneratorArguments) -> str:
    if not source.use_peft:
        return "none: all weights of the denoiser are trained"
    targets = ", ".join(source.lora_target_modules or ()) or "attention and convolutions"
    return f"LoRA of rank {source.lora_r}, alpha {source.lora_alpha:g}, on {targets}"


def _describe_images(dataset: Any) -> str:
    photos = len(dataset.photos)
    hr = "with HR images" if dataset.has_hr else "without HR images"
    return f"{len(dataset)} of {photos} photos, {hr}"


def _describe_rewards(entries: list[Any]) -> str:
    rewards, names, weights = build_rewards(entries)
    return ", ".join(
        f"{name} x {weight:g}{_describe_judge(reward)}"
        for reward, name, weight in zip(rewards, names, weights, strict=True)
    )


def _describe_judge(reward: Any) -> str:
    """Says where the weights of a reward come from, if they are not the shipped ones."""
    from refreward_trl.rewards.refreward import JudgeReward

    if not isinstance(reward, JudgeReward) or reward.source == "default":
        return ""
    return f" ({reward.source})" if reward.locate() else f" ({reward.source}: to be downloaded, if it is not cached)"
