"""Figures of known images, and the deployed path of a real (tiny, untrained) generator."""

from __future__ import annotations

from math import isnan, log10, nan
from typing import Any

import pytest
import torch
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.evaluation.sr_benchmark import (
    benchmark_generator,
    best_smoothing,
    bicubic,
    bypass_denoiser,
    evaluate_generator,
    evaluate_upscaler,
    gradient_energy,
    mean_of,
    reconstruct,
    smoothed_bicubic,
)
from refreward_trl.generators.base import Generator
from refreward_trl.generators.module import ModuleGenerator
from refreward_trl.generators.tiny import build_tiny_generator
from refreward_trl.resampling import upscale

SIZES = ((32, 48), (40, 32))


@pytest.fixture
def photos() -> list[dict[str, Any]]:
    random = torch.Generator().manual_seed(0)
    rows = []
    for index, (height, width) in enumerate(SIZES):
        hr_image = torch.randint(0, 256, (3, height, width), generator=random, dtype=torch.uint8)
        lr_image = torch.randint(0, 256, (3, height // 4, width // 4), generator=random, dtype=torch.uint8)
        rows.append({"sample_id": f"photo{index}", "lr_image": lr_image, "hr_image": hr_image})
    return rows


@pytest.fixture(scope="module")
def generator() -> Generator:
    return build_tiny_generator(seed=1, vae_width=8, unet_channels=(8, 16))


def constant(value: float) -> Any:
    return lambda lr_image, _: torch.full((1, 3, lr_image.shape[-2] * 4, lr_image.shape[-1] * 4), value)


def flat_photo(value: int) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": "flat",
            "lr_image": torch.full((3, 8, 8), value, dtype=torch.uint8),
            "hr_image": torch.full((3, 32, 32), value, dtype=torch.uint8),
        }
    ]


def test_psnr_of_a_known_error_and_of_equal_images() -> None:
    (row,) = evaluate_upscaler(constant(110 / 255), flat_photo(100))
    assert row["hr_psnr"] == pytest.approx(20 * log10(255 / 10), abs=1e-3)
    assert row["lr_psnr"] == pytest.approx(row["hr_psnr"], abs=1e-3)
    (row,) = evaluate_upscaler(constant(100 / 255), flat_photo(100))
    assert row["hr_psnr"] == pytest.approx(100.0, abs=0.1)
    assert row["ssim"] == pytest.approx(1.0)
    assert row["gradient_energy"] == 0.0


def test_images_are_measured_as_8_bit_files() -> None:
    kept: dict[str, Tensor] = {}
    (row,) = evaluate_upscaler(constant(100.4 / 255), flat_photo(100), keep=kept.__setitem__)
    assert row["hr_psnr"] == pytest.approx(100.0, abs=0.1)
    assert torch.equal(kept["flat"] * 255, torch.full((3, 32, 32), 100.0))


def test_no_border_is_cropped(photos: list[dict[str, Any]]) -> None:
    def wrong_at_the_border(_: Tensor, row: dict[str, Any]) -> Tensor:
        image = row["hr_image"].float()[None] / 255
        image[..., 0, 0] = 1 - image[..., 0, 0]
        return image

    for row in evaluate_upscaler(wrong_at_the_border, photos):
        assert row["hr_psnr"] < 60


def test_gradient_energy_of_a_ramp_and_a_checkerboard() -> None:
    ramp = torch.arange(16.0).expand(1, 3, 16, 16) / 16
    assert gradient_energy(ramp).item() == pytest.approx(1 / 256)
    checkerboard = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    assert gradient_energy(checkerboard.float().expand(2, 3, 16, 16)).tolist() == [2.0, 2.0]


def test_whole_photos_of_different_sizes_go_through_the_deployed_path(
    generator: Generator, photos: list[dict[str, Any]]
) -> None:
    kept: dict[str, Tensor] = {}
    rows = evaluate_generator(generator, photos, {}, keep=kept.__setitem__)
    assert [row["sample_id"] for row in rows] == ["photo0", "photo1"]
    for photo in photos:
        expected = generator.generate(photo["lr_image"][None].float() / 255)[0]
        assert kept[photo["sample_id"]].shape == photo["hr_image"].shape
        assert (kept[photo["sample_id"]] - expected).abs().max() <= 0.5 / 255 + 1e-6


def test_the_given_model_is_used(generator: Generator, photos: list[dict[str, Any]]) -> None:
    other = build_tiny_generator(seed=2, vae_width=8, unet_channels=(8, 16)).denoiser
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    own = evaluate_generator(generator, photos, {})
    assert evaluate_generator(generator, photos, {}, model=generator.denoiser) == own
    assert evaluate_generator(generator, photos, {}, model=other) != own


def test_rewards_get_the_photo_and_missing_stays_missing(photos: list[dict[str, Any]]) -> None:
    seen: list[tuple] = []

    def mean_brightness(*, completions: Any, lr_image: Any, hr_image: Any, sample_id: Any, **_: Any) -> list:
        seen.append((completions.shape, lr_image.shape, hr_image.shape, sample_id))
        return [completions.mean().item() if sample_id == ["photo0"] else None]

    rows = evaluate_upscaler(bicubic(4), photos, {"brightness": mean_brightness})
    assert seen[0] == ((1, 3, 32, 48), (1, 3, 8, 12), (1, 3, 32, 48), ["photo0"])
    assert 0 < rows[0]["reward/brightness"] < 1
    assert isnan(rows[1]["reward/brightness"])
    assert mean_of(rows, "reward/brightness") == rows[0]["reward/brightness"]


def test_photos_without_hr_images_have_no_hr_figures(photos: list[dict[str, Any]]) -> None:
    lr_only = [{key: value for key, value in row.items() if key != "hr_image"} for row in photos]
    (first, _) = evaluate_upscaler(bicubic(4), lr_only)
    assert set(first) == {"sample_id", "lr_psnr", "gradient_energy"}


def test_smoothing_is_chosen_for_the_photos() -> None:
    random = torch.Generator().manual_seed(3)
    clean = torch.rand((1, 3, 8, 8), generator=random)
    noisy = (clean * 0 + 0.5 + 0.2 * torch.randn(clean.shape, generator=random)).clamp(0, 1)
    flat = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    sharp = (upscale(clean, 4)[0] * 255).round().byte()
    assert best_smoothing([{"lr_image": (noisy[0] * 255).byte(), "hr_image": flat}], 4) > 1
    assert best_smoothing([{"lr_image": (clean[0] * 255).round().byte(), "hr_image": sharp}], 4) == 0
    image = smoothed_bicubic(4, 2.0)(noisy, {})
    assert gradient_energy(image) < gradient_energy(bicubic(4)(noisy, {}))


def test_bypassing_the_denoiser_decodes_the_upsampled_latent(
    generator: Generator, photos: list[dict[str, Any]]
) -> None:
    lr_image = photos[0]["lr_image"][None].float() / 255
    untouched = bypass_denoiser(generator)(lr_image, photos[0])
    with torch.no_grad():
        condition = generator.prepare(lr_image)
        expected = generator.decode(generator.encode(condition), condition).clamp(0, 1)
    torch.testing.assert_close(untouched, expected)
    assert not torch.equal(untouched, generator.generate(lr_image))


def test_the_ceiling_depends_on_the_hr_image_alone(generator: Generator, photos: list[dict[str, Any]]) -> None:
    black = torch.zeros_like(photos[1]["lr_image"])[None].float()
    ceiling = reconstruct(generator)
    image = ceiling(photos[1]["lr_image"][None].float() / 255, photos[1])
    assert image.shape[1:] == photos[1]["hr_image"].shape
    torch.testing.assert_close(ceiling(black, photos[1]), image)
    brighter = {**photos[1], "hr_image": photos[1]["hr_image"] // 2}
    assert not torch.equal(ceiling(black, brighter), image)


def test_empty_data_and_wrong_sizes_are_refused(photos: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="empty"):
        evaluate_upscaler(bicubic(4), [])
    with pytest.raises(DataError, match="photo0"):
        evaluate_upscaler(lambda lr_image, _: torch.zeros(1, 3, 30, 48), photos)
    with pytest.raises(DataError):
        evaluate_upscaler(constant(nan), photos)


def test_progress_wraps_the_photos(photos: list[dict[str, Any]]) -> None:
    lengths: list[int] = []

    def progress(rows: Any) -> Any:
        lengths.append(len(rows))
        return rows

    assert len(evaluate_upscaler(bicubic(4), photos, progress=progress)) == 2
    assert lengths == [2]


def test_a_generator_stands_beside_its_baselines_and_bounds(
    generator: Generator, photos: list[dict[str, Any]]
) -> None:
    report = benchmark_generator(generator, photos, {})
    assert report.bypass is not None and report.ceiling is not None
    better = max(mean_of(report.bicubic, "hr_psnr"), mean_of(report.smoothed, "hr_psnr"))
    assert report.margin == pytest.approx(mean_of(report.generator, "hr_psnr") - better)
    assert report.denoiser_share == pytest.approx(
        mean_of(report.generator, "hr_psnr") - mean_of(report.bypass, "hr_psnr")
    )
    summary = report.summary()
    assert set(summary["generator"]) == {"hr_psnr", "gradient_energy", "vae_ceiling_psnr"}
    assert summary["bicubic"]["smoothed_sigma"] == report.sigma


class Enlarge(torch.nn.Module):
    """The smallest SR network: bicubic with one trainable number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, lr_image: Tensor) -> Tensor:
        return upscale(lr_image, 4) * self.gain


def test_a_network_without_a_latent_has_no_bounds(photos: list[dict[str, Any]]) -> None:
    report = benchmark_generator(ModuleGenerator(Enlarge(), scale=4), photos, {})
    assert report.bypass is None and report.ceiling is None
    assert isnan(report.denoiser_share)
    assert report.generator == report.bicubic
