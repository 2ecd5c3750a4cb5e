"""What a recipe says besides the trainer's own configuration: which generator, which images, which rewards.

These dataclasses stop at the command line: it builds the objects they name and hands those to a trainer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class GeneratorArguments:
    """The generator to train and the adapter that is trained on it."""

    generator: str = field(
        default="default",
        metadata={
            "help": "'default', 'new', a folder, a published checkpoint, package.module:attribute or spandrel:FILE"
        },
    )
    generator_family: Literal["osediff", "naosd", "pisa_sr", "hypir", "tsd_sr"] | None = field(
        default=None,
        metadata={"help": "family of a published checkpoint; null reads it from the file, which merged folders need"},
    )
    base_model: str | None = field(
        default=None,
        metadata={"help": "folder or hub id of a published checkpoint's base model; null tries the known mirrors"},
    )
    prompt: str | None = field(
        default=None, metadata={"help": "fixed prompt of a published checkpoint; null takes its family's"}
    )
    prompt_embeds: str | None = field(
        default=None, metadata={"help": "file of the fixed prompt's embeddings, so that no text encoder is needed"}
    )
    color_fix: Literal["none", "adain", "wavelet"] | None = field(
        default=None, metadata={"help": "colour fix of the deployed path; null keeps the generator's own"}
    )
    use_peft: bool = field(default=True, metadata={"help": "train a LoRA adapter; false trains all denoiser weights"})
    lora_r: int = field(default=8, metadata={"help": "rank of the LoRA adapter"})
    lora_alpha: float = field(default=8, metadata={"help": "LoRA scale times rank"})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "LoRA dropout; ratios need the same mask twice, so policy gradients want 0"}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "names of the layers that get LoRA; null takes attention and convolutions"}
    )


@dataclass
class DataArguments:
    """The low- and high-resolution images to train and to evaluate on."""

    dataset: str = field(
        default="default",
        metadata={"help": "'default' (shipped photos), or a folder; lr:FOLDER and hr:FOLDER force the kind"},
    )
    dataset_split: str = field(default="train", metadata={"help": "split of the training images"})
    eval_dataset: str = field(
        default="default", metadata={"help": "as dataset; whole images, to choose the best checkpoint by"}
    )
    eval_dataset_split: str = field(default="val", metadata={"help": "split of the evaluation images"})
    test_dataset: str | None = field(
        default=None, metadata={"help": "whole images that the summary measures on; null takes eval_dataset"}
    )
    test_dataset_split: str = field(default="test", metadata={"help": "split of the summary's images"})
    degradation: Literal["realesrgan", "seesr", "stablesr", "bicubic"] = field(
        default="seesr", metadata={"help": "what makes the LR images where there are none"}
    )
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "a prompt for each photo: 'sidecar' (.txt files beside the images), a CSV or JSON file, or the "
            "dotted path of a function of the photo's name; null takes the generator's fixed prompt"
        },
    )
    scale: int = field(default=4, metadata={"help": "HR size over LR size"})
    crop_size: int = field(default=128, metadata={"help": "side of the training crops in HR pixels"})
    max_eval_images: int | None = field(
        default=None, metadata={"help": "evaluate and measure on the first so many images; null takes all"}
    )


@dataclass
class CropArguments:
    """The crops that a generator is trained on."""

    crops_per_image: int = field(default=1000, metadata={"help": "different crops of each photo in one epoch"})
    augmentation: Literal["none", "flips", "strong"] = field(
        default="flips",
        metadata={
            "help": "of training crops: flips and quarter turns; strong zooms and recolours too, for few photos"
        },
    )


@dataclass
class RewardArguments:
    """The rewards to train with and those that only watch.

    Each entry is a mapping with `name` (one of ours, or a dotted path to a callable), `weight` and `kwargs`.
    """

    rewards: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "what is maximised: a list of {name, weight, kwargs}"}
    )
    heldout_rewards: list[dict[str, Any]] = field(
        default_factory=list, metadata={"help": "evaluated, never optimised: a list of {name, weight, kwargs}"}
    )
    control: str | None = field(
        default=None, metadata={"help": "output_dir of a finished control run; the summary compares with it"}
    )


@dataclass
class JudgeArguments:
    """What a judge learns from, and how it is measured."""

    preferences: str | None = field(
        default=None,
        metadata={
            "help": "preference dataset (see `refreward data`) to learn from, its splits named by dataset_split and "
            "eval_dataset_split; None constructs candidates from the images of dataset"
        },
    )
    artefacts: Literal["judge", "unpainted", "heldout"] = field(
        default="judge",
        metadata={
            "help": "kinds of artefact in its groups: the default judge's, those without flat paint, or the held-out "
            "judge's own"
        },
    )
    test_pairs: int = field(
        default=200,
        metadata={"help": "constructed pairs for each question of the summary's table; 0 leaves the table out"},
    )
