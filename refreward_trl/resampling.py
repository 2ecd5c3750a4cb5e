"""The two resamplers that the whole package agrees on: bicubic up and anti-aliased bicubic down.

They define what "consistent with the LR image" means, so training anchors, rewards and evaluation must share them.
Behind them: the same anti-aliased bicubic filter to any size, window by window, for images that are never whole in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Window = Callable[[int, int, int, int], Tensor]

_BLOCK = 512
"""Output rows or columns that are resized at once."""


def upscale(image: Tensor, scale: int) -> Tensor:
    """Bicubic `(B, 3, h, w)` -> `(B, 3, h * scale, w * scale)`, clamped to [0, 1] because bicubic overshoots."""
    return F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False).clamp(0, 1)


def downscale(image: Tensor, scale: int) -> Tensor:
    """Anti-aliased bicubic `(B, 3, H, W)` -> `(B, 3, H / scale, W / scale)`, differentiable, not clamped."""
    height, width = image.shape[-2] // scale, image.shape[-1] // scale
    return F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False, antialias=True)


def resize_window(
    window: Window, size: tuple[int, int], target: tuple[int, int], rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """Returns a window of a resized image without resizing, or reading, the rest.

    Args:
        window: Reads the image: (top, bottom, left, right) -> `(c, bottom - top, right - left)`, float.
        size: (height, width) of the image.
        target: (height, width) of the resized image; larger or smaller.
        rows: First row of the window, and the one behind its last.
        columns: First column of the window, and the one behind its last.

    Returns:
        `(c, rows, columns)`, not clamped: what `F.interpolate(antialias=True)` gives there, up to rounding.
    """
    top, vertical = _taps(size[0], target[0], *rows)
    bands = []
    for start in range(columns[0], columns[1], _BLOCK):
        left, horizontal = _taps(size[1], target[1], start, min(start + _BLOCK, columns[1]))
        part = window(top, top + vertical.shape[1], left, left + horizontal.shape[1])
        bands.append(vertical @ (part @ horizontal.T))
    return torch.cat(bands, -1)


def resize_rows(strips: Iterable[Tensor], size: tuple[int, int], target: tuple[int, int]) -> Iterator[Tensor]:
    """Resizes an image that comes, and goes, as strips of rows from top to bottom.

    Args:
        strips: `(c, n, w)` each, any n; together `size`.
        size: (height, width) that comes.
        target: (height, width) that goes.

    Yields:
        `(c, n, target width)`, not clamped.
    """
    source = iter(strips)
    first, held = 0, next(source)
    step = max(1, min(_BLOCK, held.shape[1] * target[0] // size[0]))
    for start in range(0, target[0], step):
        stop = min(start + step, target[0])
        top, vertical = _taps(size[0], target[0], start, stop)
        while first + held.shape[1] < top + vertical.shape[1]:
            held = torch.cat([held[:, max(0, top - first) :], next(source)], 1)
            first = max(first, top)
        part = vertical @ held[:, top - first : top - first + vertical.shape[1]]
        yield _resize_columns(part, target[1])
    # Let the maker of the strips come to its end.
    for _ in source:
        pass


def _resize_columns(rows: Tensor, width: int) -> Tensor:
    if rows.shape[-1] == width:
        return rows
    return F.interpolate(rows[None], (rows.shape[-2], width), mode="bicubic", align_corners=False, antialias=True)[0]


def _taps(size: int, target: int, start: int, stop: int) -> tuple[int, Tensor]:
    """Returns the first pixel of a line that outputs `start` to `stop` draw on, and their weights `(outputs, pixels)`.

    Keys' cubic with a = -0.5, widened by the factor of a reduction; weights add up to 1 at the borders too.
    """
    if size == target:
        return start, torch.eye(stop - start)
    factor = size / target
    width = max(factor, 1.0)
    centres = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * factor
    first = max(0, math.floor(float(centres[0]) - 2 * width))
    last = min(size, math.ceil(float(centres[-1]) + 2 * width))
    weights = _cubic((torch.arange(first, last) + 0.5 - centres[:, None]) / width)
    return first, (weights / weights.sum(1, keepdim=True)).float()


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
