from __future__ import annotations

import pytest
import torch

from refreward_trl.objectives.reconstruction import gradient_loss, log_mse_loss
from refreward_trl.rewards.fidelity import image_psnr


def images(deviations: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(len(deviations), 3, 16, 16, generator=generator)
    noise = torch.randn(target.shape, generator=generator)
    return target + torch.tensor(deviations).view(-1, 1, 1, 1) * noise, target


def test_without_a_floor_the_log_loss_is_the_mean_psnr() -> None:
    image, target = images([0.02, 0.1, 0.3])
    expected = -image_psnr(image, target).mean() * 0.1 * torch.tensor(10.0).log() / 10
    torch.testing.assert_close(log_mse_loss(image, target, floor=0.0), expected)


def test_images_of_any_error_get_the_same_relative_gradient_down_to_the_floor() -> None:
    image, target = images([0.1, 0.3, 0.001])
    image.requires_grad_()
    log_mse_loss(image, target).backward()
    assert image.grad is not None
    # How much the loss falls when the error of one image shrinks by a share.
    shares = (image.grad * (image - target)).sum(dim=(1, 2, 3)).detach()
    assert shares[0] == pytest.approx(float(shares[1]), rel=0.2)
    assert shares[2] < 1e-3 * shares[1]


def test_gradient_loss_sees_edges_and_no_brightness() -> None:
    _, target = images([0.0])
    assert gradient_loss(target + 0.2, target) < 1e-6
    blurred = target.mean(dim=-1, keepdim=True).expand_as(target)
    assert gradient_loss(blurred, target) > 0.1
