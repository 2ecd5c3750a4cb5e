"""The reader of ST-LPIPS on small weights of the same names: what it computes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from refreward_trl.errors import CheckpointError, SetupError
from refreward_trl.evaluation.metrics import Sample, load_metric
from refreward_trl.evaluation.stlpips import STLPIPS, WEIGHTS


def small_weights(width: int = 2) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    weights = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    for index, (layer, kernel) in enumerate(zip(STLPIPS.LAYERS, (11, 5, 3, 3, 3), strict=True)):
        channels = 3 if index == 0 else width
        weights[f"net.{layer}.weight"] = torch.randn(width, channels, kernel, kernel, generator=random)
        weights[f"net.{layer}.bias"] = torch.zeros(width)
        weights[f"lin{index}.model.1.weight"] = torch.full((1, width, 1, 1), 0.5)
    return weights


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> Path:
    """An installed `stlpips_pytorch` with small weights, whose Python must never run; returns the file of weights."""
    file = tmp_path / "stlpips_pytorch" / WEIGHTS
    file.parent.mkdir(parents=True)
    (tmp_path / "stlpips_pytorch" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    torch.save(small_weights(), file)
    monkeypatch.syspath_prepend(tmp_path)
    return file


def images() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    hr_image = torch.rand(1, 3, 64, 64, generator=random)
    return (hr_image + 0.2 * torch.randn(hr_image.shape, generator=random)).clamp(0, 1), hr_image


def test_equal_images_have_no_distance_and_more_noise_has_more(package: Path) -> None:
    distance = STLPIPS.installed()
    noisy, hr_image = images()
    assert distance(hr_image, hr_image).item() == pytest.approx(0, abs=1e-6)
    assert 0 < distance((noisy + hr_image) / 2, hr_image).item() < distance(noisy, hr_image).item()
    assert distance(noisy, hr_image).item() == pytest.approx(distance(hr_image, noisy).item())


def test_as_a_metric_it_is_lower_for_better_images(package: Path) -> None:
    noisy, hr_image = images()
    metric = load_metric("stlpips")
    assert metric.better == "lower" and metric.needs_hr
    given = Sample("p", hr_image[..., ::4, ::4], noisy, hr_image)
    assert metric.measure(given) == pytest.approx(STLPIPS(package)(noisy, hr_image).item())


def test_what_is_not_there_or_no_weights_is_refused(package: Path, monkeypatch) -> None:
    torch.save({"net.slice1.0.weight": torch.zeros(1)}, package)
    with pytest.raises(CheckpointError, match="no weights of ST-LPIPS"):
        STLPIPS.installed()
    package.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="cannot be read"):
        STLPIPS.installed()
    package.unlink()
    with pytest.raises(SetupError, match="missing"):
        STLPIPS.installed()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="not installed") as caught:
        load_metric("stlpips")
    assert "--no-deps stlpips-pytorch" in str(caught.value.fix)
