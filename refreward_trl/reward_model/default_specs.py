"""How a general multimodal LLM is asked when nobody has trained it as a judge yet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from refreward_trl.model_folders import read_object
from refreward_trl.reward_model.spec import JudgeSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

QWEN_TILE = 448
"""Pixels; a whole number of patch grids of Qwen2.5-VL (28) and Qwen3-VL (32)."""

_SCENE = (
    "The first image is a low-resolution input. "
    "{shown} by super-resolution. A good result is consistent with the input, which means that it shows the same "
    "content, shapes and colours and invents nothing that the input rules out, and it is natural, which means sharp "
    "and free of artefacts. "
)
_ONE = _SCENE.replace("{shown}", "The second image was made from it")
_TWO = _SCENE.replace("{shown}", "The second image (A) and the third image (B) were made from it")

RATE_PROMPT = _ONE + ("Rate the second image from 1 (bad) to 5 (excellent). Answer with the number alone.")
COMPARE_PROMPT = _TWO + "Which is better? Answer with the letter alone."
_FORMAT = (
    "First compare the images step by step inside <think> and </think>, "
    "then give {answer} inside <answer> and </answer>."
)
REASON_PROMPT = _ONE + _FORMAT.replace("{answer}", "a rating from 1 (bad) to 5 (excellent)")
REASON_COMPARE_PROMPT = _TWO + _FORMAT.replace("{answer}", "the letter of the better one, A or B,")


def default_spec(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path) -> JudgeSpec:
    """Returns the spec for a network without one: patch grid of the network, pixel statistics of its processor.

    Args:
        config: The network's configuration.
        tokenizer: Its tokenizer; decides whether answers start with a space.
        folder: Its folder; `preprocessor_config.json` there says how pixels are normalised.
    """
    qwen = hasattr(config.vision_config, "spatial_merge_size")
    vision: Any = config.vision_config
    patch, merge = vision.patch_size, vision.spatial_merge_size if qwen else getattr(config, "scale_factor", 1)
    multiple = patch * merge
    # The answer follows the text of the chat template: after "Assistant:" comes " 1", after a line break "1".
    space = "" if _answer_starts_a_line(tokenizer) else " "
    mean, std = _statistics(folder, config)
    return JudgeSpec(
        name=f"{config.model_type}-untrained",
        prompt=RATE_PROMPT,
        compare_prompt=COMPARE_PROMPT,
        reason_prompt=REASON_PROMPT,
        reason_compare_prompt=REASON_COMPARE_PROMPT,
        rating_tokens=tuple(f"{space}{digit}" for digit in range(1, 6)),
        choice_tokens=(f"{space}A", f"{space}B"),
        layout="images",
        tile=max(QWEN_TILE // multiple, 1) * multiple if qwen else vision.image_size,
        patch=patch,
        merge=merge,
        image_mean=mean,
        image_std=std,
    )


def _answer_starts_a_line(tokenizer: PreTrainedTokenizerBase) -> bool:
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    return "assistant:" not in template.lower()


def _statistics(
    folder: Path, config: PretrainedConfig
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            content = read_object(folder / name)
            content = content.get("image_processor", content)
            if "image_mean" in content and "image_std" in content:
                return _three(content["image_mean"]), _three(content["image_std"])
    if config.model_type == "qwen2_5_vl":
        return _three(OPENAI_CLIP_MEAN), _three(OPENAI_CLIP_STD)
    return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)
