"""A perceptual hash of LR images: tells whether two of them show the same view, whatever degraded them.

The signs of the low frequencies of a 32x32 grey thumbnail's cosine transform, against their median ("pHash"). Of the
86 default photos any two differ in at least 18 of the 63 bits, and a photo from its own copies, reduced by the presets
realesrgan, seesr and stablesr, in at most 8. Random 128-pixel crops of different photos lie within 10 bits in 7 of
526320 pairs; crops of a photo that hardly overlap do not resemble each other, and only the photo's name tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

SAME_VIEW = 10
"""Two images within so many bits are taken for the same view."""

_SIDE, _KEPT = 32, 8
_FLAT = 1 / 255
_ROWS_AT_ONCE = 1024


def perceptual_hash(image: UInt8[Tensor, "3 h w"]) -> Bool[Tensor, 63] | None:
    """Returns the hash of an image of any size, or None for a flat one, which has nothing to be known by."""
    grey = image.float().mean(0, keepdim=True)[None] / 255
    thumbnail = F.adaptive_avg_pool2d(grey, _SIDE)[0, 0]
    if float(thumbnail.std()) < _FLAT:
        return None
    cosines = _cosines()
    low = (cosines @ thumbnail @ cosines.T)[:_KEPT, :_KEPT].flatten()[1:]
    return low > low.median()


def _cosines() -> Float[Tensor, "32 32"]:
    place = torch.arange(_SIDE, dtype=torch.float32)
    return torch.cos(math.pi / _SIDE * (place[None] + 0.5) * place[:, None])


def near_pairs(hashes: Sequence[Bool[Tensor, 63] | None], distance: int = SAME_VIEW) -> Iterator[tuple[int, int, int]]:
    """Yields (first, second, bits) for any two hashes that differ in at most `distance` bits."""
    numbers = [number for number, code in enumerate(hashes) if code is not None]
    if not numbers:
        return
    signs = torch.stack([code for code in hashes if code is not None]).float() * 2 - 1
    bits = signs.shape[1]
    for start in range(0, len(signs), _ROWS_AT_ONCE):
        # The inner product of two vectors of signs is the number of bits less twice those that differ.
        differing = (bits - signs[start : start + _ROWS_AT_ONCE] @ signs.T) / 2
        for row, column in (differing <= distance).nonzero().tolist():
            if column > row + start:
                yield numbers[row + start], numbers[column], int(differing[row, column])
