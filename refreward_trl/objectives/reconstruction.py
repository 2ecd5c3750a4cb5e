"""Supervised objectives: how far an SR image is from its HR image."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

LOG_MSE_FLOOR = 2e-3
"""Added to the MSE inside the logarithm, 27 dB: an image that is nearly right does not dominate the gradient."""


def log_mse_loss(
    image: Float[Tensor, "b 3 H W"], target: Float[Tensor, "b 3 H W"], *, floor: float = LOG_MSE_FLOOR
) -> Float[Tensor, ""]:
    """Returns the mean over images of `0.1 log(MSE + floor)`.

    Minimising it climbs the mean PSNR, in which a smooth image counts as much as a textured one; under a plain mean of
    squares the textured ones are all that counts. 0.1 brings it to the size of an L1 distance.
    """
    return 0.1 * ((image - target).square().mean(dim=(1, 2, 3)) + floor).log().mean()


def gradient_loss(image: Float[Tensor, "b 3 H W"], target: Float[Tensor, "b 3 H W"]) -> Float[Tensor, ""]:
    """Returns the L1 distance of the differences of neighbouring pixels, rows plus columns."""
    difference = image - target
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


PIXEL_LOSSES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": F.l1_loss,
    "mse": F.mse_loss,
    "log_mse": log_mse_loss,
}
"""Name in a config -> loss of images in [0, 1]."""
