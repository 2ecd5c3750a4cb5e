"""Input noise as a function of the place, so that tiles that share pixels share their noise."""

from __future__ import annotations

import torch
from torch import Tensor

from refreward_trl.randomness import stateless_generator

BLOCK = 64


class NoiseField:
    """Standard normal noise over a plane without an end. Any window of it is made when it is asked for.

    Args:
        seed: Of the field.
        channels: Of the noise.
    """

    def __init__(self, seed: int, channels: int) -> None:
        self.seed = seed
        self.channels = channels

    def window(self, top: int, left: int, height: int, width: int) -> Tensor:
        """Returns the noise of a window, `(channels, height, width)` float32."""
        noise = torch.empty(self.channels, height, width)
        for y in range(top // BLOCK * BLOCK, top + height, BLOCK):
            for x in range(left // BLOCK * BLOCK, left + width, BLOCK):
                rows = slice(max(y, top), min(y + BLOCK, top + height))
                columns = slice(max(x, left), min(x + BLOCK, left + width))
                block = self._block(y // BLOCK, x // BLOCK)
                noise[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left] = block[
                    :, rows.start - y : rows.stop - y, columns.start - x : columns.stop - x
                ]
        return noise

    def _block(self, row: int, column: int) -> Tensor:
        generator = stateless_generator(self.seed, "tiled_input_noise", row, column)
        return torch.randn(self.channels, BLOCK, BLOCK, generator=generator)
