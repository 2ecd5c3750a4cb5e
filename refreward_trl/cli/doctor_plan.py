"""From a checked recipe to an estimate of what it takes, and of what each setting would change."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from refreward_trl.cli.building import build_arguments, build_config, build_lora, build_rewards
from refreward_trl.cli.recipe import Recipe
from refreward_trl.cli.weightless import generator_without_content, reward_without_content
from refreward_trl.errors import ConfigError, RefRewardError

if TYPE_CHECKING:
    from refreward_trl.trainers.memory_estimate import Estimate, Sharding

METHODS = ("refl", "ddpo", "finetune")
"""The methods that can be rehearsed."""

_QUIET: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "resume": "never",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "save_strategy": "no",
    "deepspeed": None,
    "torch_compile": False,
    "log_image_steps": 0,
    "cache_lr_latents": 0,
    "dataloader_num_workers": 0,
}
"""What a rehearsal does without."""


@dataclass(frozen=True)
class Pictures:
    """What is known of the images without decoding them.

    Attributes:
        evaluated: Height and width of the largest one that is evaluated whole; None if there is none.
        kept: Bytes of decoded photos that stay in memory.
        remark: What could not be looked at, or nothing.
    """

    evaluated: tuple[int, int] | None
    kept: int
    remark: str = ""


@dataclass(frozen=True)
class Plan:
    """An estimate, and what it does not cover.

    Attributes:
        estimate: The estimate.
        remarks: What was left out or assumed.
    """

    estimate: Estimate
    remarks: tuple[str, ...]


class _NoPhotos:
    """Stands for the training images: a rehearsal brings its own."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"sample_id": "", "lr_image": None, "hr_image": None}


def look_at_pictures(recipe: Recipe) -> Pictures:
    """Reads the sizes of a recipe's images from their headers."""
    from refreward_trl.data.pairs import MAX_CACHE_BYTES
    from refreward_trl.data.sources import find_pairs
    from refreward_trl.trainers.arguments import DataArguments

    data = build_arguments(DataArguments, recipe.values)
    kept, sides = 0, []
    wanted = [(data.eval_dataset, data.eval_dataset_split)]
    wanted.append((data.test_dataset or data.eval_dataset, data.test_dataset_split))
    try:
        photos = sum(_pixels(pair, data.scale) for pair in find_pairs(data.dataset, data.dataset_split))
        kept += 3 * photos if 3 * photos <= MAX_CACHE_BYTES else 0
        for source, split in wanted:
            pairs = find_pairs(source, split)
            pairs = pairs[: data.max_eval_images or len(pairs)]
            sides += [_hr_size(pair, data.scale) for pair in pairs]
            # Whole photos with their LR images, kept for as long as the run lasts.
            kept += sum(3 * _pixels(pair, data.scale) for pair in pairs)
    except RefRewardError as error:
        return Pictures(None, 0, f"the images could not be looked at ({error.what}): training crops alone are counted")
    return Pictures(max(sides, key=lambda side: side[0] * side[1], default=None), kept)


def plan(recipe: Recipe, pictures: Pictures, *, cpu: bool = True) -> Plan:
    """Rehearses a recipe.

    Raises:
        ConfigError: The method cannot be rehearsed, or the recipe cannot work.
    """
    if recipe.method not in METHODS:
        raise ConfigError(
            f"`refreward {recipe.method}` cannot be rehearsed", where="method", fix=f"one of {', '.join(METHODS)} can"
        )
    from torch._subclasses.fake_tensor import FakeTensorMode

    from refreward_trl.trainers.arguments import DataArguments, GeneratorArguments
    from refreward_trl.trainers.memory_estimate import rehearse

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    data = build_arguments(DataArguments, recipe.values)
    source = build_arguments(GeneratorArguments, recipe.values)
    with tempfile.TemporaryDirectory() as folder:
        config_class, trainer_class = _classes(recipe.method)
        quiet = {**recipe.values, **_QUIET, "output_dir": folder}
        if recipe.method != "finetune":
            quiet["reward_timeout"] = None
        config = build_config(config_class, quiet)
        generator = generator_without_content(source, scale=data.scale, mode=mode)
        further, judges, remarks = ({}, {}, []) if recipe.method == "finetune" else _rewards(recipe, mode)
        trainer = trainer_class(
            generator,
            args=config,
            train_dataset=_NoPhotos(),
            peft_config=build_lora(source, generator),
            **further,
        )
        estimate = rehearse(
            trainer,
            mode,
            crop_size=data.crop_size,
            evaluated=pictures.evaluated,
            judges=judges,
            images=pictures.kept,
            cpu=cpu,
        )
    return Plan(estimate, tuple(remark for remark in [pictures.remark, *remarks] if remark))


@dataclass(frozen=True)
class Knob:
    """A setting that could make a run smaller.

    Attributes:
        text: What to write.
        values: Keys of the recipe to change.
        sharding: How the launch would divide, or None for no change.
        costs: What it costs.
    """

    text: str
    values: Mapping[str, Any]
    costs: str
    sharding: Sharding | None = None


def knobs(recipe: Recipe, sharding: Sharding, *, cpu: bool) -> Iterator[Knob]:
    """Yields what a recipe and its launch have not used yet."""
    values = recipe.values
    batch = values.get("per_device_train_batch_size", 8)
    if not values.get("activation_checkpointing"):
        yield Knob("activation_checkpointing: true", {"activation_checkpointing": True}, "about a third more time")
    if recipe.method == "refl":
        if values.get("checkpoint_decode") is False:
            yield Knob("checkpoint_decode: true", {"checkpoint_decode": True}, "one more decode")
        yield from _judge_knob(values.get("rewards") or [])
    if batch > 1:
        smaller = {
            "per_device_train_batch_size": batch // 2,
            "gradient_accumulation_steps": 2 * values.get("gradient_accumulation_steps", 1),
        }
        text = ", ".join(f"{name}: {value}" for name, value in smaller.items())
        yield Knob(text, smaller, "nothing but some speed")
    if not values.get("use_peft", True) and values.get("train_part") != "vae":
        yield Knob("use_peft: true", {"use_peft": True}, "an adapter learns less than all weights")
    if "8bit" not in str(values.get("optim", "")):
        yield Knob("optim: adamw_bnb_8bit", {"optim": "adamw_bnb_8bit"}, "needs bitsandbytes; 8 bits for the moments")
    yield from _launch_knobs(sharding, cpu)


def _judge_knob(rewards: list[Any]) -> Iterator[Knob]:
    entries: list[dict[str, Any]] = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in rewards]
    ours = [entry.get("kwargs") or {} for entry in entries if entry.get("name") == "refreward"]
    for checkpoint, written in ((True, "true"), ("blocks", "blocks")):
        if all(kwargs.get("checkpoint") in (checkpoint, "blocks") for kwargs in ours):
            continue
        changed = [
            {**entry, "kwargs": {**(entry.get("kwargs") or {}), "checkpoint": checkpoint}}
            if entry.get("name") == "refreward"
            else entry
            for entry in entries
        ]
        text = f"rewards: refreward with kwargs {{checkpoint: {written}}}"
        yield Knob(text, {"rewards": changed}, "one more judge forward")


def _launch_knobs(sharding: Sharding, cpu: bool) -> Iterator[Knob]:
    if sharding.processes > 1:
        for stage in range(sharding.stage + 1, 4):
            yield Knob(f"ZeRO-{stage} (zero{stage}.yaml)", {}, "communication", replace(sharding, stage=stage))
    if not (sharding.offload or cpu):
        moved = replace(sharding, stage=3, offload=True)
        yield Knob("ZeRO-3 with offload (zero3_offload.yaml)", {}, "much slower; takes the CPU's memory", moved)


def _classes(method: str) -> tuple[Any, Any]:
    if method == "refl":
        from refreward_trl.trainers.refl_config import SRReFLConfig
        from refreward_trl.trainers.refl_trainer import SRReFLTrainer

        return SRReFLConfig, SRReFLTrainer
    if method == "ddpo":
        from refreward_trl.trainers.ddpo_config import SRDDPOConfig
        from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer

        return SRDDPOConfig, SRDDPOTrainer
    from refreward_trl.trainers.finetune_config import SRFinetuneConfig
    from refreward_trl.trainers.finetune_trainer import SRFinetuneTrainer

    return SRFinetuneConfig, SRFinetuneTrainer


def _rewards(recipe: Recipe, mode: Any) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Returns keywords of the trainer, the networks of the judges, and remarks."""
    from refreward_trl.rewards.refreward import JudgeReward
    from refreward_trl.trainers.arguments import RewardArguments

    wanted = build_arguments(RewardArguments, recipe.values)
    judges: dict[str, Any] = {}
    remarks: list[str] = []
    found: dict[str, Any] = {}
    for key, entries in (("reward_funcs", wanted.rewards), ("heldout_rewards", wanted.heldout_rewards)):
        rewards, names, weights = build_rewards(entries)
        kept = []
        for reward, name, weight in zip(rewards, names, weights, strict=True):
            rehearsed, remark = reward_without_content(reward, mode)
            judge = reward._judge if isinstance(reward, JudgeReward) else None
            if judge is not None:
                judges[f"judge {name}"] = getattr(judge, "model", judge)
            if remark is not None:
                remarks.append(f"the reward {name!r}: {remark}")
            kept.append((reward if rehearsed else _stand_in, weight))
        found[key] = [reward for reward, _ in kept]
        if key == "reward_funcs":
            found["reward_weights"] = [weight for _, weight in kept]
    return found, judges, remarks


def _stand_in(*, completions: Any, **columns: Any) -> Any:
    """A reward that takes nothing, with a graph to the image."""
    return completions.float().mean(dim=(1, 2, 3))


def _hr_size(pair: Any, scale: int) -> tuple[int, int]:
    if pair.hr_image is not None:
        height, width = pair.hr_image.size()
        return height - height % scale, width - width % scale
    height, width = pair.lr_image.size()
    return height * scale, width * scale


def _pixels(pair: Any, scale: int) -> int:
    total = 0
    for image in (pair.hr_image, pair.lr_image):
        if image is not None:
            height, width = image.size()
            total += height * width
    return total
