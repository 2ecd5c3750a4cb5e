from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from refreward_trl.generators.color_fix import COLOR_FIXES
from refreward_trl.generators.streamed_color_fix import CHUNK, FIX_ROWS, REACH


class Strict:
    """An image whose rows are gone once a request has passed them by more than the fixes promise."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels
        self.asked = 0

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def rows(self, top: int, bottom: int) -> Tensor:
        assert top >= self.asked - REACH - CHUNK
        self.asked = max(self.asked, bottom)
        return self.pixels[:, top:bottom]


def image(seed: int, height: int) -> Tensor:
    return torch.rand(3, height, 50, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.1


@pytest.mark.parametrize("height", [1, 5, CHUNK, CHUNK + 1, 400])
@pytest.mark.parametrize("name", COLOR_FIXES)
def test_rows_are_those_of_the_whole_image(name, height, tmp_path):
    mine, source = image(0, height), image(1, height).square()
    found = torch.cat(list(FIX_ROWS[name](Strict(mine), Strict(source), tmp_path)), 1)
    expected = COLOR_FIXES[name](mine[None], source[None])[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_adain_leaves_no_file_behind(tmp_path: Path):
    rows = FIX_ROWS["adain"](Strict(image(0, 300)), Strict(image(1, 300)), tmp_path)
    next(rows)
    assert not list(tmp_path.iterdir())


def test_every_fix_has_its_streamed_twin():
    assert FIX_ROWS.keys() == COLOR_FIXES.keys()
