"""Windows and strips of a resized image are what resizing the whole image gives there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refreward_trl.resampling import resize_rows, resize_window

SIZES = [(60, 44), (15, 11), (31, 23), (7, 90), (30, 22), (1, 1), (1200, 5)]


def image() -> Tensor:
    return torch.rand(3, 30, 22, generator=torch.Generator().manual_seed(0))


def whole(target: tuple[int, int]) -> Tensor:
    return F.interpolate(image()[None], size=target, mode="bicubic", align_corners=False, antialias=True)[0]


def window(top: int, bottom: int, left: int, right: int) -> Tensor:
    return image()[:, top:bottom, left:right]


@pytest.mark.parametrize("target", SIZES)
def test_windows_are_parts_of_the_whole(target):
    rows, columns = (target[0] // 3, target[0]), (target[1] // 4, max(1, target[1] * 3 // 4))
    found = resize_window(window, (30, 22), target, rows, columns)
    expected = whole(target)[:, slice(*rows), slice(*columns)]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_a_window_reads_only_what_it_needs():
    read = []

    def spy(top: int, bottom: int, left: int, right: int) -> Tensor:
        read.append((bottom - top, right - left))
        return window(top, bottom, left, right)

    resize_window(spy, (30, 22), (120, 88), (40, 48), (40, 48))
    assert max(map(max, read)) <= 8


@pytest.mark.parametrize("count", [1, 7, 30])
@pytest.mark.parametrize("target", SIZES)
def test_strips_together_are_the_whole(target, count):
    strips = list(resize_rows(image().split(count, 1), (30, 22), target))
    torch.testing.assert_close(torch.cat(strips, 1), whole(target), rtol=0, atol=2e-5)


def test_the_maker_of_the_strips_comes_to_its_end():
    ended = []

    def strips():
        yield from image().split(10, 1)
        ended.append(True)

    list(resize_rows(strips(), (30, 22), (3, 3)))
    assert ended
