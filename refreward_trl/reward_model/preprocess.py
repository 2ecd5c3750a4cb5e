"""Differentiable pixels and prompt for judges of the Qwen2.5-VL family.

The stock processors work on PIL images and break the graph, so the same patches are built here in torch. Nothing is
ever resized behind the caller's back: resizing destroys the very detail that is being judged.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import CheckpointError, DataError
from refreward_trl.resampling import upscale
from refreward_trl.reward_model.chat_template import render_question
from refreward_trl.reward_model.spec import JudgeSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"

# Values of `mm_token_type_ids` in transformers: 0 text, 1 image, 2 video.
_TOKEN_TYPE = {"images": 1, "clip": 2}


def image_scale(lr_image: Tensor, sr_image: Tensor) -> int:
    """Returns the integer factor between an LR batch `(B, 3, h, w)` and its SR batch `(B, 3, H, W)`.

    Raises:
        DataError: Not a batch of RGB images each, different batch sizes, or sizes without a common integer factor.
    """
    lr_shape, sr_shape = tuple(lr_image.shape), tuple(sr_image.shape)
    if len(lr_shape) != 4 or len(sr_shape) != 4 or lr_shape[:2] != sr_shape[:2] or sr_shape[1] != 3:
        raise DataError(
            f"lr_image has shape {lr_shape} and sr_image {sr_shape}",
            where="judge input",
            fix="pass two batches (B, 3, height, width) of the same length",
        )
    scale = sr_shape[2] // lr_shape[2]
    if scale < 1 or sr_shape[2:] != (scale * lr_shape[2], scale * lr_shape[3]):
        raise DataError(
            f"SR size {sr_shape[2]}x{sr_shape[3]} is not an integer multiple of LR size {lr_shape[2]}x{lr_shape[3]}",
            where="judge input",
            fix="crop the SR image to a whole multiple of its LR image",
        )
    return scale


def patchify(frames: Float[Tensor, "b t 3 H W"], patch: int, merge: int) -> Float[Tensor, "n d"]:
    """Cuts clips of `t` frames into the flat patch rows that the vision tower expects.

    Rows run over clips, then over `merge x merge` blocks of patches, then over the patches of a block; the values of a
    row run over channel, frame, y and x. This is the order of the stock `Qwen2VLImageProcessorPil`.

    Raises:
        DataError: A side is not a multiple of `patch * merge`.
    """
    batch, time, channels, height, width = frames.shape
    block = patch * merge
    if height % block or width % block or min(height, width) == 0:
        raise DataError(
            f"image size {height}x{width} is not a multiple of patch {patch} x merge {merge} = {block} pixels",
            where="judge input",
            fix="pad or crop the image; RateJudge.rate does so",
        )
    grid = frames.reshape(
        batch, time, channels, height // block, merge, patch, width // block, merge, patch
    )  # b t c | block row, row in block, y | block column, column in block, x
    return grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * time * patch * patch)


class JudgePrompt:
    """Token ids of a judge's question, with room for the vision tokens.

    The text is rendered once by the tokenizer's own chat template with one placeholder per image or clip; each
    placeholder is then repeated as often as the pixel grid needs.

    Args:
        tokenizer: The judge's tokenizer, with a chat template.
        spec: The judge's spec.

    Raises:
        CheckpointError: No chat template or one that cannot be used, no vision placeholder, or a rating that is not
            one token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: JudgeSpec) -> None:
        if tokenizer.chat_template is None:
            raise CheckpointError("the judge's tokenizer has no chat template", fix="save chat_template.jinja with it")
        self.placeholder = VIDEO_TOKEN if spec.layout == "clip" else IMAGE_TOKEN
        self.placeholder_id = single_token_id(tokenizer, self.placeholder)
        self.rating_ids = [single_token_id(tokenizer, token) for token in spec.rating_tokens]
        visuals = [{"type": "video"}] if spec.layout == "clip" else [{"type": "image"}, {"type": "image"}]
        messages = [{"role": "user", "content": [*visuals, {"type": "text", "text": spec.prompt}]}]
        text = render_question(tokenizer, messages)
        self._ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        if self._ids.count(self.placeholder_id) != len(visuals):
            raise CheckpointError(
                f"the chat template gave {self._ids.count(self.placeholder_id)} {self.placeholder} tokens"
                f" for layout {spec.layout!r}, which needs {len(visuals)}",
                fix="use the chat template that the judge was trained with",
            )

    def input_ids(self, vision_tokens: int) -> list[int]:
        """Returns the ids of one row with every placeholder repeated `vision_tokens` times."""
        row: list[int] = []
        for token in self._ids:
            row.extend([token] * (vision_tokens if token == self.placeholder_id else 1))
        return row


def single_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Returns the id of `token`, which must be exactly one known token.

    Raises:
        CheckpointError: The tokenizer splits the token or does not know it.
    """
    ids = tokenizer(token, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise CheckpointError(
            f"{token!r} is not one token of the judge's tokenizer (it gives ids {ids})",
            where="judge tokenizer",
            fix="use the tokenizer saved with the judge, or rating tokens that it knows",
        )
    return ids[0]


def judge_inputs(
    lr_image: Float[Tensor, "b 3 h w"],
    sr_image: Float[Tensor, "b 3 H W"],
    spec: JudgeSpec,
    prompt: JudgePrompt,
) -> dict[str, Tensor]:
    """Builds the keyword arguments of a Qwen2.5-VL forward, with a graph from the pixels to both images.

    Args:
        lr_image: float pixels in [0, 1]; upsampled bicubically to the SR size.
        sr_image: float pixels in [0, 1].
        spec: The judge's spec.
        prompt: Its prompt.

    Returns:
        `input_ids`, `attention_mask`, `mm_token_type_ids`, each `(b, tokens)`, and pixels and grid under the names
        that the layout gives them.

    Raises:
        DataError: Sizes that do not fit each other or the patch grid.
    """
    scale = image_scale(lr_image, sr_image)
    upsampled = upscale(lr_image, scale) if scale > 1 else lr_image
    pair = normalize(torch.stack([upsampled, sr_image], dim=1), spec)
    batch, height, width = len(sr_image), sr_image.shape[-2], sr_image.shape[-1]
    if spec.layout == "images":  # a still image fills both frames of the temporal patch
        pair = pair.flatten(0, 1)[:, None].expand(-1, 2, -1, -1, -1)
    pixels = patchify(pair, spec.patch, spec.merge)
    rows, columns = height // spec.patch, width // spec.patch
    grid = torch.tensor([[1, rows, columns]], device=sr_image.device).expand(len(pair), -1)
    vision_tokens = rows * columns // spec.merge**2
    ids = torch.tensor(prompt.input_ids(vision_tokens), device=sr_image.device).expand(batch, -1)
    inputs: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == prompt.placeholder_id).int() * _TOKEN_TYPE[spec.layout],
    }
    if spec.layout == "images":
        return inputs | {"pixel_values": pixels, "image_grid_thw": grid}
    # Without second_per_grid_ts, transformers 5.23 fills it with one entry per token of a row, and a batch with more
    # clips than tokens per row dies of StopIteration.
    seconds = torch.ones(batch, device=sr_image.device)
    return inputs | {"pixel_values_videos": pixels, "video_grid_thw": grid, "second_per_grid_ts": seconds}


def normalize(pixels: Float[Tensor, "*b 3 H W"], spec: JudgeSpec) -> Float[Tensor, "*b 3 H W"]:
    """Applies the spec's mean and standard deviation to pixels in [0, 1]; without them returns the pixels."""
    if spec.image_mean is None or spec.image_std is None:
        return pixels
    mean, std = _channel_constants(spec.image_mean, spec.image_std, pixels.dtype, pixels.device)
    return (pixels - mean) / std


@lru_cache(maxsize=8)
def _channel_constants(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    return (
        torch.tensor(mean, dtype=dtype, device=device).view(3, 1, 1),
        torch.tensor(std, dtype=dtype, device=device).view(3, 1, 1),
    )


def expected_rating(logits: Float[Tensor, "b r"], spec: JudgeSpec) -> Float[Tensor, " b"]:
    """Returns the expectation of the rating values under a softmax over the rating-token logits, in fp32."""
    values = torch.tensor(spec.rating_values, dtype=torch.float32, device=logits.device)
    return logits.float().softmax(dim=-1) @ values


def tile_starts(size: int, tile: int) -> list[int]:
    """Returns where tiles of side `tile` start so that they cover `size` pixels; the last one is shifted to fit."""
    return [min(start, size - tile) for start in range(0, size, tile)]
