"""Differentiable pixels for judges: tiles, patches and normalisation in torch.

The stock processors work on PIL images and break the graph, so the same arrays are built here. Nothing is ever resized
behind the caller's back: resizing destroys the very detail that is being judged.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.reward_model.spec import JudgeSpec


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
    """Returns the expectation of the rating values under a softmax over the rating-token logits, in at least fp32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    values = torch.tensor(spec.rating_values, dtype=dtype, device=logits.device)
    return logits.to(dtype).softmax(dim=-1) @ values


def tile_starts(size: int, tile: int) -> list[int]:
    """Returns where tiles of side `tile` start so that they cover `size` pixels; the last one is shifted to fit."""
    return [min(start, size - tile) for start in range(0, size, tile)]


def check_same_size(first: Tensor, second: Tensor) -> None:
    """Raises `DataError` unless two batches of candidates `(b, 3, H, W)` have one shape."""
    if first.shape != second.shape:
        raise DataError(
            f"candidates of {tuple(first.shape)} and {tuple(second.shape)}",
            where="judge input",
            fix="compare candidates of one size",
        )


def split_tiles(
    lr_image: Float[Tensor, "b 3 h w"],
    sr_image: Float[Tensor, "b 3 H W"],
    spec: JudgeSpec,
    *,
    square: bool = False,
) -> tuple[Float[Tensor, "n 3 th tw"], Float[Tensor, "n 3 tH tW"], int]:
    """Cuts aligned LR and SR tiles on a regular grid that covers the image, row by row, image after image.

    A side shorter than `spec.tile` is used whole, replicate-padded to the next multiple of the patch grid if need be;
    with `square`, to the whole tile. Tile corners lie on LR pixels.

    Returns:
        LR tiles, SR tiles and the number of tiles per image.

    Raises:
        DataError: The SR size is not a whole multiple of the LR size, or tiles must be `square` and the patch grid
            does not divide `spec.tile`.
    """
    scale = image_scale(lr_image, sr_image)
    # A native LR tile must fill the patch grid itself.
    step = spec.pixel_multiple * scale if spec.lr_view == "native" else math.lcm(spec.pixel_multiple, scale)
    tile = max(spec.tile // step, 1) * step
    sides = [tile if square else min(tile, math.ceil(side / step) * step) for side in sr_image.shape[-2:]]
    if square and tile != spec.tile:
        raise DataError(
            f"tiles of {spec.tile} pixels do not fit a patch grid of {spec.pixel_multiple} pixels at scale {scale}",
            where="judge input",
            fix="use a judge whose tile is a multiple of both",
        )
    pad = [max(0, side - size) for side, size in zip(sides, sr_image.shape[-2:], strict=True)]
    if any(pad):
        sr_image = F.pad(sr_image, (0, pad[1], 0, pad[0]), mode="replicate")
        lr_image = F.pad(lr_image, (0, pad[1] // scale, 0, pad[0] // scale), mode="replicate")
    corners = [
        (top, left)
        for top in tile_starts(sr_image.shape[-2], sides[0])
        for left in tile_starts(sr_image.shape[-1], sides[1])
    ]
    sr_tiles = [sr_image[..., top : top + sides[0], left : left + sides[1]] for top, left in corners]
    lr_tiles = [
        lr_image[..., top : top + sides[0] // scale, left : left + sides[1] // scale]
        for top, left in ((top // scale, left // scale) for top, left in corners)
    ]
    return torch.stack(lr_tiles, dim=1).flatten(0, 1), torch.stack(sr_tiles, dim=1).flatten(0, 1), len(corners)
