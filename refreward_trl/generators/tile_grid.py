"""Where tiles lie, and how much each of them counts in every place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

FADE = 6.0
"""Logarithm of how much more a tile counts than its neighbour where that one begins: a tile comes in unseen."""


@dataclass(frozen=True)
class Axis:
    """Tiles along one side of an image, in LR pixels.

    Attributes:
        size: Pixels of the image.
        length: Pixels of each tile; the last one may reach beyond the image, as the generator's padding does.
        starts: Where the tiles begin: on multiples of the grid of latents, the last one ends with the padded image.
    """

    size: int
    length: int
    starts: tuple[int, ...]

    @property
    def padded(self) -> int:
        """Pixels of the image with its padding."""
        return self.starts[-1] + self.length

    def end(self, index: int) -> int:
        """Where a tile ends inside the image."""
        return min(self.starts[index] + self.length, self.size)

    def finished(self, count: int) -> int:
        """Pixels from the start that the first `count` tiles have settled."""
        return self.starts[count] if count < len(self.starts) else self.padded

    @cached_property
    def live(self) -> int:
        """Most pixels that lie between the start of a tile and the last one that must be known to compute it."""
        reach = []
        for start in self.starts:
            last = max(other for other in self.starts if other < start + self.length)
            reach.append(last + self.length - start)
        return max(reach)

    @cached_property
    def overlap(self) -> int:
        """Fewest pixels that neighbours share."""
        return min((first + self.length - second for first, second in pairwise(self.starts)), default=0)


def place(size: int, length: int, overlap: int, step: int) -> Axis:
    """Spreads as few tiles as possible evenly over a side.

    Args:
        size: Pixels of the side.
        length: Pixels of a tile; rounded down to a multiple of `step`, but at least one.
        overlap: Pixels that neighbours share at least; rounded up to a multiple of `step`.
        step: What tiles begin on multiples of.
    """
    padded = math.ceil(size / step) * step
    length = max(length // step, 1) * step
    if padded <= length:
        return Axis(size, padded, (0,))
    overlap = min(math.ceil(overlap / step) * step, length - step)
    count = math.ceil((padded - overlap) / (length - overlap))
    room = (padded - length) // step
    return Axis(size, length, tuple(index * room // (count - 1) * step for index in range(count)))


class LineWeights:
    """What tiles count along one side, in pixels of a stage.

    Gaussian, so narrow that a tile counts next to nothing where it begins.

    Args:
        axis: The tiles.
        ratio: Pixels of the stage per LR pixel.
    """

    def __init__(self, axis: Axis, ratio: Fraction) -> None:
        length = int(axis.length * ratio)
        shared = min(max(axis.overlap / axis.length, 0.02), 0.5)
        place = (torch.arange(length, dtype=torch.float64) + 0.5) / length - 0.5
        self.own = torch.exp(-place.square() * FADE / (shared * (1 - shared)))
        self.before: list[Tensor] = []
        self.total = torch.zeros(int(axis.padded * ratio), dtype=torch.float64)
        self.spans = [slice(int(start * ratio), int(start * ratio) + length) for start in axis.starts]
        for span in self.spans:
            self.before.append(self.total[span].clone())
            self.total[span] += self.own


def share(rows: LineWeights, columns: LineWeights, row: int, column: int) -> Tensor:
    """Returns how much of the blend of all tiles so far is the tile's, `(h, w)` float32: 1 where it is the first.

    Tiles come row by row. Moving a running mean by this share is exact for tiles that agree: their difference is 0.
    """
    own = rows.own[:, None] * columns.own
    earlier_rows = rows.before[row][:, None] * columns.total[columns.spans[column]]
    return (own / (earlier_rows + rows.own[:, None] * (columns.before[column] + columns.own))).float()


class BlendedRows:
    """The rows of an image that tiles are blended into, of which only those still needed are held.

    A ring: a row takes the place of the one `capacity` rows above it.

    Args:
        rows: Weights down the image.
        columns: Weights across it.
        channels: Of the image.
        capacity: Rows to hold.
    """

    def __init__(self, rows: LineWeights, columns: LineWeights, channels: int, capacity: int) -> None:
        self._rows = rows
        self._columns = columns
        self._capacity = min(capacity, len(rows.total))
        self._ring = torch.zeros(channels, self._capacity, len(columns.total))

    def add(self, row: int, column: int, tile: Tensor) -> None:
        """Blends in a tile `(c, h, w)`; it may be smaller than the others at the bottom and the right."""
        height, width = tile.shape[-2:]
        weight = share(self._rows, self._columns, row, column)[:height, :width]
        left = self._columns.spans[column].start
        top = self._rows.spans[row].start
        for there, here in self._pieces(top, top + height):
            self._ring[:, there, left : left + width].lerp_(tile[:, here], weight[here])

    def read(self, top: int, bottom: int, left: int = 0, right: int | None = None) -> Tensor:
        """Returns a copy of a window `(c, bottom - top, right - left)`; its rows must still be there."""
        parts = [self._ring[:, there, left:right] for there, _ in self._pieces(top, bottom)]
        return torch.cat(parts, 1)

    def _pieces(self, top: int, bottom: int) -> list[tuple[slice, slice]]:
        """Returns where rows lie in the ring, and which of the rows asked for they are: one piece or two."""
        first, count = top % self._capacity, bottom - top
        head = min(count, self._capacity - first)
        pieces = [(slice(first, first + head), slice(0, head))]
        if head < count:
            pieces.append((slice(0, count - head), slice(head, count)))
        return pieces
