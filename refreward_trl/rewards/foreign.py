"""Metrics of packages that the user installed, torchmetrics and pyiqa: what they expect, and how they are opened.

Each package is imported when one of its metrics is asked for; nothing here is imported before.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch

from refreward_trl.errors import ConfigError, SetupError

PYIQA_NOTE = (
    "pyiqa is under PolyForm-Noncommercial and needs torchvision, which must fit your torch: pip install pyiqa"
)
TORCHMETRICS_NOTE = "pip install 'refreward-trl[metrics]'"


class Formula(NamedTuple):
    """A function of `torchmetrics.functional.image` that compares two images; higher is better."""

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
"""Those that need no download, by the names that they have here."""


def torchmetrics_function(name: str) -> Any:
    """Returns the function of one of `TORCHMETRICS`. Raises `SetupError` where torchmetrics is not installed."""
    module = import_optional("torchmetrics.functional.image", "torchmetrics", name, TORCHMETRICS_NOTE)
    return getattr(module, TORCHMETRICS[name].function)


def pyiqa_network(word: str, metric_id: str, device: torch.device | str, **options: Any) -> Any:
    """Returns a metric of pyiqa: a module `(image[, hr_image]) -> (b, 1)` that knows its `metric_mode` and
    `lower_better`.

    Args:
        word: What it was asked for by, for errors.
        metric_id: pyiqa's own name of it.
        device: Where it computes.
        **options: Of `pyiqa.create_metric`.

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
        return pyiqa.create_metric(metric_id, device=torch.device(device), **options)
    except Exception as error:  # whatever a download does
        raise SetupError(
            f"pyiqa cannot make it: {type(error).__name__}: {error}",
            where=f"metric {word!r}",
            fix="its weights are downloaded at the first use; without a network copy them into pyiqa's cache",
        ) from error


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
