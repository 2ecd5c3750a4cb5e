from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from refreward_trl.generators.tile_grid import Axis, BlendedRows, LineWeights, place, share


@pytest.mark.parametrize("step", [1, 2, 16])
@pytest.mark.parametrize("overlap", [0, 5, 16, 31])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 100, 257, 1024])
def test_tiles_cover_the_side_and_share_enough(size, overlap, step):
    axis = place(size, 32, overlap, step)
    assert axis.starts[0] == 0 and axis.padded >= size > axis.padded - step
    assert all(start % step == 0 for start in axis.starts) and axis.length % step == 0
    shared = [first + axis.length - second for first, second in pairwise(axis.starts)]
    assert all(pixels >= min(overlap, axis.length - step) for pixels in shared)
    assert axis.length == 32 or len(axis.starts) == 1


def test_what_fits_is_one_tile():
    assert place(31, 32, 8, 2) == Axis(31, 32, (0,))
    assert len(place(33, 32, 8, 2).starts) == 2


def test_a_tile_counts_next_to_nothing_where_it_begins_and_all_where_it_is_alone():
    axis = place(96, 32, 8, 1)
    weights = LineWeights(axis, Fraction(4))
    fraction = share(weights, weights, 0, 1)
    first = axis.starts[1] * 4 - axis.starts[0] * 4
    assert fraction[40, 0] < 0.01
    assert torch.equal(fraction[:, 128 - first :], torch.ones(128, first))


def blend(axis_rows: Axis, axis_columns: Axis, image: Tensor, capacity: int) -> Tensor:
    """Cuts an image into its tiles, blends them, and reads the rows as soon as they are settled."""
    ratio = Fraction(2)
    blended = BlendedRows(LineWeights(axis_rows, ratio), LineWeights(axis_columns, ratio), 3, capacity)
    strips, settled = [], 0
    for row, top in enumerate(axis_rows.starts):
        for column, left in enumerate(axis_columns.starts):
            bottom, right = top + axis_rows.length, left + axis_columns.length
            blended.add(row, column, image[:, 2 * top : 2 * bottom, 2 * left : 2 * right])
        done = 2 * axis_rows.finished(row + 1)
        strips.append(blended.read(settled, done, 0, 2 * axis_columns.size))
        settled = done
    return torch.cat(strips, 1)


@pytest.mark.parametrize("overlap", [0, 3, 8, 20, 27])
def test_tiles_that_agree_are_blended_exactly(overlap):
    rows, columns = place(101, 30, overlap, 1), place(75, 30, overlap, 1)
    image = torch.rand(3, 202, 150, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blend(rows, columns, image, 60), image)


def test_a_ring_of_the_live_rows_is_enough_and_one_less_is_not():
    rows, columns = place(200, 32, 8, 1), place(32, 32, 8, 1)
    assert rows.live < 64
    image = torch.rand(3, 400, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blend(rows, columns, image, 64), image)
    assert not torch.equal(blend(rows, columns, image, 63), image)


def test_the_blend_is_the_weighted_mean():
    axis = place(40, 16, 8, 1)
    weights = LineWeights(axis, Fraction(1))
    blended = BlendedRows(weights, weights, 1, 40)
    generator = torch.Generator().manual_seed(0)
    total, norm = torch.zeros(40, 40, dtype=torch.float64), torch.zeros(40, 40, dtype=torch.float64)
    for row, top in enumerate(axis.starts):
        for column, left in enumerate(axis.starts):
            tile = torch.rand(1, 16, 16, generator=generator)
            blended.add(row, column, tile)
            weight = torch.outer(weights.own, weights.own)
            total[top : top + 16, left : left + 16] += weight * tile[0]
            norm[top : top + 16, left : left + 16] += weight
    torch.testing.assert_close(blended.read(0, 40)[0], (total / norm).float(), rtol=0, atol=1e-6)
