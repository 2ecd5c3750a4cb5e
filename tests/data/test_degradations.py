"""Degradations: pure functions of the image, the preset and the generator, inside the presets' ranges."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from refreward_trl.data.degradations import (
    KERNEL_MIX,
    PRESETS,
    DegradationSettings,
    KernelSettings,
    NoiseSettings,
    StageSettings,
    apply_settings,
    blur_kernel,
    degrade,
    draw_settings,
)
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.randomness import stateless_generator
from refreward_trl.resampling import downscale

PLAIN = StageSettings(None, 1.0, "bilinear", NoiseSettings("gaussian", 0.0, gray=False), jpeg_quality=100)


def smooth_image(height: int = 64, width: int = 64) -> Tensor:
    """Ramps down, across and along the diagonal: any shift of the image changes its values."""
    y, x = torch.meshgrid(torch.linspace(0.2, 0.8, height), torch.linspace(0.2, 0.8, width), indexing="ij")
    return torch.stack([y, x, (y + x) / 2])


def busy_image(height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(3))


def draws(preset: str, count: int) -> list[DegradationSettings]:
    return [draw_settings(PRESETS[preset], stateless_generator(0, "test", index)) for index in range(count)]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_generator_is_the_only_source_of_randomness(preset: str) -> None:
    image, lr_images = busy_image(), []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        lr_images.append(degrade(image, preset, generator=stateless_generator(0, "degradation", "a", 0)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*lr_images)


@pytest.mark.parametrize("preset", PRESETS)
def test_another_seed_purpose_photo_or_draw_gives_another_lr_image(preset: str) -> None:
    keys = [(0, "degradation", "a", 0), (1, "degradation", "a", 0), (0, "test", "a", 0)]
    keys += [(0, "degradation", "b", 0), (0, "degradation", "a", 1)]
    lr_images = [degrade(busy_image(), preset, generator=stateless_generator(*key)).numpy().tobytes() for key in keys]
    assert len(set(lr_images)) == len(keys)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("height", "width", "scale"), [(4, 4, 4), (16, 24, 4), (64, 20, 2), (33, 66, 3), (128, 128, 4)]
)
def test_size_range_and_eight_bit_grid(preset: str, height: int, width: int, scale: int) -> None:
    image = busy_image(height, width)
    untouched = image.clone()
    for draw in range(4):
        lr_image = degrade(image, preset, generator=stateless_generator(0, "size", draw), scale=scale)
        assert lr_image.shape == (3, height // scale, width // scale)
        assert lr_image.dtype == torch.float32
        assert lr_image.min() >= 0 and lr_image.max() <= 1
        assert torch.equal((lr_image * 255).round() / 255, lr_image)
    assert torch.equal(image, untouched)


@pytest.mark.parametrize("name", ["realesrgan", "seesr", "stablesr"])
def test_drawn_settings_stay_inside_the_preset(name: str) -> None:
    stages = PRESETS[name].stages
    assert stages is not None
    for settings in draws(name, 400):
        for stage, preset in zip(settings.stages or (), stages, strict=False):
            assert preset.resize_range[0] <= stage.resize_factor <= preset.resize_range[1]
            assert preset.jpeg_quality[0] <= stage.jpeg_quality <= preset.jpeg_quality[1]
            low, high = preset.poisson_scale
            if stage.noise.kind == "gaussian":
                low, high = (limit / 255 for limit in preset.gaussian_sigma)
            assert low <= stage.noise.strength <= high
            if stage.kernel is None:
                assert preset.blur_prob < 1
            elif stage.kernel.kind == "sinc":
                assert math.pi / 5 <= stage.kernel.cutoff <= math.pi
            else:
                assert stage.kernel.size in preset.kernel_sizes
                assert preset.sigma[0] <= min(stage.kernel.sigma_x, stage.kernel.sigma_y)
                assert max(stage.kernel.sigma_x, stage.kernel.sigma_y) <= preset.sigma[1]
                plateau = stage.kernel.kind.startswith("plateau")
                low, high = preset.beta_plateau if plateau else preset.beta_generalized
                assert low <= stage.kernel.beta <= high


def test_drawn_settings_have_the_published_frequencies() -> None:
    count = 1200
    settings = [one for one in draws("realesrgan", count) if one.stages]
    first, second = [one.stages[0] for one in settings], [one.stages[1] for one in settings]

    def close(hits: int, share: float, total: int = count) -> bool:
        return abs(hits / total - share) < 4 * math.sqrt(share * (1 - share) / total)

    kinds = Counter(stage.kernel.kind for stage in first if stage.kernel)
    assert all(close(kinds[kind], 0.9 * share) for kind, share in KERNEL_MIX.items())
    assert close(kinds["sinc"], 0.1)
    assert close(sum(stage.resize_factor > 1 for stage in first), 0.2)
    assert close(sum(stage.resize_factor < 1 for stage in first), 0.7)
    assert close(sum(stage.resize_factor == 1 for stage in second), 0.3)
    assert close(sum(stage.kernel is not None for stage in second), 0.8)
    assert close(sum(stage.noise.kind == "gaussian" for stage in first), 0.5)
    assert close(sum(stage.noise.gray for stage in second), 0.4)
    assert close(sum(one.final_kernel is not None for one in settings), 0.8)
    assert close(sum(one.sinc_before_jpeg for one in settings), 0.5)
    assert all(close(hits, 1 / 3) for hits in Counter(stage.resize_mode for stage in first).values())
    assert {stage.jpeg_quality for stage in first} == set(range(30, 96))
    assert sum(one.stages is None for one in draws("stablesr", count)) in range(2, 30)


@pytest.mark.parametrize("kind", [*KERNEL_MIX, "sinc"])
@pytest.mark.parametrize("size", [7, 21])
def test_kernels_keep_brightness_and_place(kind: str, size: int) -> None:
    kernel = blur_kernel(KernelSettings(kind, size, 2.5, 0.7, rotation=0.4, beta=1.3, cutoff=1.5))  # type: ignore[arg-type]
    assert kernel.shape == (size, size)
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-6)
    assert kernel.argmax() == size * size // 2


def test_kernel_shapes() -> None:
    wide = blur_kernel(KernelSettings("aniso", 21, 3.0, 0.5, rotation=0.0))
    assert wide[10, 15] > 100 * wide[15, 10]  # long along x
    assert torch.allclose(blur_kernel(KernelSettings("aniso", 21, 3.0, 0.5, rotation=math.pi / 2)), wide.T, atol=1e-6)
    gaussian = blur_kernel(KernelSettings("iso", 21, 2.0, 2.0))
    assert (gaussian[10, 12] / gaussian[10, 10]).item() == pytest.approx(math.exp(-0.5), rel=1e-4)
    assert torch.allclose(blur_kernel(KernelSettings("generalized_iso", 21, 2.0, 2.0)), gaussian)
    plateau = blur_kernel(KernelSettings("plateau_iso", 21, 2.0, 2.0))
    assert (plateau[10, 12] / plateau[10, 10]).item() == pytest.approx(0.5, rel=1e-4)
    assert blur_kernel(KernelSettings("sinc", 21, cutoff=1.0)).min() < 0  # rings


def test_a_sinc_kernel_removes_what_is_above_its_cutoff() -> None:
    response = torch.fft.rfft2(blur_kernel(KernelSettings("sinc", 21, cutoff=math.pi / 2)), s=(64, 64))[0].abs()
    assert response[4] > 0.9 and response[28] < 0.1  # of 32 = pi


def test_the_bicubic_preset_is_a_slightly_noisy_downscale() -> None:
    image = busy_image(128, 128)
    clean = downscale(image[None], 4)[0].clamp(0, 1)
    errors = [(degrade(image, "bicubic", generator=stateless_generator(0, "x", k)) - clean).std() for k in range(40)]
    assert max(errors) < 0.017 and min(errors) < 0.004 and max(errors) > 0.01


@pytest.mark.parametrize("preset", ["realesrgan", "seesr", "stablesr"])
def test_no_degradation_shifts_the_image(preset: str) -> None:
    image = smooth_image(128, 128)
    clean = downscale(image[None], 4)[0]
    count = 60
    mean = sum(degrade(image, preset, generator=stateless_generator(0, "shift", k)) for k in range(count)) / count
    inside = (slice(None), slice(6, -6), slice(6, -6))
    bias = (mean - clean)[inside].mean(dim=(1, 2)).abs()
    # Half an LR pixel of shift would be 0.6 / 32 / 2 = 0.0094 on a ramp.
    assert bias.max() < 0.004


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("factor", [0.3, 0.77, 1.5])
def test_each_resize_keeps_the_image_in_place(mode: str, factor: float) -> None:
    image = smooth_image(128, 128)
    stage = replace(PLAIN, resize_factor=factor, resize_mode=mode)
    settings = DegradationSettings((stage, PLAIN), final_resize_mode="bilinear")
    lr_image = apply_settings(image, settings, generator=stateless_generator(0, "x"))
    across = (lr_image - downscale(image[None], 4)[0])[1].mean(dim=0)  # of the ramp along x
    assert max(across[2:6].mean().abs(), across[-6:-2].mean().abs()) < 0.0025  # 0.005 with corners aligned


def test_noise_has_the_drawn_strength_and_colour() -> None:
    grey = torch.full((3, 128, 128), 0.5)

    def noise(kind: str, strength: float, gray: bool) -> Tensor:
        stage = replace(PLAIN, noise=NoiseSettings(kind, strength, gray))  # type: ignore[arg-type]
        settings = DegradationSettings((PLAIN, stage), sinc_before_jpeg=False)
        return apply_settings(grey, settings, generator=stateless_generator(0, "x"), scale=1) - 0.5

    assert noise("gaussian", 0.05, gray=True).std().item() == pytest.approx(0.05, rel=0.1)
    assert noise("poisson", 2.0, gray=True).std().item() == pytest.approx(2 * math.sqrt(0.5 / 256), rel=0.1)
    for kind in ("gaussian", "poisson"):
        gray, colour = noise(kind, 0.5, gray=True), noise(kind, 0.5, gray=False)
        assert (gray[0] - gray[1]).std() < 0.3 * gray.std()
        assert (colour[0] - colour[1]).std() > 0.6 * colour.std()


def test_blur_jpeg_and_the_final_order_act() -> None:
    image = busy_image(64, 64)
    blur = KernelSettings("iso", 13, 2.0, 2.0)

    def run(**changes: object) -> Tensor:
        settings = replace(DegradationSettings((PLAIN, PLAIN)), **changes)  # type: ignore[arg-type]
        return apply_settings(image, settings, generator=stateless_generator(0, "x"))

    clean, low = run(), replace(PLAIN, jpeg_quality=30)
    assert run(stages=(replace(PLAIN, kernel=blur), PLAIN)).std() < 0.5 * clean.std()
    assert (run(stages=(PLAIN, low)) - clean).abs().mean() > 0.02
    assert not torch.equal(run(stages=(low, PLAIN)), clean)
    rings = {"stages": (PLAIN, low), "final_kernel": KernelSettings("sinc", 13, cutoff=math.pi / 3)}
    assert not torch.equal(run(**rings, sinc_before_jpeg=True), run(**rings, sinc_before_jpeg=False))


def test_unknown_presets_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'seesr'"):
        degrade(smooth_image(), "sessr", generator=torch.Generator())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 30, 32), "32x30 is not a multiple of scale 4"),
        (torch.zeros(1, 32, 32), r"\(1, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32), r"\(2, 3, 32, 32\)"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), "uint8"),
    ],
)
def test_wrong_images_are_refused(image: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        degrade(image, "seesr", generator=torch.Generator())
