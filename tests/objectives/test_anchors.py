from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.objectives.anchors import (
    ALONG_WEIGHT,
    LEAST_LR_ERROR,
    fidelity_anchor,
    lr_consistency_anchor,
    lr_drift_anchor,
    reference_anchor,
)
from refreward_trl.resampling import downscale


def image(seed: int = 0) -> Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("anchor", [reference_anchor, fidelity_anchor])
def test_is_zero_at_the_target_and_the_mean_difference_away_from_it(anchor) -> None:
    assert anchor(image(), image()) == 0
    torch.testing.assert_close(anchor(image() + 0.1, image()), torch.tensor(0.1))


def test_lr_consistency_is_zero_for_the_downscaled_image() -> None:
    assert lr_consistency_anchor(image(), downscale(image(), 4)) == 0
    torch.testing.assert_close(lr_consistency_anchor(image() + 0.1, downscale(image(), 4)), torch.tensor(0.1))


def test_lr_consistency_leaves_fine_detail_free() -> None:
    checker = (torch.arange(16)[:, None] + torch.arange(24)).remainder(2).float().sub(0.5) * 0.2
    changed = image() + checker
    assert reference_anchor(changed, image()) > 0.09
    assert lr_consistency_anchor(changed, downscale(image(), 4)) < 0.02


def test_lr_drift_counts_in_units_of_each_images_own_lr_error() -> None:
    reference = image()
    errors = torch.tensor([0.02, 0.2]).view(2, 1, 1, 1)
    lr_image = downscale(reference, 4) + errors
    drifted = reference + errors * 0.5
    expected = torch.tensor(0.25 + ALONG_WEIGHT * math.log(4))
    torch.testing.assert_close(lr_drift_anchor(drifted, reference, lr_image), expected)
    assert lr_drift_anchor(reference, reference, lr_image) == 0


def test_lr_drift_does_not_explode_where_the_reference_is_exact() -> None:
    reference = image()
    drift = lr_drift_anchor(reference + 0.01, reference, downscale(reference, 4))
    growth = 1e-4 / LEAST_LR_ERROR
    torch.testing.assert_close(drift, torch.tensor(growth + ALONG_WEIGHT * math.log(growth)))


@pytest.mark.parametrize("direction", [1, -1])
def test_lr_drift_sees_the_smallest_change_of_the_lr_error(direction: int) -> None:
    reference = image()
    error = 0.1 * torch.ones(2, 3, 1, 1)
    lr_image = downscale(reference, 4) - error
    for amplitude in (1e-2, 1e-3):
        drift = lr_drift_anchor(reference + direction * amplitude * error, reference, lr_image)
        assert drift == pytest.approx(2 * ALONG_WEIGHT * amplitude, rel=0.1)


def test_lr_drift_bounds_the_growth_of_the_lr_error() -> None:
    generator = torch.Generator().manual_seed(5)
    reference = image()[:1]
    lr_image = downscale(reference, 4) + 0.05 * torch.randn(1, 3, 4, 6, generator=generator)
    changed = reference + 0.02 * torch.randn(reference.shape, generator=generator)
    before, after = ((downscale(each, 4) - lr_image).square().mean().sqrt() for each in (reference, changed))
    assert after / before <= 1 + lr_drift_anchor(changed, reference, lr_image).sqrt()  # triangle inequality


@pytest.mark.parametrize(
    ("anchor", "target"), [(reference_anchor, image(1)), (lr_consistency_anchor, downscale(image(1), 4))]
)
def test_gradient_goes_to_the_image_alone(anchor, target: Tensor) -> None:
    sr_image, target = image().requires_grad_(), target.requires_grad_()
    anchor(sr_image, target).backward()
    assert sr_image.grad.abs().sum() > 0
    assert target.grad is None


def test_images_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(DataError, match="cannot compare"):
        reference_anchor(image(), image()[:1])
    with pytest.raises(DataError, match="size"):
        lr_consistency_anchor(image(), torch.rand(2, 3, 4, 5))
    with pytest.raises(DataError, match="cannot compare"):
        lr_drift_anchor(image(), image()[:1], downscale(image(), 4))
    with pytest.raises(DataError, match="size"):
        lr_drift_anchor(image(), image(), torch.rand(2, 3, 4, 5))
