"""Teachers of a judge: their scores are a denser lesson than the order of the candidates alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from refreward_trl.data.images import to_float
from refreward_trl.errors import SetupError
from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.reward_model.scoring import RateJudge

CALIBRATION_GROUPS = 64
"""Groups whose scores tell a teacher's mean and spread."""
CLIP = 3.0
"""Scores further out than this many standard deviations teach no more than these."""
RATING_SPAN = 0.15
"""One standard deviation of the teachers in shares of the student's rating range: 3 of them stay inside of it."""


class Teachers:
    """Frozen judges whose mean standardised score a student learns.

    Scores of different judges have no common unit, so each teacher is standardised by its mean and standard deviation
    over the first `CALIBRATION_GROUPS` training groups. 0 becomes the middle of the student's rating range and 1
    `RATING_SPAN` of it (0 and 1 for a student without bounds). Teachers that were trained differently err differently,
    and their mean errs less than each.

    Args:
        judges: The trained judges; frozen here.
        groups: The training groups, rows as `RefRewardTrainer` takes them.
        weights: One per teacher, at least 0; equal by default.
        student: The judge that learns.
        device: Where the teachers compute.

    Raises:
        SetupError: A teacher gives everything one score, or a score that is not finite.
    """

    def __init__(
        self,
        judges: Sequence[RateJudge | ConvJudge],
        groups: Dataset,
        *,
        weights: Sequence[float] | None = None,
        student: RateJudge | ConvJudge,
        device: torch.device,
    ) -> None:
        weights = [1.0] * len(judges) if weights is None else weights
        self._weights = [weight / sum(weights) for weight in weights]
        self._judges = list(judges)
        for judge in judges:
            network = cast(nn.Module, judge if isinstance(judge, ConvJudge) else judge.model)
            network.to(device).eval().requires_grad_(False)
        self._middle, self._unit = 0.0, 1.0
        if isinstance(student, RateJudge):
            low, high = student.spec.rating_range
            self._middle, self._unit = (low + high) / 2, RATING_SPAN * (high - low)
        self._device = device
        self._calibration = [self._calibrate(judge, groups) for judge in judges]

    def targets(self, inputs: Mapping[str, Any]) -> Float[Tensor, "g k"]:
        """Returns the scores that the student should give, without a graph."""
        mean = sum(
            weight * ((self._score(judge, inputs) - centre) / spread).clamp(-CLIP, CLIP)
            for judge, weight, (centre, spread) in zip(self._judges, self._weights, self._calibration, strict=True)
        )
        return self._middle + self._unit * cast(Tensor, mean)

    def loss(self, scores: Float[Tensor, "g k"], inputs: Mapping[str, Any]) -> Float[Tensor, ""]:
        """Returns the smooth L1 distance to the targets, in standard deviations of the teachers.

        The differences inside a group count once more: what the judge is for is the order there, and most of the
        variance is between groups.
        """
        scores, targets = scores / self._unit, self.targets(inputs) / self._unit
        return F.smooth_l1_loss(scores, targets) + F.smooth_l1_loss(_centred(scores), _centred(targets))

    def _calibrate(self, judge: RateJudge | ConvJudge, groups: Dataset) -> tuple[float, float]:
        count = min(CALIBRATION_GROUPS, len(cast(Any, groups)))
        rows = (groups[index] for index in range(count))
        batches = ({name: row[name][None] for name in ("lr_image", "candidates")} for row in rows)
        scores = torch.cat([self._score(judge, batch) for batch in batches], dim=1)
        mean, std = float(scores.mean()), float(scores.std())
        if not math.isfinite(std) or std == 0:
            raise SetupError(
                f"a teacher's scores of {count} groups have the standard deviation {std}",
                where="teachers",
                fix="name judges that were trained",
            )
        return mean, std

    @torch.no_grad()
    def _score(self, judge: RateJudge | ConvJudge, inputs: Mapping[str, Any]) -> Tensor:
        candidates = inputs["candidates"].to(self._device)
        groups, count = candidates.shape[:2]
        lr_image = to_float(inputs["lr_image"].to(self._device)).repeat_interleave(count, dim=0)
        return judge.rate(lr_image, to_float(candidates.flatten(0, 1))).float().view(groups, count)


def _centred(scores: Tensor) -> Tensor:
    return scores - scores.mean(dim=1, keepdim=True)
