"""Metrics of packages that the user installed: torchmetrics, pyiqa, and the weights of stlpips-pytorch.

Each is imported when one of its metrics is asked for, gets the range that it expects, keeps its own sign, and is named
with its version, since such numbers change between versions.
"""

from __future__ import annotations

from math import isfinite

import torch

from refreward_trl.errors import RewardError
from refreward_trl.evaluation.metrics import RGB, Metric, Sample
from refreward_trl.evaluation.protocols import EIGHT_BITS, HR, OWN_PACKAGE, Protocol, package_version
from refreward_trl.evaluation.stlpips import STLPIPS
from refreward_trl.rewards.foreign import TORCHMETRICS, pyiqa_network, torchmetrics_function


def torchmetrics_metric(name: str) -> Metric:
    """One of `TORCHMETRICS`. Raises `SetupError` where torchmetrics is not installed."""
    formula = TORCHMETRICS[name]
    function = torchmetrics_function(name)

    def measure(sample: Sample) -> float:
        assert sample.hr_image is not None
        value = function(sample.sr_image * formula.white, sample.hr_image * formula.white, **formula.options)
        return _finite(float(value), name, sample)

    pixels = EIGHT_BITS if formula.white == 1 else EIGHT_BITS.replace("[0, 1]", f"[0, {formula.white:g}]")
    protocol = Protocol(name, HR, RGB, pixels=pixels, details=formula.details, package=package_version("torchmetrics"))
    return Metric(name, protocol, measure, digits=4, min_side=formula.min_side)


def pyiqa_metric(word: str, metric_id: str, device: torch.device | str) -> Metric:
    """A metric of pyiqa, by its id; see `pyiqa_network` for the errors."""
    network = pyiqa_network(word, metric_id, device)
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


def _finite(value: float, metric: str, sample: Sample) -> float:
    if not isfinite(value):
        raise RewardError(
            f"returned {value} for sample {sample.sample_id!r}",
            where=f"metric {metric!r}",
            fix="leave this metric out, or this image: it may be too small or of one colour",
        )
    return value
