"""Fidelity anchors: what holds an aligned image to something other than the judge's taste.

Each is a mean absolute difference of images in [0, 1], float32, differentiable in the first image only.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.resampling import downscale


def reference_anchor(image: Float[Tensor, "b 3 H W"], reference_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, ""]:
    """Returns the L1 distance to what the frozen policy made of the same LR image. Needs no HR image."""
    return _l1(image, reference_image)


def fidelity_anchor(image: Float[Tensor, "b 3 H W"], hr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, ""]:
    """Returns the L1 distance to the HR image."""
    return _l1(image, hr_image)


def lr_consistency_anchor(image: Float[Tensor, "b 3 H W"], lr_image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
    """Returns the L1 distance between the downscaled image and its LR image.

    It leaves detail above the LR's resolution free; the downscaling is not the degradation that made the LR image, so
    noise in the LR image is imitated too.

    Raises:
        DataError: If the image is not a whole multiple of the LR image.
    """
    scale = image.shape[-1] // lr_image.shape[-1]
    if image.shape[-2:] != (lr_image.shape[-2] * scale, lr_image.shape[-1] * scale):
        raise DataError(
            f"the image has size {tuple(image.shape[-2:])}, its LR image {tuple(lr_image.shape[-2:])}",
            where="lr_image",
            fix="the SR image must be a whole multiple of the LR image in both directions",
        )
    return _l1(downscale(image.float(), scale), lr_image)


def _l1(image: Tensor, target: Tensor) -> Tensor:
    if image.shape != target.shape:
        # Broadcasting would silently compare every image with one target.
        raise DataError(
            f"cannot compare images of shape {tuple(image.shape)} and {tuple(target.shape)}",
            where="anchor",
            fix="both must be batches of the same images at the same size",
        )
    return (image.float() - target.detach().float()).abs().mean()
