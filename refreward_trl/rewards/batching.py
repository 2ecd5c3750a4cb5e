"""From whatever arrives in a reward call to equal-sized float batches, and back to one value per completion.

Our own rewards (`fidelity`, `refreward`, `heldout`) share this: reading images of any accepted kind, pairing each
completion with its target image, and scoring the pairs in batches of one size while keeping order, gaps and the graph.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from refreward_trl.data.images import from_pil, read_image, to_float
from refreward_trl.errors import DataError

RANGE_TOLERANCE = 1e-3
"""How far a float pixel may leave [0, 1] before it is taken for another range; more than bfloat16 rounding does."""

Rate = Callable[[Tensor, Tensor], Tensor]
"""`(targets (b, 3, ...), images (b, 3, H, W)) -> (b,)`."""


def is_single_image(value: Any) -> bool:
    """Says whether `value` is one image (path, PIL image or `(3, H, W)` tensor) and not a collection of them."""
    return isinstance(value, (str, os.PathLike, Image.Image)) or (isinstance(value, Tensor) and value.ndim == 3)


def float_image(value: Any, *, where: str) -> Float[Tensor, "3 H W"]:
    """Reads one image.

    Args:
        value: A path, a PIL image, a `uint8` tensor `(3, H, W)`, or a float tensor `(3, H, W)` in [0, 1].
        where: The sample and column that an error names.

    Returns:
        A float32 tensor `(3, H, W)` in [0, 1] on the value's own device, with its graph.

    Raises:
        DataError: For another type, shape or dtype, and for pixels that are not finite or lie outside [0, 1].
    """
    if isinstance(value, (str, os.PathLike)):
        return to_float(read_image(os.fspath(value)))
    if isinstance(value, Image.Image):
        return to_float(from_pil(value, where=where))
    if not isinstance(value, Tensor):
        raise DataError(
            f"cannot read an image from {type(value).__name__}",
            where=where,
            fix="pass a path, a PIL image, a uint8 tensor (3, H, W) or a float tensor (3, H, W) in [0, 1]",
        )
    if value.ndim != 3 or value.shape[0] != 3 or not value.numel():
        raise DataError(f"expected an image of shape (3, H, W), got {tuple(value.shape)}", where=where)
    if value.dtype == torch.uint8:
        return to_float(value)
    if not value.is_floating_point():
        raise DataError(f"images are uint8 or float tensors, got {value.dtype}", where=where)
    return _checked_range(value.float(), where)


def _checked_range(image: Tensor, where: str) -> Tensor:
    low, high = torch.aminmax(image.detach())
    # Written so that NaN fails: a broken image must stop the run, not become a missing reward.
    if not bool((low >= -RANGE_TOLERANCE) & (high <= 1 + RANGE_TOLERANCE)):
        raise DataError(
            f"float images must be finite and in [0, 1], got values from {low.item():.4g} to {high.item():.4g}",
            where=where,
            fix="clamp the image, divide by 255, or map [-1, 1] by (x + 1) / 2",
        )
    return image


def sample_labels(columns: Mapping[str, Any], count: int) -> list[str]:
    """Returns what errors call each row: its `sample_id` where the column is there, else its number."""
    sample_ids = columns.get("sample_id")
    if sample_ids is None or len(sample_ids) != count:
        return [f"row {index}" for index in range(count)]
    return [f"sample {sample_id!r}" for sample_id in sample_ids]


def read_images(images: Any, *, column: str, labels: Sequence[str], optional: bool = True) -> list[Tensor | None]:
    """Reads one image per row.

    Args:
        images: A tensor `(B, 3, H, W)`, a list of images as in `float_image`, or one image that all rows share.
        column: The name that errors give.
        labels: What errors call each row; its length is the expected number of images.
        optional: Whether a row may hold `None` for "no image".

    Returns:
        Float32 tensors `(3, H, W)`; an allowed `None` stays `None`.

    Raises:
        DataError: For a wrong number of images, a `None` that is not allowed, and as in `float_image`.
    """
    if is_single_image(images):
        return [float_image(images, where=f"column {column!r}")] * len(labels)
    if not isinstance(images, (Tensor, Sequence)):
        raise DataError(
            f"expected a tensor (B, 3, H, W) or a list of images, got {type(images).__name__}",
            where=f"column {column!r}",
        )
    if len(images) != len(labels):
        raise DataError(f"{len(images)} images for {len(labels)} completions", where=f"column {column!r}")
    return [
        None if image is None and optional else float_image(image, where=f"{label}, column {column!r}")
        for label, image in zip(labels, images, strict=True)
    ]


def scale_between(lr_image: Float[Tensor, "3 h w"], sr_image: Float[Tensor, "3 H W"], *, where: str) -> int:
    """Returns the whole factor, at least 2, between two images.

    Args:
        lr_image: The LR image.
        sr_image: The SR image.
        where: The sample that an error names.

    Raises:
        DataError: If (H, W) is not one whole multiple of (h, w), from 2 on.
    """
    (height, width), (big_height, big_width) = lr_image.shape[-2:], sr_image.shape[-2:]
    scale = big_height // height
    if scale < 2 or (big_height, big_width) != (scale * height, scale * width):
        raise DataError(
            f"the SR image ({big_width}x{big_height} pixels) is no whole multiple of its LR image ({width}x{height})",
            where=where,
            fix="pass the LR image that this SR image was made from; crop both alike",
        )
    return scale


def rate_pairs(
    rate: Rate, targets: Sequence[Tensor | None], images: Sequence[Tensor | None], *, batch_size: int
) -> list[float | None] | Tensor:
    """Scores images against their targets, in batches of equal sizes.

    Args:
        rate: `(targets (b, 3, ...), images (b, 3, H, W)) -> (b,)`, called with at most `batch_size` pairs.
        targets: Per row the image to compare with, or `None`.
        images: Per row the image to score, or `None`. Batches run on the image's device.
        batch_size: The most pairs per call.

    Returns:
        With gradients enabled and an image that requires grad, a float32 tensor `(B,)` with its graph, NaN where a row
        has no image or no target. Otherwise a list of Python floats, `None` in those rows.
    """
    pairs = {
        row: (target, image)
        for row, (target, image) in enumerate(zip(targets, images, strict=True))
        if target is not None and image is not None
    }
    differentiable = torch.is_grad_enabled() and any(image.requires_grad for _, image in pairs.values())
    scores: dict[int, Tensor] = {}
    with torch.set_grad_enabled(differentiable):
        for rows in _equal_batches(pairs, batch_size):
            image = torch.stack([pairs[row][1] for row in rows])
            target = torch.stack([pairs[row][0] for row in rows]).to(image.device)
            scores |= zip(rows, rate(target, image).float().unbind(), strict=True)
    if differentiable:
        missing = torch.full_like(next(iter(scores.values())), torch.nan)
        return torch.stack([scores.get(row, missing) for row in range(len(images))])
    return [scores[row].item() if row in scores else None for row in range(len(images))]


def _equal_batches(pairs: Mapping[int, tuple[Tensor, Tensor]], batch_size: int) -> list[list[int]]:
    rows_of_kind = defaultdict(list)
    for row, (target, image) in pairs.items():
        rows_of_kind[target.shape, image.shape, image.device].append(row)
    return [
        rows[start : start + batch_size] for rows in rows_of_kind.values() for start in range(0, len(rows), batch_size)
    ]
