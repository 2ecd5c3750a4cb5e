"""Metrics of packages that the user installed: torchmetrics, pyiqa, and the weights of stlpips-pytorch.

Each is imported when one of its metrics is asked for, gets the range that it expects, keeps its own sign, and is named
with its version, since such numbers change between versions.
"""

from __future__ import annotations

import importlib
from math import isfinite
from types import ModuleType
from typing import Any, NamedTuple

import torch

from refreward_trl.errors import ConfigError, RewardError, SetupError
from refreward_trl.evaluation.metrics import RGB, Metric, Sample
from refreward_trl.evaluation.protocols import EIGHT_BITS, HR, OWN_PACKAGE, Protocol, package_version
from refreward_trl.evaluation.stlpips import STLPIPS

PYIQA_NOTE = (
    "pyiqa is under PolyForm-Noncommercial and needs torchvision, which must fit your torch: pip install pyiqa"
)


class Formula(NamedTuple):
    """A function of `torchmetrics.functional.image`."""

    function: str
    white: float
    """What it takes for white: constants inside depend on it."""
    min_side: int
    details: str
    options: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple has no default_factory, and nobody writes to it)


TORCHMETRICS = {
    "ms_ssim": Formula(
        "multiscale_structural_similarity_index_measure",
        1.0,
        176,
        "5 scales of weights 0.0448, 0.2856, 0.3001, 0.2363, 0.1333; Gaussian window 11x11, sigma 1.5, data range 1; "
        "borders as torchmetrics has them",
        {"data_range": 1.0},
    ),
    "uqi": Formula("universal_image_quality_index", 255.0, 12, "Gaussian window 11x11, sigma 1.5"),
    "scc": Formula("spatial_correlation_coefficient", 1.0, 8, "Laplacian high-pass 3x3, windows 8x8"),
    "vif": Formula(
        "visual_information_fidelity", 255.0, 41, "pixel domain, 4 scales, noise variance 2 of 255 squared"
    ),
}


def torchmetrics_metric(name: str) -> Metric:
    """One of `TORCHMETRICS`. Raises `SetupError` where torchmetrics is not installed."""
    formula = TORCHMETRICS[name]
    module = import_optional(
        "torchmetrics.functional.image", "torchmetrics", name, "pip install 'refreward-trl[metrics]'"
    )
    function = getattr(module, formula.function)

    def measure(sample: Sample) -> float:
        assert sample.hr_image is not None
        value = function(sample.sr_image * formula.white, sample.hr_image * formula.white, **formula.options)
        return _finite(float(value), name, sample)

    pixels = EIGHT_BITS if formula.white == 1 else EIGHT_BITS.replace("[0, 1]", f"[0, {formula.white:g}]")
    protocol = Protocol(name, HR, RGB, pixels=pixels, details=formula.details, package=package_version("torchmetrics"))
    return Metric(name, protocol, measure, digits=4, min_side=formula.min_side)


def pyiqa_metric(word: str, metric_id: str, device: torch.device | str) -> Metric:
    """A metric of pyiqa, by its id.

    Raises:
        ConfigError: There is no id, pyiqa does not know it, or the metric is one of whole sets of images.
        SetupError: pyiqa is not installed, or cannot fetch its weights.
    """
    if not metric_id or metric_id.startswith("fid") or metric_id == "inception_score":
        raise ConfigError(
            f"{metric_id} is a figure of a whole set: no image has one"
            if metric_id
            else "no metric of pyiqa is named",
            where=f"metric {word!r}",
            fix="name a metric of single images, e.g. pyiqa:musiq, pyiqa:lpips or pyiqa:maniqa-pipal",
        )
    pyiqa = import_optional("pyiqa", "pyiqa", word, PYIQA_NOTE)
    if metric_id not in pyiqa.list_models():
        raise ConfigError(
            f"pyiqa has no metric {metric_id!r}",
            where=f"metric {word!r}",
            fix="python -c 'import pyiqa; print(pyiqa.list_models())'",
        )
    try:
        network = pyiqa.create_metric(metric_id, device=torch.device(device))
    except Exception as error:  # whatever a download does
        raise SetupError(
            f"pyiqa cannot make it: {type(error).__name__}: {error}",
            where=f"metric {word!r}",
            fix="its weights are downloaded at the first use; without a network copy them into pyiqa's cache",
        ) from error
    with_hr = network.metric_mode == "FR"

    def measure(sample: Sample) -> float:
        images = (sample.sr_image, sample.hr_image) if with_hr else (sample.sr_image,)
        with torch.no_grad():
            return _finite(float(network(*images)), word, sample)

    protocol = Protocol(
        f"pyiqa {metric_id}",
        HR if with_hr else "nothing",
        "RGB given; the metric's own inside",
        details="pyiqa's defaults for this id",
        package=package_version("pyiqa"),
    )
    return Metric(
        word,
        protocol,
        measure,
        better="lower" if network.lower_better else "higher",
        kind="fidelity" if with_hr else "reward",
        digits=4,
    )


def stlpips_metric(word: str, device: torch.device | str) -> Metric:
    """ST-LPIPS on AlexNet. Raises `SetupError` where stlpips-pytorch is not installed."""
    distance = STLPIPS.installed().to(device)

    def measure(sample: Sample) -> float:
        assert sample.hr_image is not None
        return _finite(distance(sample.sr_image, sample.hr_image).item(), word, sample)

    protocol = Protocol(
        "stlpips",
        HR,
        RGB,
        pixels=EIGHT_BITS + ", mapped to [-1, 1]",
        details="AlexNet, shift-tolerant; weights vST0.0",
        package=f"{OWN_PACKAGE}, weights of {package_version('stlpips-pytorch')}",
    )
    return Metric(word, protocol, measure, better="lower", digits=4, min_side=32)


def import_optional(module: str, package: str, metric: str, fix: str) -> ModuleType:
    """Imports a package that is no dependency. Raises `SetupError` where it is missing or cannot be imported."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        what = f"{package} is not installed" if missing == package else f"{package} needs {missing}, which is missing"
        raise SetupError(what, where=f"metric {metric!r}", fix=fix) from error
    except Exception as error:  # a package beside a torchvision of another torch fails in many ways
        raise SetupError(
            f"{package} cannot be imported: {type(error).__name__}: {error}", where=f"metric {metric!r}", fix=fix
        ) from error


def _finite(value: float, metric: str, sample: Sample) -> float:
    if not isfinite(value):
        raise RewardError(
            f"returned {value} for sample {sample.sample_id!r}",
            where=f"metric {metric!r}",
            fix="leave this metric out, or this image: it may be too small or of one colour",
        )
    return value
