"""Fidelity rewards against scikit-image, and the reward contract on images of every kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from refreward_trl.data.images import to_pil
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.resampling import downscale
from refreward_trl.rewards.fidelity import LRConsistency, image_psnr, image_ssim, psnr, ssim


def images(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_pair(seed: int, height: int = 40, width: int = 56) -> tuple[torch.Tensor, torch.Tensor]:
    coarse = images(seed, 2, 3, height // 8, width // 8)
    target = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (target + 0.1 * images(seed + 1, *target.shape) - 0.05).clamp(0, 1), target


def test_psnr_equals_scikit_image():
    noisy, clean = smooth_pair(0)
    expected = [
        peak_signal_noise_ratio(b.double().numpy(), a.double().numpy(), data_range=1)
        for a, b in zip(noisy, clean, strict=True)
    ]
    assert image_psnr(noisy, clean).tolist() == pytest.approx(expected, abs=1e-3)


def test_ssim_equals_scikit_image():
    noisy, clean = smooth_pair(2)
    expected = [
        structural_similarity(
            a.double().numpy(),
            b.double().numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=0,
        )
        for a, b in zip(noisy, clean, strict=True)
    ]
    assert image_ssim(noisy, clean).tolist() == pytest.approx(expected, abs=1e-4)
    assert image_ssim(clean, clean).tolist() == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize("metric", [image_psnr, image_ssim])
def test_metrics_rise_along_their_gradient(metric):
    noisy, clean = smooth_pair(4)
    noisy.requires_grad_()
    before = metric(noisy, clean)
    (gradient,) = torch.autograd.grad(before.sum(), noisy)
    step = 1e-2 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert (metric(noisy + step, clean) > before).all()


@pytest.mark.parametrize("metric", [image_psnr, image_ssim])
def test_gradient_is_finite_where_images_are_equal(metric):
    _, clean = smooth_pair(6)
    image = clean.clone().requires_grad_()
    metric(image, clean).sum().backward()
    assert image.grad.isfinite().all()


def test_lr_consistency_is_capped_and_ranks_by_consistency():
    sr_image = images(0, 3, 3, 32, 24)
    lr_image = downscale(sr_image, 4)
    lr_image[1] += 0.01
    lr_image[2] += 0.1
    rewards = LRConsistency()(completions=sr_image, lr_image=lr_image.clamp(0, 1), prompts=None)
    assert rewards[0] == pytest.approx(60, abs=1e-3)
    assert rewards[0] > rewards[1] > rewards[2]
    assert LRConsistency(cap=30)(completions=sr_image[:1], lr_image=lr_image[:1]) == pytest.approx([30], abs=1e-3)


def test_lr_consistency_reads_the_factor_from_the_sizes():
    for scale in (2, 3, 4):
        sr_image = images(scale, 1, 3, 8 * scale, 12 * scale)
        (reward,) = LRConsistency()(completions=sr_image, lr_image=downscale(sr_image, scale).clamp(0, 1))
        assert reward > 55


def test_one_call_may_mix_scales():
    sr_image = images(0, 2, 3, 24, 48)
    lr_image = [downscale(sr_image[:1], 2)[0].clamp(0, 1), downscale(sr_image[1:], 4)[0].clamp(0, 1)]
    assert min(LRConsistency()(completions=sr_image, lr_image=lr_image)) > 55


REWARDS = [LRConsistency(), psnr, ssim]


@pytest.mark.parametrize("reward", REWARDS)
def test_a_graph_is_returned_only_for_images_that_require_grad(reward):
    sr_image, hr_image = smooth_pair(0, 32, 32)
    columns = {"prompts": ["", ""], "lr_image": downscale(hr_image, 4).clamp(0, 1), "hr_image": hr_image}
    plain = reward(completions=sr_image, **columns)
    assert [type(value) for value in plain] == [float, float]
    with_graph = reward(completions=sr_image.clone().requires_grad_(), **columns)
    assert with_graph.requires_grad and with_graph.shape == (2,)
    assert with_graph.tolist() == pytest.approx(plain, rel=1e-6)
    one_of_two = [sr_image[0], sr_image[1].clone().requires_grad_()]
    assert reward(completions=one_of_two, **columns).requires_grad
    with torch.no_grad():
        assert reward(completions=sr_image.clone().requires_grad_(), **columns) == plain


@pytest.mark.parametrize("reward", REWARDS)
def test_every_kind_of_image_gives_the_same_value(reward, tmp_path):
    sizes = [(32, 32), (48, 32), (32, 32)]
    sr = [(images(i, 3, *size) * 255).round().to(torch.uint8) for i, size in enumerate(sizes)]
    hr = [(images(i + 9, 3, *size) * 255).round().to(torch.uint8) for i, size in enumerate(sizes)]
    lr = [
        (images(i + 19, 3, size[0] // 4, size[1] // 4) * 255).round().to(torch.uint8) for i, size in enumerate(sizes)
    ]
    expected = reward(prompts=[""] * 3, completions=sr, lr_image=lr, hr_image=hr)
    floats = {
        "completions": [image / 255 for image in sr],
        "lr_image": [image / 255 for image in lr],
        "hr_image": [image / 255 for image in hr],
    }
    pils = {"completions": map(to_pil, sr), "lr_image": map(to_pil, lr), "hr_image": map(to_pil, hr)}
    assert reward(prompts=None, **floats) == expected
    assert reward(prompts=None, **{column: list(values) for column, values in pils.items()}) == expected
    # Order survives the grouping by size.
    one_by_one = [
        reward(prompts=None, completions=[s], lr_image=[x], hr_image=[h])[0]
        for s, x, h in zip(sr, lr, hr, strict=True)
    ]
    assert one_by_one == pytest.approx(expected, rel=1e-6)


def test_a_row_without_an_image_is_not_scored():
    sr_image, hr_image = smooth_pair(0, 32, 32)
    lr_image = downscale(hr_image, 4).clamp(0, 1)
    assert psnr(completions=list(sr_image), hr_image=[None, hr_image[1]])[0] is None
    assert LRConsistency()(completions=[None, sr_image[1]], lr_image=lr_image)[0] is None
    graph = psnr(completions=[None, sr_image[1].clone().requires_grad_()], hr_image=hr_image).detach()
    assert math.isnan(graph[0]) and graph[1].isfinite()


def bad_calls():
    sr_image, hr_image = smooth_pair(0, 32, 32)
    lr_image = downscale(hr_image, 4).clamp(0, 1)
    lr_reward = LRConsistency()
    broken = sr_image.clone()
    broken[1, 0, 3, 3] = torch.nan
    ids = ["fox@0", "elk@0"]
    return {
        "no hr column": (psnr, {"completions": sr_image, "lr_image": lr_image}, "hr_image"),
        "hr of another size": (ssim, {"completions": sr_image, "hr_image": hr_image[..., :30]}, "30"),
        "image below the window": (ssim, {"completions": sr_image[..., :8], "hr_image": hr_image[..., :8]}, "11x11"),
        "no whole multiple": (lr_reward, {"completions": sr_image, "lr_image": lr_image[..., :7]}, "whole multiple"),
        "not upscaled": (lr_reward, {"completions": sr_image, "lr_image": sr_image}, "whole multiple"),
        "swapped": (lr_reward, {"completions": lr_image, "lr_image": sr_image}, "whole multiple"),
        "no lr image": (lr_reward, {"completions": sr_image, "lr_image": [lr_image[0], None]}, "lr_image"),
        "too few lr images": (lr_reward, {"completions": sr_image, "lr_image": lr_image[:1]}, "1 images for 2"),
        "NaN pixel": (psnr, {"completions": broken, "hr_image": hr_image, "sample_id": ids}, "elk@0"),
        "values up to 255": (psnr, {"completions": sr_image * 255, "hr_image": hr_image, "sample_id": ids}, "fox@0"),
        "values from -1": (psnr, {"completions": sr_image * 2 - 1, "hr_image": hr_image}, r"\[0, 1\]"),
        "channels last": (psnr, {"completions": sr_image.permute(0, 2, 3, 1), "hr_image": hr_image}, "(3, H, W)"),
        "no pixels": (psnr, {"completions": sr_image[..., :0], "hr_image": hr_image[..., :0]}, "(3, 32, 0)"),
        "integers": (psnr, {"completions": (sr_image * 255).long(), "hr_image": hr_image}, "int64"),
        "numpy": (psnr, {"completions": [np.zeros((3, 32, 32))] * 2, "hr_image": hr_image}, "ndarray"),
        "a mapping": (psnr, {"completions": {}, "hr_image": hr_image}, "dict"),
        "no such file": (psnr, {"completions": ["nowhere.png"] * 2, "hr_image": hr_image}, "nowhere.png"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_images_are_refused_by_name(case):
    reward, arguments, message = bad_calls()[case]
    with pytest.raises(DataError, match=message):
        reward(prompts=["", ""], **{"lr_image": None} | arguments)


@pytest.mark.parametrize("cap", [0, -3, math.inf, math.nan])
def test_lr_consistency_refuses_a_senseless_cap(cap):
    with pytest.raises(ConfigError, match="cap"):
        LRConsistency(cap=cap)
