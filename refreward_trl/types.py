"""The vocabulary that travels between the layers: batches, loss outputs and the reward protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypedDict, runtime_checkable

import torch
from torch import Tensor

Images: TypeAlias = Tensor | Sequence[Tensor]
"""A batch of images: one tensor `(B, 3, H, W)`, or a list of `(3, H, W)` where sizes differ."""

Metrics: TypeAlias = dict[str, float]


class Batch(TypedDict, total=False):
    """What a collator makes of dataset rows. Images are uint8; further columns stay lists."""

    sample_id: list[str]
    lr_image: Images
    hr_image: Images


@dataclass
class LossOutput:
    """A scalar loss with its graph, and detached metrics to log under their TRL names."""

    loss: Tensor
    metrics: dict[str, Tensor | float] = field(default_factory=dict)

    def scalar_metrics(self) -> Metrics:
        """Returns the metrics as Python floats."""
        return {
            name: float(value.detach() if isinstance(value, Tensor) else value) for name, value in self.metrics.items()
        }


@runtime_checkable
class RewardFunction(Protocol):
    """TRL's reward contract with images as completions.

    Called by keyword only. `completions` is a float tensor `(B, 3, H, W)` in [0, 1] or a list of `(3, H, W)`;
    `lr_image` and every other dataset column arrive by name, one entry per completion. Returns one number per
    completion, higher is better; `None` or NaN means "not scored". A returned tensor with a graph can be used by
    reward-gradient training.
    """

    def __call__(
        self, *, prompts: Any, completions: Any, lr_image: Any, **columns: Any
    ) -> Sequence[float | None] | Tensor: ...


def image_list(images: Images) -> list[Tensor]:
    """Returns the images of a batch as a list of `(3, H, W)` tensors (views, graph kept)."""
    return list(images)


def stack_if_equal(images: Sequence[Tensor]) -> Images:
    """Stacks images of one size to `(B, 3, H, W)`; returns a list when sizes differ."""
    first = images[0].shape
    if all(image.shape == first for image in images):
        return torch.stack(list(images))
    return list(images)
