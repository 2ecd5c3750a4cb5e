"""The colour fixes of `color_fix`, for images whose rows come from top to bottom and are never whole in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from refreward_trl.generators.color_fix import COLOR_FIXES, WAVELET_LEVELS

CHUNK = 128
"""Rows that are fixed at once."""

REACH = 2**WAVELET_LEVELS - 1
"""Pixels up and down that a pixel of the wavelet fix depends on."""

FixRows = Callable[["Rows", "Rows", Path], Iterator[Tensor]]


class Rows(Protocol):
    """An image that gives rows, each request at or below the one before it, but for `REACH + CHUNK` rows."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        ...

    def rows(self, top: int, bottom: int) -> Tensor:
        """Returns `(3, bottom - top, width)`, float32."""
        ...


def fix_nothing(image: Rows, source: Rows, scratch: Path) -> Iterator[Tensor]:
    """Yields the rows of `image` as they are."""
    for top, bottom in _chunks(image.size[0]):
        yield image.rows(top, bottom)


def fix_wavelet(image: Rows, source: Rows, scratch: Path) -> Iterator[Tensor]:
    """Yields the rows of `wavelet_fix(image, source)`: each chunk is fixed with the rows that it depends on."""
    height = image.size[0]
    for top, bottom in _chunks(height):
        first, last = max(0, top - REACH), min(height, bottom + REACH)
        fixed = COLOR_FIXES["wavelet"](image.rows(first, last)[None], source.rows(first, last)[None])[0]
        yield fixed[:, top - first : bottom - first]


def fix_adain(image: Rows, source: Rows, scratch: Path) -> Iterator[Tensor]:
    """Yields the rows of `adain_fix(image, source)`, which needs the statistics of the whole image before its first
    row: meanwhile the rows lie in a nameless file in `scratch`, 12 bytes per pixel."""
    height, width = image.size
    mine, its = _Moments(), _Moments()
    with tempfile.TemporaryFile(dir=scratch) as file:
        for top, bottom in _chunks(height):
            rows = image.rows(top, bottom)
            mine.add(rows)
            its.add(source.rows(top, bottom))
            file.write(rows.numpy().tobytes())
        file.seek(0)
        for top, bottom in _chunks(height):
            stored = np.frombuffer(bytearray(file.read(12 * width * (bottom - top))), np.float32)
            rows = torch.from_numpy(stored).view(3, bottom - top, width)
            yield (rows - mine.mean) / mine.std * its.std + its.mean


FIX_ROWS: dict[str, FixRows] = {"none": fix_nothing, "adain": fix_adain, "wavelet": fix_wavelet}
"""Name in a config -> fix."""


class _Moments:
    """Mean and standard deviation of each channel, gathered strip by strip in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = torch.zeros(3, dtype=torch.float64)
        self._squares = torch.zeros(3, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        # Around a half, so that little is lost in the difference of the two sums.
        centred = rows.double() - 0.5
        self._count += rows[0].numel()
        self._sum += centred.sum((1, 2))
        self._squares += centred.square().sum((1, 2))

    @property
    def mean(self) -> Tensor:
        return (self._sum / self._count + 0.5).float()[:, None, None]

    @property
    def std(self) -> Tensor:
        """Of a sample, with the epsilon of `color_fix`."""
        variance = (self._squares - self._sum.square() / self._count) / (self._count - 1)
        return (variance + 1e-5).sqrt().float()[:, None, None]


def _chunks(height: int) -> Iterator[tuple[int, int]]:
    for top in range(0, height, CHUNK):
        yield top, min(top + CHUNK, height)
