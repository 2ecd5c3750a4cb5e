"""A judge of about 1.6 M parameters in a stock Qwen2.5-VL class, small enough to train on a CPU.

What makes it trainable from scratch is the start of the patch embedding: LR and SR image are the two frames of one
clip, and the first rows compute the whitened DCT of their difference, of the SR image, of the colour difference and of
the LR image, so that the transformer starts from "what does the SR image say that the LR image does not".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from refreward_trl.errors import ConfigError
from refreward_trl.reward_model.chat_template import OWN_TEMPLATE
from refreward_trl.reward_model.families import IMAGE_TOKEN, VIDEO_TOKEN, single_token_id
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.reward_model.spec import JudgeSpec

_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    "<unk>",
)
_REASONING_WORDS = (
    *("<think>", "</think>", "<answer>", "</answer>"),
    *("think", "choose", "then", "it", "looks", "poor", "fair", "good"),
)
_WORDS = (
    *(str(digit) for digit in range(10)),
    *("user", "assistant", "rate", "the", "image", "against", "its", "reference"),
    *("consistency", "and", "naturalness", "better", "A", "B"),
)

# ITU-R BT.601 luma and (unscaled) chroma axes.
_LUMA = (0.299, 0.587, 0.114)
_BLUE_DIFFERENCE = (-0.169, -0.331, 0.5)
_RED_DIFFERENCE = (0.5, -0.419, -0.081)


def build_tiny_tokenizer(*, reasoning: bool = False) -> PreTrainedTokenizerFast:
    """Returns a word-level tokenizer of 32 tokens with Qwen's special tokens and a chat template.

    Args:
        reasoning: Adds the tags and words of `trainers.reasoning_rows.rationale`.
    """
    words = (*_SPECIAL_TOKENS, *_WORDS, *(_REASONING_WORDS if reasoning else ()))
    vocabulary = {token: index for index, token in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        additional_special_tokens=[t for t in _SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>", "<unk>")],
        padding_side="left",
    )
    tokenizer.chat_template = OWN_TEMPLATE
    return tokenizer


def build_tiny_judge(
    *,
    vision_dim: int = 160,
    vision_depth: int = 2,
    vision_heads: int = 5,
    text_dim: int = 160,
    text_layers: int = 2,
    text_heads: int = 5,
    patch: int = 8,
    seed: int = 0,
    spec: JudgeSpec | None = None,
    reasoning: bool = False,
) -> RateJudge:
    """Builds an untrained tiny judge.

    Args:
        vision_dim: Width of the vision tower; heads must divide it into multiples of 4.
        vision_depth: Vision blocks, all with full attention.
        vision_heads: Vision attention heads.
        text_dim: Width of the language model; heads must divide it into even parts of at least 16.
        text_layers: Language model blocks.
        text_heads: Language model attention heads.
        patch: Side of a vision patch in pixels.
        seed: Seed of the random weights; the global random state is left alone.
        spec: The question; by default the "clip" spec for this patch size.
        reasoning: Give it the words to reason with; its spec should have the prompts.

    Returns:
        The judge, in train mode, with trainable weights on the CPU.

    Raises:
        ConfigError: Heads that do not divide the widths.
    """
    if vision_dim % (4 * vision_heads) or text_dim % (2 * text_heads) or text_dim // text_heads < 16:
        raise ConfigError(
            f"vision_dim {vision_dim} / {vision_heads} heads, text_dim {text_dim} / {text_heads} heads: "
            "rotary positions need vision heads in multiples of 4 and even text heads of at least 16",
            where="build_tiny_judge",
        )
    spec = spec or JudgeSpec(patch=patch)
    tokenizer = build_tiny_tokenizer(reasoning=reasoning)
    temporal = text_dim // text_heads // 8
    spatial = text_dim // text_heads // 2 - temporal
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": text_dim,
            "intermediate_size": 2 * text_dim,
            "num_hidden_layers": text_layers,
            "num_attention_heads": text_heads,
            "num_key_value_heads": text_heads,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [temporal, spatial // 2, spatial - spatial // 2],
                "rope_theta": 10000.0,
            },
            "bos_token_id": single_token_id(tokenizer, "<|endoftext|>"),
            "eos_token_id": single_token_id(tokenizer, "<|im_end|>"),
            "pad_token_id": single_token_id(tokenizer, "<|endoftext|>"),
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_dim,
            "intermediate_size": 2 * vision_dim,
            "num_heads": vision_heads,
            "out_hidden_size": text_dim,
            "patch_size": patch,
            "spatial_merge_size": spec.merge,
            "temporal_patch_size": 2,
            "window_size": 4 * patch * spec.merge,
            "fullatt_block_indexes": list(range(vision_depth)),
        },
        image_token_id=single_token_id(tokenizer, IMAGE_TOKEN),
        video_token_id=single_token_id(tokenizer, VIDEO_TOKEN),
        vision_start_token_id=single_token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=single_token_id(tokenizer, "<|vision_end|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        dct_initialize(model.model.visual.patch_embed.proj.weight, clip=spec.layout == "clip")
    return RateJudge(model.train(), tokenizer, spec)


def dct_basis(size: int) -> Float[Tensor, "f size"]:
    """Returns the orthonormal DCT-II basis, one function per row."""
    frequency = torch.arange(size)[:, None]
    position = torch.arange(size)[None, :]
    basis = torch.cos(math.pi * (position + 0.5) * frequency / size) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis


@torch.no_grad()
def dct_initialize(weight: Float[Tensor, "d 3 2 p p"], *, clip: bool = True) -> None:
    """Fills a patch embedding with DCT rows, lowest frequencies first, and small noise in the rest.

    Gains grow with frequency because natural images have spectra falling as 1 / frequency: the rows start out with
    responses of similar size.

    Args:
        weight: The embedding's kernel, for two frames.
        clip: The frames are the LR and the SR image, whose difference is looked at; else both are the same image.
    """
    rows, _, _, _, patch = weight.shape
    basis = torch.einsum("ay,bx->abyx", dct_basis(patch), dct_basis(patch)).reshape(-1, patch, patch)
    index = torch.arange(patch, dtype=torch.float32)
    frequency = torch.sqrt(index[:, None] ** 2 + index[None, :] ** 2).flatten()
    order = frequency.argsort(stable=True).tolist()

    def difference_gain(f: float) -> float:
        return 1.5 + 0.5 * f

    def image_gain(f: float) -> float:
        return 0.15 + 0.35 * f

    def colour_gain(_: float) -> float:
        return 4.0

    many = min(patch * patch, int((0.4 if clip else 0.75) * rows))
    # (colour axis, weight of the first frame, weight of the second one, number of frequencies, gain)
    groups: list[tuple[tuple[float, ...], float, float, int, Callable[[float], float]]] = [
        (_LUMA, -1.0, 1.0, many, difference_gain),
        (_LUMA, 0.0, 1.0, many, image_gain),
        (_BLUE_DIFFERENCE, -1.0, 1.0, 8, colour_gain),
        (_RED_DIFFERENCE, -1.0, 1.0, 8, colour_gain),
        (_LUMA, 1.0, 0.0, 16, image_gain),
    ]
    if not clip:
        groups = [
            (_LUMA, 0.5, 0.5, many, image_gain),
            (_BLUE_DIFFERENCE, 0.5, 0.5, 8, image_gain),
            (_RED_DIFFERENCE, 0.5, 0.5, 8, image_gain),
        ]
    weight.normal_(0.0, 0.02)
    row = 0
    for axis, lr_weight, sr_weight, count, gain in groups:
        colour = torch.tensor(axis).view(3, 1, 1)
        for index_2d in order[: min(count, rows - row)]:
            pattern = colour * basis[index_2d] * gain(float(frequency[index_2d]))
            weight[row, :, 0] = lr_weight * pattern
            weight[row, :, 1] = sr_weight * pattern
            row += 1
