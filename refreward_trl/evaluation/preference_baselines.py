"""What every judge must beat on the same pairs: formulas, other packages' metrics, and knowing who made an image.

A judge's accuracy means little beside a table in which one generator nearly always wins: who knows the generators then
knows the answers, and may never have looked at a pixel. So that is a baseline, always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import log, nan
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from refreward_trl.errors import SetupError
from refreward_trl.evaluation.metrics import load_metric
from refreward_trl.evaluation.preference_pairs import PairTable
from refreward_trl.evaluation.preference_scorers import FormulaScorer, MetricScorer, Scorer, Sees
from refreward_trl.evaluation.reward_benchmark import (
    Score,
    consistency,
    laplacian_variance,
    likeness_to_upsampled,
)
from refreward_trl.rewards.foreign import TORCHMETRICS

FORMULAS: Mapping[str, tuple[Score, Sees]] = {
    "lr_consistency": (consistency, "SR and LR"),
    "psnr_to_upsampled_lr": (likeness_to_upsampled, "SR and LR"),
    "laplacian_variance": (laplacian_variance, "SR"),
}
"""Formulas without an HR image, and what they look at."""

WITH_HR = ("psnr_y", "ssim_y", *TORCHMETRICS, "stlpips")
"""Metrics against the HR image; those of packages that are not there are left out, and it is said."""

PYIQA = ("niqe", "musiq", "clipiqa+", "lpips")
"""Metrics of pyiqa that are tried where it is installed."""

IDENTITY = "generator_identity"
METHOD_IDENTITY = "method_identity"

_Pair: TypeAlias = tuple[str, str]


@dataclass
class Baselines:
    """The baselines that look at pixels, and by name why others could not be made."""

    scorers: list[Scorer] = field(default_factory=list)
    not_made: dict[str, str] = field(default_factory=dict)


def open_baselines(further: Sequence[str] = (), *, device: torch.device | str = "cpu") -> Baselines:
    """Makes all baselines that need no label.

    Args:
        further: Metrics that the user asks for by name, see `metrics.load_metric`.
        device: Where networks of other packages run.

    Raises:
        ConfigError: One of `further` does not exist, or has no better direction.
        SetupError: One of `further` needs a package that is missing.
    """
    found = Baselines([FormulaScorer(name, formula, sees=sees) for name, (formula, sees) in FORMULAS.items()])
    words = list(WITH_HR) + ([f"pyiqa:{name}" for name in PYIQA] if find_spec("pyiqa") else [])
    if not find_spec("pyiqa"):
        found.not_made["pyiqa"] = "pyiqa is not installed"
    for word in dict.fromkeys([*words, *further]):
        if word in FORMULAS:
            continue
        try:
            found.scorers.append(MetricScorer(load_metric(word, device=device), device))
        except SetupError as error:
            if word in further:
                raise
            found.not_made[word] = error.what
    return found


def identity_margins(table: PairTable, *, methods: bool = False) -> NDArray[np.float64]:
    """Returns `(N,)` margins of a scorer that knows who made the candidates, and how these fared in all other photos.

    A margin is the log odds of the two generators' wins against each other (a tie is half a win, and one half is added
    to both), without the photo that is asked about; 0 where both candidates have the same maker; NaN where one is
    unknown or the two never met in another photo.

    Args:
        table: The labelled pairs.
        methods: Tell generators with different artefacts apart.
    """
    makers = [pair.methods if methods else pair.generators for pair in table.pairs]
    total: dict[_Pair, float] = {}
    by_photo: dict[str, dict[_Pair, float]] = {}
    for pair, (better, worse) in zip(table.pairs, makers, strict=True):
        wins = {(better, worse): 0.5, (worse, better): 0.5} if pair.pair.tie else {(better, worse): 1.0}
        for counts in (total, by_photo.setdefault(pair.photo, {})):
            counts |= {names: counts.get(names, 0) + won for names, won in wins.items()}
    return np.array([_margin(*names, total, by_photo[p.photo]) for p, names in zip(table.pairs, makers, strict=True)])


def _margin(better: str, worse: str, total: Mapping[_Pair, float], own: Mapping[_Pair, float]) -> float:
    if not better or not worse:
        return nan
    if better == worse:
        return 0.0
    won, lost = (total.get(pair, 0) - own.get(pair, 0) for pair in ((better, worse), (worse, better)))
    return log((won + 0.5) / (lost + 0.5)) if won + lost > 0 else nan


def identity_problem(table: PairTable, margins: NDArray[np.float64], *, methods: bool = False) -> str:
    """Says what keeps identity from predicting all pairs, or any; "" where it predicts all.

    Args:
        table: The labelled pairs.
        margins: What `identity_margins` returned.
        methods: As there.
    """
    if not np.isnan(margins).any():
        return ""
    makers = [pair.methods if methods else pair.generators for pair in table.pairs]
    if not any(all(names) for names in makers):
        return "generators unknown"
    return "generators unknown, or not compared with each other in any other photo"
