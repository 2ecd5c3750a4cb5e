from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refreward_trl.generators.color_fix import COLOR_FIXES


def image(seed: int = 0, size: int = 24) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", COLOR_FIXES)
def test_an_image_that_is_its_source_stays(name: str) -> None:
    torch.testing.assert_close(COLOR_FIXES[name](image(), image()), image(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adain", "wavelet"])
def test_a_constant_colour_shift_is_removed(name: str) -> None:
    shifted = image() + torch.tensor([0.2, -0.1, 0.05])[:, None, None]
    torch.testing.assert_close(COLOR_FIXES[name](shifted, image()), image(), rtol=1e-4, atol=1e-4)


def test_adain_takes_mean_and_standard_deviation_of_each_channel() -> None:
    source = 0.5 * image(1) + 0.1
    fixed = COLOR_FIXES["adain"](image(), source)
    torch.testing.assert_close(fixed.mean((-2, -1)), source.mean((-2, -1)))
    torch.testing.assert_close(fixed.std((-2, -1)), source.std((-2, -1)), rtol=1e-3, atol=1e-3)


def test_wavelet_keeps_fine_detail_and_replaces_a_slow_gradient() -> None:
    size = 128
    checker = (torch.arange(size)[:, None] + torch.arange(size)).remainder(2).float() * 0.1
    slope = torch.linspace(0, 0.5, size).expand(size, size)
    source = torch.full((1, 3, size, size), 0.4)
    fixed = COLOR_FIXES["wavelet"]((checker + slope).expand(1, 3, size, size), source)
    inner = fixed[0, 0, 48:80, 48:80]
    torch.testing.assert_close(inner[::2, ::2] - inner[::2, 1::2], torch.full((16, 16), -0.1), rtol=0, atol=0.02)
    assert inner.mean().sub(0.4).abs() < 0.01


@pytest.mark.parametrize("name", COLOR_FIXES)
def test_fixes_are_differentiable_even_for_flat_images_and_not_clamped(name: str) -> None:
    flat = torch.full((1, 3, 4, 4), 1.5, requires_grad=True)
    fixed = COLOR_FIXES[name](flat, torch.full((1, 3, 4, 4), 1.2))
    fixed.sum().backward()
    assert flat.grad.isfinite().all()
    assert fixed.max() > 1
