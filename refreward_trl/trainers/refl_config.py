"""Settings of `SRReFLTrainer`."""

from __future__ import annotations

from dataclasses import dataclass, field

from refreward_trl.trainers.alignment_config import AlignmentConfig
from refreward_trl.trainers.run_config import check_range


@dataclass
class SRReFLConfig(AlignmentConfig):
    """Configuration of reward-gradient training."""

    reward_weight: float = field(
        default=1.0,
        metadata={"help": "weight of the reward in the loss; 0 is the control run: anchors only, same steps"},
    )
    reward_cap: float | None = field(
        default=None, metadata={"help": "reward beyond which an image gets no more gradient; null for no cap"}
    )
    checkpoint_decode: bool = field(
        default=True,
        metadata={"help": "recompute the decoder in the backward pass instead of keeping its activations"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("reward_weight", self.reward_weight, low=0.0)
