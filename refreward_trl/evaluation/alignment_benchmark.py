"""What an alignment run changed on held-out photos, measured against a control run and guarded by other figures.

A reward also moves for reasons that are not the reward: more steps, the anchor, drift. The control run has the same
steps and the same anchor but no signal (ReFL with reward weight 0, DDPO with advantages shuffled inside groups), and a
gain is only claimed as far as it exceeds the control's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.evaluation.sr_benchmark import Row, column, mean_of
from refreward_trl.evaluation.statistics import Estimate, estimate, gain_minus_control


def spread_of(rows: Sequence[Row], name: str) -> float:
    """Returns the standard deviation of a figure over the photos; NaN for fewer than two."""
    return float(np.nanstd(column(rows, name), ddof=1)) if len(rows) > 1 else float("nan")


@dataclass(frozen=True)
class AlignmentResult:
    """One method and its control on the same photos.

    Attributes:
        name: What people call the method, e.g. "ReFL".
        reward: Name of the reward that was optimised; `reward/<name>` in the rows.
        heldout: Name of the reward that only watched.
        steps: Optimizer steps of the run, and of its control.
        images: LR images that the run trained on, repeats counted.
        seconds: Training time of the run, without its control.
        before: Rows of `evaluate_generator` of the generator both started from.
        after: Rows after the run.
        control: Rows after the control run.
    """

    name: str
    reward: str
    heldout: str
    steps: int
    images: int
    seconds: float
    before: Sequence[Row]
    after: Sequence[Row]
    control: Sequence[Row]

    def __post_init__(self) -> None:
        for label, rows in (("after", self.after), ("control", self.control)):
            if self._photos(rows) != self._photos(self.before):
                raise DataError(
                    f"the rows {label!r} are not of the same photos, in the same order, as those before",
                    where=f"AlignmentResult {self.name!r}",
                    fix="evaluate all runs on one dataset",
                )

    @property
    def photos(self) -> list[str]:
        """Names of the photos."""
        return self._photos(self.before)

    def change(self, figure: str, *, control: bool = False) -> Estimate:
        """Mean change of a figure, e.g. `"lr_psnr"`, with its 95 % interval over photos."""
        return estimate(self.changes(figure, control=control), self.photos)

    def changes(self, figure: str, *, control: bool = False) -> NDArray[np.float64]:
        """Change of a figure for each photo, `(photos,)`."""
        after = np.array(column(self.control if control else self.after, figure), dtype=np.float64)
        return after - np.array(column(self.before, figure), dtype=np.float64)

    def gain_minus_control(self, figure: str | None = None) -> Estimate:
        """How much more a figure (by default the optimised reward) rose than in the control run, with its interval."""
        figure = figure or self.reward_column
        before = column(self.before, figure)
        return gain_minus_control(
            before, column(self.after, figure), before, column(self.control, figure), self.photos
        )

    @property
    def reward_column(self) -> str:
        """Row key of the optimised reward."""
        return f"reward/{self.reward}"

    @property
    def heldout_column(self) -> str:
        """Row key of the reward that only watched."""
        return f"reward/{self.heldout}"

    @property
    def spread(self) -> float:
        """Standard deviation of the optimised reward over the photos before the run: the unit of an effect."""
        return spread_of(self.before, self.reward_column)

    def summary(self) -> dict[str, Any]:
        """The figures of `summary.json`. Rewards are means over photos, PSNRs in dB."""
        excess = self.gain_minus_control()
        return {
            "steps": self.steps,
            "images": self.images,
            "reward_before": mean_of(self.before, self.reward_column),
            "reward_after": mean_of(self.after, self.reward_column),
            "gain": self.change(self.reward_column).mean,
            "control_gain": self.change(self.reward_column, control=True).mean,
            "gain_minus_control_ci95": [excess.low, excess.high],
            "heldout_before": mean_of(self.before, self.heldout_column),
            "heldout_after": mean_of(self.after, self.heldout_column),
            "lr_psnr_before": mean_of(self.before, "lr_psnr"),
            "lr_psnr_after": mean_of(self.after, "lr_psnr"),
            "hr_psnr_before": mean_of(self.before, "hr_psnr"),
            "hr_psnr_after": mean_of(self.after, "hr_psnr"),
            "seconds": self.seconds,
        }

    @staticmethod
    def _photos(rows: Sequence[Row]) -> list[str]:
        return [row["sample_id"] for row in rows]


def telling_photos(
    result: AlignmentResult, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> list[tuple[str, str]]:
    """Picks the photos to show: largest gain, smallest gain, and the one whose pixels changed most.

    Args:
        result: The run.
        before: SR image of each photo before the run, float `(3, H, W)`.
        after: The same after it.

    Returns:
        `(photo, remark)` without repeats; a photo picked twice carries both remarks.
    """
    gains = dict(zip(result.photos, result.changes(result.reward_column).tolist(), strict=True))
    moved = {photo: (after[photo] - before[photo]).abs().mean().item() for photo in result.photos}
    return pick_telling(gains, moved)


def pick_telling(gains: Mapping[str, float], moved: Mapping[str, float]) -> list[tuple[str, str]]:
    """`telling_photos` by each photo's gain (NaN: not scored) and by how far its pixels moved."""
    scored = {photo: gain for photo, gain in gains.items() if not isnan(gain)}
    picks = {"most changed": max(moved, key=moved.__getitem__)}
    if scored:
        picks = {
            "largest gain": max(scored, key=scored.__getitem__),
            "smallest gain": min(scored, key=scored.__getitem__),
        } | picks
    remarks: dict[str, list[str]] = {}
    for remark, photo in picks.items():
        remarks.setdefault(photo, []).append(remark)
    return [(photo, ", ".join(texts)) for photo, texts in remarks.items()]
