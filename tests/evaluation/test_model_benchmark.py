"""Models are measured as their files hold them, and one image of a dataset cannot lead out of the output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from refreward_trl.data.images import read_image, write_png
from refreward_trl.errors import DataError
from refreward_trl.evaluation.metrics import load_metric
from refreward_trl.evaluation.model_benchmark import Measured, measure_models, pixel_digest, sr_file
from refreward_trl.evaluation.model_inputs import ImageSet, Model, read_inputs
from refreward_trl.evaluation.sr_benchmark import evaluate_generator
from refreward_trl.generators.base import Generator
from refreward_trl.generators.tiny import build_tiny_generator

SIZES = ((32, 48), (40, 32), (32, 32))
WORDS = ("psnr_rgb", "ssim_rgb", "gradient_energy")


@pytest.fixture(scope="module")
def generator() -> Generator:
    return build_tiny_generator(seed=1, vae_width=8, unet_channels=(8, 16))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = torch.Generator().manual_seed(0)
    for index, (height, width) in enumerate(SIZES):
        for side, scale in (("hr", 1), ("lr", 4)):
            image = torch.randint(0, 256, (3, height // scale, width // scale), generator=random, dtype=torch.uint8)
            write_png(tmp_path / "photos" / side / f"photo{index}.png", image)
    return tmp_path / "photos"


def measure(photos: Path, generator: Generator, models: list[Model], out: Path, **options: Any) -> Measured:
    metrics = [load_metric(word) for word in WORDS]
    inputs = read_inputs(ImageSet(photos / "lr", photos / "hr"), models, metrics)
    return measure_models(models, inputs, metrics, lambda source: generator, out, **options)


def test_a_generator_measures_as_in_the_benchmark_and_as_its_files(
    photos: Path, generator: Generator, tmp_path: Path
) -> None:
    models = [Model("bicubic", "bicubic"), Model("tiny", "a generator")]
    found = measure(photos, generator, models, tmp_path / "images")
    psnr, ssim, energy = found.evaluation.figures
    rows = [found.row(image.sample_id) for image in found.evaluation.images]
    expected = evaluate_generator(generator, rows, {})
    for figure, key in ((psnr, "hr_psnr"), (ssim, "ssim"), (energy, "gradient_energy")):
        assert figure.values["tiny"] == pytest.approx([row[key] for row in expected], abs=1e-4)
    assert psnr.values["tiny"] != psnr.values["bicubic"]
    again = measure(
        photos, generator, [models[0], Model("files", str(tmp_path / "images" / "tiny"))], tmp_path / "again"
    )
    assert [figure.values["files"] for figure in again.evaluation.figures] == [
        figure.values["tiny"] for figure in found.evaluation.figures
    ]
    assert again.evaluation.models[1].sr == found.evaluation.models[1].sr
    assert not (tmp_path / "again" / "files").exists()
    assert again.evaluation.image_set == found.evaluation.image_set


def test_images_are_known_by_their_pixels(photos: Path, generator: Generator, tmp_path: Path) -> None:
    models = [Model("bicubic", "bicubic"), Model("hr", str(photos / "hr"))]
    found = measure(photos, generator, models, tmp_path / "images").evaluation
    for number, image in enumerate(found.images):
        assert image.lr == pixel_digest(read_image(photos / "lr" / f"{image.sample_id}.png"))
        assert image.hr == found.models[1].sr[number] != found.models[0].sr[number]
    assert found.figures[0].values["hr"] == [100.0] * len(SIZES)
    changed = read_image(photos / "lr/photo1.png")
    changed[0, 0, 0] ^= 1
    write_png(photos / "lr/photo1.png", changed)
    assert measure(photos, generator, models, tmp_path / "images").evaluation.image_set != found.image_set


def test_size_and_shape_enter_a_digest() -> None:
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    assert pixel_digest(image) != pixel_digest(image.view(3, 6, 4))


def test_a_generator_of_another_scale_names_the_sample(photos: Path, tmp_path: Path) -> None:
    double = build_tiny_generator(seed=1, vae_width=8, unet_channels=(8, 16), scale=2)
    with pytest.raises(DataError, match="photo0") as caught:
        measure(photos, double, [Model("bicubic", "bicubic"), Model("tiny", "double")], tmp_path / "images")
    assert "--scale" in str(caught.value.fix)


def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    assert sr_file(tmp_path, "set/a.b") == tmp_path / "set" / "a.b.png"
    for name in ("../a", "a/../../b", "/etc/a", "", "a\0b"):
        with pytest.raises(DataError, match="cannot name a file"):
            sr_file(tmp_path, name)
