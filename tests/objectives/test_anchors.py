from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.objectives.anchors import fidelity_anchor, lr_consistency_anchor, reference_anchor
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
