"""Other packages' metrics: imported late, given their range, kept in their own sign, and missed with a clear word."""

from __future__ import annotations

import subprocess
import sys
from math import nan
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from refreward_trl.errors import ConfigError, RewardError, SetupError
from refreward_trl.evaluation.foreign_metrics import TORCHMETRICS
from refreward_trl.evaluation.metrics import Sample, load_metric

SIDE = 176


def sample(side: int = SIDE) -> Sample:
    random = torch.Generator().manual_seed(0)
    hr_image = torch.rand(1, 3, side // 8, side // 8, generator=random)
    hr_image = torch.nn.functional.interpolate(hr_image, size=(side, side), mode="bilinear")
    sr_image = (hr_image + 0.1 * torch.randn(hr_image.shape, generator=random)).clamp(0, 1)
    return Sample("photo", hr_image[..., ::4, ::4], sr_image, hr_image)


@pytest.mark.parametrize("name", sorted(TORCHMETRICS))
def test_torchmetrics_run_at_their_least_side_and_prefer_equal_images(name: str) -> None:
    pytest.importorskip("torchmetrics")
    metric = load_metric(name)
    assert metric.needs_hr and metric.better == "higher" and metric.protocol.package.startswith("torchmetrics 1")
    given = sample()
    equal = Sample("photo", given.lr_image, given.hr_image, given.hr_image)
    assert metric.measure(equal) == pytest.approx(1.0, abs=1e-3) and metric.measure(given) < 0.99
    image = torch.rand(1, 3, metric.min_side, metric.min_side)
    metric.measure(Sample("p", image[..., ::4, ::4], image, image.flip(-1)))


def test_vif_is_given_the_range_that_its_noise_is_meant_for() -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    given = sample()
    expected = functional.visual_information_fidelity(given.sr_image * 255, given.hr_image * 255)
    wrong = functional.visual_information_fidelity(given.sr_image, given.hr_image)
    assert load_metric("vif").measure(given) == pytest.approx(expected.item(), abs=1e-5)
    assert abs(expected - wrong) > 0.01


def test_no_foreign_package_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys; from refreward_trl.evaluation.metrics import load_metric; load_metric('psnr_y');"
        "import refreward_trl.evaluation.foreign_metrics;"
        "sys.exit(bool({'torchmetrics', 'pyiqa', 'stlpips_pytorch', 'torchvision'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("word", "module", "message"),
    [
        ("ms_ssim", "torchmetrics.functional.image", "torchmetrics is not installed"),
        ("pyiqa:musiq", "pyiqa", "pyiqa is not installed"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(word: str, module: str, message: str, monkeypatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr("refreward_trl.rewards.foreign.importlib.import_module", missing)
    with pytest.raises(SetupError, match=message) as caught:
        load_metric(word)
    assert "pip install" in str(caught.value.fix)


@pytest.fixture
def pyiqa(tmp_path: Path, monkeypatch) -> list[Any]:
    """A package that answers like pyiqa 0.1.16; returns the arguments of every call of a metric."""
    calls: list[Any] = []

    class Network:
        def __init__(self, name: str) -> None:
            self.metric_mode = "FR" if name == "lpips" else "NR"
            self.lower_better = name in ("lpips", "niqe")

        def __call__(self, *images: torch.Tensor) -> torch.Tensor:
            calls.append(images)
            return images[0].new_tensor([[nan if float(images[0].mean()) == 0 else 0.25]])

    def create_metric(name: str, device: torch.device) -> Network:
        if name == "topiq_nr":
            raise OSError("no network")
        return Network(name)

    known = ["lpips", "niqe", "musiq", "topiq_nr", "fid"]
    module: Any = ModuleType("pyiqa")
    module.create_metric, module.list_models = create_metric, lambda: known
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    return calls


def test_pyiqa_keeps_its_sign_and_gets_the_images_it_compares(pyiqa: list[Any]) -> None:
    given = sample(32)
    distance, quality = load_metric("pyiqa:lpips"), load_metric("pyiqa:musiq")
    assert distance.measure(given) == quality.measure(given) == 0.25
    assert (distance.better, quality.better, load_metric("pyiqa:niqe").better) == ("lower", "higher", "lower")
    assert [len(call) for call in pyiqa] == [2, 1] and pyiqa[0][1] is given.hr_image
    assert distance.needs_hr and not quality.needs_hr
    assert (distance.kind, quality.kind) == ("fidelity", "reward")
    assert distance.protocol.metric == "pyiqa lpips" and "pyiqa" in distance.protocol.package
    assert distance.protocol.hash != quality.protocol.hash


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("pyiqa", ConfigError, "no metric of pyiqa is named"),
        ("pyiqa:musik", ConfigError, "no metric 'musik'"),
        ("pyiqa:fid", ConfigError, "whole set"),
        ("pyiqa:topiq_nr", SetupError, "no network"),
    ],
)
def test_what_pyiqa_cannot_do_is_told(word: str, error: type[Exception], message: str, pyiqa: list[Any]) -> None:
    with pytest.raises(error, match=message):
        load_metric(word)


def test_a_number_that_is_none_names_metric_and_sample(pyiqa: list[Any]) -> None:
    black = torch.zeros(1, 3, 32, 32)
    with pytest.raises(RewardError, match="'photo'") as caught:
        load_metric("pyiqa:musiq").measure(Sample("photo", black[..., ::4, ::4], black, black))
    assert caught.value.where == "metric 'pyiqa:musiq'"
