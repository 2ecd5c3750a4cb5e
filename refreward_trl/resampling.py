"""The two resamplers that the whole package agrees on: bicubic up and anti-aliased bicubic down.

They define what "consistent with the LR image" means, so training anchors, rewards and evaluation must share them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def upscale(image: Tensor, scale: int) -> Tensor:
    """Bicubic `(B, 3, h, w)` -> `(B, 3, h * scale, w * scale)`, clamped to [0, 1] because bicubic overshoots."""
    return F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False).clamp(0, 1)


def downscale(image: Tensor, scale: int) -> Tensor:
    """Anti-aliased bicubic `(B, 3, H, W)` -> `(B, 3, H / scale, W / scale)`, differentiable, not clamped."""
    height, width = image.shape[-2] // scale, image.shape[-1] // scale
    return F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
