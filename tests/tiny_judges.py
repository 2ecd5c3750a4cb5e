"""Judges of every family, small enough that every test can afford one, with what their networks are fed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from refreward_trl.reward_model.chat_template import OWN_TEMPLATE
from refreward_trl.reward_model.judge import MLLMJudge
from refreward_trl.reward_model.question import shown_visuals
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec

SMALL = {"vision_dim": 32, "vision_depth": 1, "vision_heads": 4, "text_dim": 32, "text_layers": 1, "text_heads": 2}
FAMILY_NAMES = ("qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm")

IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_IDEFICS_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
)


def sharpen(judge: Any, factor: float = 6.0) -> Any:
    """Enlarges the weights, so that the answers of an untrained judge really depend on its input."""
    with torch.no_grad():
        for weight in judge.model.parameters():
            if weight.ndim == 2:
                weight.mul_(factor)
    judge.model.eval().requires_grad_(False)
    return judge


def judge_inputs(judge: RateJudge, lr_image: torch.Tensor, sr_image: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `judge` feeds its network, without positions."""
    visuals = shown_visuals(lr_image, [sr_image], judge.spec)
    prompt = next(iter(judge.prompts.values()))
    return prompt.token_inputs(visuals) | judge.family.pixel_inputs(visuals)


def byte_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, so that every text can be written, with the special tokens of a family.

    " 1" to " 5", " A" and " B" are tokens of their own, as in the tokenizers of the real models.
    """
    special = _QWEN_SPECIAL if family.startswith("qwen") else _IDEFICS_SPECIAL
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*special, *alphabet))}
    merges = [("\u0120", answer) for answer in (*"12345", *"AB")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=special[2],
        pad_token=special[0],
        additional_special_tokens=[token for token in special if token not in (special[0], special[2])],
        padding_side="left",
    )
    tokenizer.chat_template = OWN_TEMPLATE if family.startswith("qwen") else IDEFICS_TEMPLATE
    return tokenizer


def family_network(family: str, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, width: int = 32) -> Any:
    """An untrained network of a stock class with about 100 thousand parameters at width 32."""
    ids = tokenizer.get_vocab()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
        "max_position_embeddings": 4096,
        "pad_token_id": ids["<|endoftext|>"],
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "qwen2_5_vl":
            return Qwen2_5_VLForConditionalGeneration(_qwen2_5(text, ids))
        if family == "qwen3_vl":
            return Qwen3VLForConditionalGeneration(_qwen3(text, ids))
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        }
        classes: Any = {
            "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
            "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
        }
        config_class, network_class = classes[family]
        config = config_class(
            text_config={"model_type": "llama", **text},
            vision_config=vision,
            scale_factor=2,
            image_token_id=ids["<image>"],
            pad_token_id=ids["<|endoftext|>"],
            tie_word_embeddings=False,
        )
        return network_class(config)


def family_spec(family: str, **changes: Any) -> JudgeSpec:
    """A spec of a tiny network of a family, with every way to ask."""
    space = "" if family.startswith("qwen") else " "
    given: dict[str, Any] = {
        "name": f"tiny-{family}",
        "prompt": "How good is it?",
        "compare_prompt": "Which is better?",
        "reason_prompt": "Think, then rate.",
        "reason_compare_prompt": "Think, then choose.",
        "rating_tokens": tuple(f"{space}{digit}" for digit in range(1, 6)),
        "choice_tokens": (f"{space}A", f"{space}B"),
        "layout": "images",
        "tile": 32,
        "patch": 8,
        "merge": 2,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "max_new_tokens": 6,
    }
    return JudgeSpec(**given | changes)


def family_judge(
    family: str, kind: type[MLLMJudge] = RateJudge, *, options: Any = None, sharpness: float = 6.0, **changes: Any
) -> Any:
    """A judge of a family; `changes` are fields of its spec."""
    tokenizer = byte_tokenizer(family)
    network = family_network(family, tokenizer)
    return sharpen(kind(network, tokenizer, family_spec(family, **changes), **(options or {})), sharpness)


def own_rewards(values: Mapping[str, Any], folder: Path) -> str:
    """Returns the rewards of a recipe as JSON, with a tiny judge, written to `folder`, in the place of large ones."""
    rewards = json.loads(json.dumps(values.get("rewards", [])))
    for entry in rewards:
        if isinstance(entry, dict) and "source" in entry.get("kwargs", {}):
            family_judge("qwen2_5_vl").save_pretrained(folder / "judge")
            entry["kwargs"]["source"] = str(folder / "judge")
    return json.dumps(rewards)


def _qwen2_5(text: dict[str, Any], ids: dict[str, int]) -> Qwen2_5_VLConfig:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 64,
        "fullatt_block_indexes": [1],
    }
    return Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **_qwen_ids(ids))


def _qwen3(text: dict[str, Any], ids: dict[str, int]) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "num_heads": 2,
        "out_hidden_size": text["hidden_size"],
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLConfig(
        text_config=text | {"rope_parameters": rope, "head_dim": 16}, vision_config=vision, **_qwen_ids(ids)
    )


def _qwen_ids(ids: dict[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
