"""A second judge that no training optimises: does a gain also show to eyes that were not being pleased?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from refreward_trl.errors import CheckpointError
from refreward_trl.rewards.refreward import JudgeReward

if TYPE_CHECKING:
    from refreward_trl.reward_model.conv import ConvJudge

DEFAULT_FOLDER = Path(__file__).parent.parent / "assets" / "heldout_judge"


class HeldOutJudge(JudgeReward):
    """The convolutional judge, trained on other photos and other artefacts than `RefReward`; for evaluation only.

    Args:
        source: `"default"`, or a folder written by `ConvJudge.save_pretrained`.
        device: See `JudgeReward`.
        batch_size: The most images per call of the judge.
    """

    __name__ = "heldout_judge"

    @classmethod
    def from_pretrained(
        cls, source: str | Path = "default", *, device: str | torch.device | None = None, batch_size: int = 16
    ) -> Self:
        """Returns the reward of a saved judge; see the class for the arguments. The judge loads at the first score."""
        return cls(source, device=device, batch_size=batch_size)

    def locate(self) -> Path:
        from refreward_trl.reward_model.conv import CONFIG_FILE

        folder = DEFAULT_FOLDER if self.source == "default" else Path(self.source)
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(
                f"no held-out judge at {str(folder)!r}",
                where=f"reward {self.__name__!r}",
                fix="give 'default', or a folder written by ConvJudge.save_pretrained",
            )
        return folder

    def _load(self) -> ConvJudge:
        from refreward_trl.reward_model.conv import ConvJudge

        return ConvJudge.from_pretrained(self.locate())
