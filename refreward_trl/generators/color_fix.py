"""Colour fixes of the deployed path: they give the SR image the colours of the enlarged LR image.

Differentiable and part of what rewards see, so that a policy is not paid for what post-processing then undoes. The
formulas are those that the one-step SR repositories share (AdaIN on pixels; a five-level a-trous wavelet split).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WAVELET_LEVELS = 5


def no_fix(image: Float[Tensor, "b 3 H W"], source: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
    """Returns `image` as it is."""
    return image


def adain_fix(image: Float[Tensor, "b 3 H W"], source: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
    """Matches mean and standard deviation of each channel of `image` to those of `source`."""
    mean, std = _channel_statistics(image)
    source_mean, source_std = _channel_statistics(source)
    return (image - mean) / std * source_std + source_mean


def wavelet_fix(image: Float[Tensor, "b 3 H W"], source: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
    """Keeps the fine part of `image` and takes the coarse part (beyond about 2^5 pixels) of `source`."""
    return image - _coarse(image) + _coarse(source)


COLOR_FIXES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": no_fix,
    "adain": adain_fix,
    "wavelet": wavelet_fix,
}
"""Name in a config -> fix."""


def _channel_statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    # The epsilon keeps the square root differentiable for a flat channel.
    mean = image.mean(dim=(-2, -1), keepdim=True)
    return mean, (image.var(dim=(-2, -1), keepdim=True) + 1e-5).sqrt()


def _coarse(image: Tensor) -> Tensor:
    """Smooths with the binomial kernel (1 2 1) x (1 2 1) / 16 at dilations 1, 2, 4, ..."""
    channels = image.shape[1]
    taps = torch.tensor([1.0, 2.0, 1.0], dtype=image.dtype, device=image.device)
    kernel = (torch.outer(taps, taps) / 16).expand(channels, 1, 3, 3)
    for level in range(WAVELET_LEVELS):
        reach = 2**level
        padded = F.pad(image, (reach, reach, reach, reach), mode="replicate")
        image = F.conv2d(padded, kernel, dilation=reach, groups=channels)
    return image
