"""Fidelity anchors: what holds an aligned image to something other than the judge's taste.

Images are in [0, 1]; each anchor is one float32 number, differentiable in the first image only.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.resampling import downscale

LEAST_LR_ERROR = 1e-5
"""Mean squared LR error below which `lr_drift_anchor` does not divide: 50 dB."""
ALONG_WEIGHT = 0.25
"""What `lr_drift_anchor` asks for a change of the LR error itself, per unit of its logarithm."""


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
    return _l1(downscale(image.float(), _scale(image, lr_image)), lr_image)


def lr_drift_anchor(
    image: Float[Tensor, "b 3 H W"], reference_image: Float[Tensor, "b 3 H W"], lr_image: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, ""]:
    """Returns how far the downscaled image drifted from the reference's, in units of the reference's LR error.

    Per image, with `e(x) = |down(x) - lr|^2`, `|down(x) - down(ref)|^2 / e(ref) + ALONG_WEIGHT |log(e(x) / e(ref))|`,
    then the mean. Detail above the LR's resolution stays free, and what the reference rightly does not imitate (noise,
    JPEG blocks) stays removed. An absolute distance lets clean images drift by many times their error before it
    notices.

    The first term alone lets the PSNR to the LR image slip away: a drift of amplitude `a` along the LR error costs
    `8.7 a` dB, but only `a^2` of it, and doing more of what the generator does anyway drifts just there. The second
    term, 0.058 per dB, does not vanish for small drifts. The LR error counts as at least 50 dB: below that lies
    rounding.

    Raises:
        DataError: If the shapes differ, or the image is not a whole multiple of the LR image.
    """
    scale = _scale(image, lr_image)
    _check_shapes(image, reference_image)
    target = downscale(reference_image.detach().float(), scale)
    allowed = (target - lr_image.float()).square().mean(dim=(1, 2, 3)).clamp(min=LEAST_LR_ERROR)
    current = downscale(image.float(), scale)
    drift = (current - target).square().mean(dim=(1, 2, 3))
    error = (current - lr_image.float()).square().mean(dim=(1, 2, 3)).clamp(min=LEAST_LR_ERROR)
    return (drift / allowed + ALONG_WEIGHT * (error / allowed).log().abs()).mean()


def _scale(image: Tensor, lr_image: Tensor) -> int:
    scale = image.shape[-1] // lr_image.shape[-1]
    if image.shape[-2:] != (lr_image.shape[-2] * scale, lr_image.shape[-1] * scale):
        raise DataError(
            f"the image has size {tuple(image.shape[-2:])}, its LR image {tuple(lr_image.shape[-2:])}",
            where="lr_image",
            fix="the SR image must be a whole multiple of the LR image in both directions",
        )
    return scale


def _l1(image: Tensor, target: Tensor) -> Tensor:
    _check_shapes(image, target)
    return (image.float() - target.detach().float()).abs().mean()


def _check_shapes(image: Tensor, target: Tensor) -> None:
    if image.shape != target.shape:
        # Broadcasting would silently compare every image with one target.
        raise DataError(
            f"cannot compare images of shape {tuple(image.shape)} and {tuple(target.shape)}",
            where="anchor",
            fix="both must be batches of the same images at the same size",
        )
