"""Rewards that need no model: consistency with the LR image, and PSNR and SSIM against the HR image.

All are differentiable in the completions and honour the reward contract of `refreward_trl.types.RewardFunction`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import ConfigError, DataError
from refreward_trl.resampling import downscale
from refreward_trl.rewards.batching import Rate, rate_pairs, read_images, sample_labels, scale_between

BATCH_SIZE = 32
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def image_psnr(
    image: Float[Tensor, "b c H W"], target: Float[Tensor, "b c H W"], *, cap: float = 100.0
) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB of images in [0, 1], over all pixels and channels.

    Args:
        image: The image to measure.
        target: What it should be.
        cap: The value in dB of two equal images. It enters as `10 ** (-cap / 10)` added to the squared error, so that
            the gradient stays finite; more than 20 dB below the cap it changes the result by less than 0.05 dB.

    Returns:
        One value per image, differentiable.
    """
    error = (image - target).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error + 10 ** (-cap / 10))


def image_ssim(image: Float[Tensor, "b c H W"], target: Float[Tensor, "b c H W"]) -> Float[Tensor, " b"]:
    """Structural similarity (Wang et al. 2004) of images in [0, 1].

    11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, only windows that lie wholly
    inside the image; the mean over positions and channels. `skimage.metrics.structural_similarity` with
    `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=0` gives the same.

    Args:
        image: The image to measure; H, W >= 11.
        target: What it should be.

    Returns:
        One value in [-1, 1] per image, differentiable.
    """
    moments = torch.cat([image, target, image * image, target * target, image * target])
    mean_x, mean_y, square_x, square_y, product = _gaussian_blur(moments).chunk(5)
    variance_x, variance_y = square_x - mean_x.square(), square_y - mean_y.square()
    covariance = product - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _gaussian_blur(images: Tensor) -> Tensor:
    offsets = torch.arange(SSIM_WINDOW, dtype=images.dtype, device=images.device) - SSIM_WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)
    rows = F.conv2d(images, kernel, groups=images.shape[1])
    return F.conv2d(rows, kernel.transpose(-1, -2), groups=images.shape[1])


class LRConsistency:
    """Rewards SR images that give their LR image back: PSNR in dB between the downscaled SR image and the LR image.

    The downscaling is the package's anti-aliased bicubic (`refreward_trl.resampling.downscale`). The factor is read
    from the sizes. A blurred image can be perfectly consistent, so this reward alone does not make images sharp.

    Args:
        cap: The reward in dB of a perfectly consistent image (default 60, near the 58.9 dB that 8-bit rounding
            allows).

    Example:
        >>> import torch
        >>> lr_image = torch.full((1, 3, 8, 8), 0.5)
        >>> [round(value) for value in LRConsistency()(completions=torch.full((1, 3, 32, 32), 0.5), lr_image=lr_image)]
        [60]
    """

    __name__ = "lr_consistency"

    def __init__(self, cap: float = 60.0) -> None:
        if not (math.isfinite(cap) and cap > 0):
            raise ConfigError(f"cap must be a positive number of dB, got {cap}", where="reward 'lr_consistency'")
        self.cap = cap

    def __call__(
        self, *, completions: Any, lr_image: Any, prompts: Any = None, **columns: Any
    ) -> list[float | None] | Tensor:
        """Returns dB, one per completion.

        Raises:
            DataError: For images that cannot be read, or SR images that are no multiple of their LR image.
        """
        labels = sample_labels(columns, len(completions))
        images = read_images(completions, column="completions", labels=labels)
        lr_images = read_images(lr_image, column="lr_image", labels=labels, optional=False)
        for label, small, image in zip(labels, lr_images, images, strict=True):
            if small is not None and image is not None:
                scale_between(small, image, where=f"reward 'lr_consistency', {label}")

        def rate(small: Tensor, image: Tensor) -> Tensor:
            scale = image.shape[-1] // small.shape[-1]
            return image_psnr(downscale(image, scale), small, cap=self.cap)

        return rate_pairs(rate, lr_images, images, batch_size=BATCH_SIZE)


def psnr(
    *, completions: Any, hr_image: Any = None, prompts: Any = None, lr_image: Any = None, **columns: Any
) -> list[float | None] | Tensor:
    """PSNR in dB of each completion against the `hr_image` column (`image_psnr`, at most 100 dB).

    A row whose `hr_image` is None is not scored.

    Raises:
        DataError: Without the column `hr_image`, and where a completion and its HR image differ in size.
    """
    return _against_hr("psnr", lambda target, image: image_psnr(image, target), completions, hr_image, columns)


def ssim(
    *, completions: Any, hr_image: Any = None, prompts: Any = None, lr_image: Any = None, **columns: Any
) -> list[float | None] | Tensor:
    """SSIM in [-1, 1] of each completion against the `hr_image` column (`image_ssim`).

    A row whose `hr_image` is None is not scored.

    Raises:
        DataError: Without the column `hr_image`, where a completion and its HR image differ in size, and for images
            smaller than the 11x11 window.
    """
    return _against_hr(
        "ssim", lambda target, image: image_ssim(image, target), completions, hr_image, columns, least_side=SSIM_WINDOW
    )


def _against_hr(
    name: str, rate: Rate, completions: Any, hr_image: Any, columns: dict[str, Any], *, least_side: int = 1
) -> list[float | None] | Tensor:
    if hr_image is None:
        raise DataError(
            "the column 'hr_image' is missing",
            where=f"reward {name!r}",
            fix="use a dataset with HR images, or a reward that needs none (refreward, lr_consistency)",
        )
    labels = sample_labels(columns, len(completions))
    images = read_images(completions, column="completions", labels=labels)
    targets = read_images(hr_image, column="hr_image", labels=labels)
    for label, target, image in zip(labels, targets, images, strict=True):
        if target is None or image is None:
            continue
        if target.shape != image.shape:
            raise DataError(
                f"the completion has shape {tuple(image.shape)}, its HR image {tuple(target.shape)}",
                where=f"reward {name!r}, {label}",
                fix="crop the HR image to a multiple of the scale before degrading it",
            )
        if min(image.shape[-2:]) < least_side:
            raise DataError(
                f"{image.shape[-1]}x{image.shape[-2]} pixels are less than the {least_side}x{least_side} window",
                where=f"reward {name!r}, {label}",
            )
    return rate_pairs(rate, targets, images, batch_size=BATCH_SIZE)
