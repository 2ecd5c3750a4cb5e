"""Image quality metrics as rewards: those of torchmetrics and pyiqa, or any function or module of images.

A metric keeps its own idea of pixels and of what is good; the adapter gives it the range that it expects, turns its
sign where lower is better, and keeps the graph to the pixels where the metric has one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from refreward_trl.errors import ConfigError, DataError, RewardError
from refreward_trl.resampling import downscale
from refreward_trl.rewards.batching import rate_pairs, read_images, sample_labels, scale_between
from refreward_trl.rewards.composite import reward_name
from refreward_trl.rewards.foreign import TORCHMETRICS, pyiqa_network, torchmetrics_function

Needs: TypeAlias = Literal["none", "lr", "hr"]


class MetricReward:
    """A metric under the reward contract, see `from_metric`. Pickles when the metric does."""

    def __init__(
        self,
        metric: Callable[..., Any],
        *,
        higher_is_better: bool,
        value_range: tuple[float, float],
        needs: Needs,
        batch_size: int = 1,
        name: str | None = None,
    ) -> None:
        self.__name__ = name or reward_name(metric)
        where = f"reward {self.__name__!r}"
        low, high = value_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(f"value_range must be (black, white), got {value_range}", where=where, fix="e.g. (0, 1)")
        if needs not in get_args(Needs):
            raise ConfigError(f"needs must be one of {', '.join(get_args(Needs))}, got {needs!r}", where=where)
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}", where=where)
        self.metric = metric
        self.higher_is_better = higher_is_better
        self.value_range = (float(low), float(high))
        self.needs: Needs = needs
        self.batch_size = batch_size

    def __call__(
        self, *, completions: Any, lr_image: Any = None, hr_image: Any = None, prompts: Any = None, **columns: Any
    ) -> list[float | None] | Tensor:
        """Returns one reward per completion, with a graph if the metric keeps one; None or NaN where not scored.

        Raises:
            DataError: Without the column that the metric needs, or where images do not fit it.
            RewardError: The metric returned anything but one number per image.
        """
        labels = sample_labels(columns, len(completions))
        images = read_images(completions, column="completions", labels=labels)
        targets = self._targets(images, lr_image if self.needs == "lr" else hr_image, labels)
        return rate_pairs(self._rate, targets, images, batch_size=self.batch_size)

    def _targets(self, images: Sequence[Tensor | None], column: Any, labels: Sequence[str]) -> list[Tensor | None]:
        if self.needs == "none":
            return list(images)
        name = f"{self.needs}_image"
        if column is None:
            raise DataError(
                f"the column {name!r} is missing",
                where=f"reward {self.__name__!r}",
                fix=f"use a dataset with {name}, or a metric that needs none",
            )
        targets = read_images(column, column=name, labels=labels)
        for label, target, image in zip(labels, targets, images, strict=True):
            where = f"reward {self.__name__!r}, {label}"
            if target is None or image is None:
                continue
            if self.needs == "lr":
                scale_between(target, image, where=where)
            elif target.shape != image.shape:
                raise DataError(
                    f"the completion has shape {tuple(image.shape)}, its HR image {tuple(target.shape)}",
                    where=where,
                    fix="crop the HR image to a multiple of the scale before degrading it",
                )
        return targets

    def _rate(self, target: Tensor, image: Tensor) -> Tensor:
        if isinstance(self.metric, nn.Module):
            self.metric.to(image.device)
        if self.needs == "lr":
            image = downscale(image, image.shape[-1] // target.shape[-1])
        low, high = self.value_range
        given = [low + (high - low) * each for each in ((image,) if self.needs == "none" else (image, target))]
        with torch.autocast(image.device.type, enabled=False):
            returned = self.metric(*given)
        _forget(self.metric)
        values = self._one_per_image(returned, len(image))
        return values if self.higher_is_better else -values

    def _one_per_image(self, returned: Any, count: int) -> Tensor:
        if isinstance(returned, (int, float)) and not isinstance(returned, bool):
            returned = torch.tensor(float(returned))
        if not isinstance(returned, Tensor) or returned.numel() != count or returned.is_complex():
            shown = tuple(returned.shape) if isinstance(returned, Tensor) else type(returned).__name__
            raise RewardError(
                f"the metric returned {shown} for {count} image{'s' if count > 1 else ''}",
                where=f"reward {self.__name__!r}",
                fix="it must give one number per image; for one that averages over a batch set batch_size to 1",
            )
        return returned.reshape(count).float()

    def __repr__(self) -> str:
        return f"from_metric({self.__name__}, higher_is_better={self.higher_is_better}, needs={self.needs!r})"


def from_metric(
    metric: Callable[..., Any],
    *,
    higher_is_better: bool,
    value_range: tuple[float, float],
    needs: Needs,
    batch_size: int = 1,
    name: str | None = None,
) -> MetricReward:
    """Makes a reward of an image metric: a function or module of torchmetrics, a network of pyiqa, or one's own.

    The result can be optimised by reward gradient exactly if the metric has a gradient. A recipe names such a reward
    by the dotted path of a module-level variable, `my_rewards.lpips`; for pyiqa and the formulas of torchmetrics no
    file is needed: `{name: metric, kwargs: {metric: "pyiqa:musiq"}}`, see `NamedMetric`.

    Args:
        metric: `(image)` or `(image, reference)` -> one number per image. Images are `(b, 3, H, W)`. A module goes to
            the device of the images and should be frozen and in eval mode; what a module of torchmetrics gathers is
            dropped after each call.
        higher_is_better: Whether it is so for the metric. If not, the reward is its negative.
        value_range: What the metric takes for black and for white: `(0, 1)`, `(0, 255)` or `(-1, 1)`.
        needs: What the SR image is compared with. "none": nothing. "hr": the column `hr_image`, of the same size.
            "lr": the column `lr_image`; the SR image is reduced to its size (`resampling.downscale`), so that like is
            compared with like.
        batch_size: The most images per call; above 1 only for metrics that do not average over a batch.
        name: What it is called in metrics; by default what the metric itself is called.

    Raises:
        ConfigError: For arguments that cannot be.

    Example:
        >>> import torch
        >>> def contrast(image):
        ...     return image.std()
        >>> reward = from_metric(contrast, higher_is_better=False, value_range=(0, 255), needs="none")
        >>> reward(completions=torch.ones(1, 3, 8, 8), lr_image=torch.ones(1, 3, 2, 2))
        [-0.0]
    """
    return MetricReward(
        metric,
        higher_is_better=higher_is_better,
        value_range=value_range,
        needs=needs,
        batch_size=batch_size,
        name=name,
    )


class NamedMetric:
    """A known metric as a reward, with sign, range and needs known too; nothing is loaded before the first score.

    In a recipe: `{name: metric, kwargs: {metric: "pyiqa:musiq"}}`.

    Args:
        metric: `"pyiqa:ID"` for a metric of pyiqa (musiq, clipiqa, lpips, ...), or one of `foreign.TORCHMETRICS`.
        batch_size: The most images per call; what is not of pyiqa takes one.

    Raises:
        ConfigError: For another name.
    """

    def __init__(self, metric: str, batch_size: int = 1) -> None:
        if metric not in TORCHMETRICS and not metric.startswith("pyiqa:"):
            raise ConfigError(
                f"there is no metric {metric!r}",
                where="reward 'metric'",
                fix=f"name one of {', '.join(TORCHMETRICS)} or pyiqa:ID; for your own, the reward's name is the "
                "dotted path of what refreward_trl.rewards.from_metric returned",
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}", where=f"reward {metric!r}")
        self.metric = metric
        self.batch_size = batch_size
        self.__name__ = metric.replace(":", "_")
        self._reward: MetricReward | None = None

    def __call__(self, **arguments: Any) -> list[float | None] | Tensor:
        """Scores completions as a reward, see `MetricReward`.

        Raises:
            SetupError: The metric's package is not installed, or its weights cannot be fetched.
        """
        if self._reward is None:
            self._reward = self._pyiqa() if self.metric.startswith("pyiqa:") else self._formula()
        return self._reward(**arguments)

    def _pyiqa(self) -> MetricReward:
        # As a loss, and only so, pyiqa keeps the graph.
        metric_id = self.metric.removeprefix("pyiqa:")
        network = pyiqa_network(self.metric, metric_id, "cpu", as_loss=True, loss_reduction="none")
        network.requires_grad_(False)
        return MetricReward(
            network,
            higher_is_better=not network.lower_better,
            value_range=(0.0, 1.0),
            needs="hr" if network.metric_mode == "FR" else "none",
            batch_size=self.batch_size,
            name=self.__name__,
        )

    def _formula(self) -> MetricReward:
        formula, function = TORCHMETRICS[self.metric], torchmetrics_function(self.metric)
        return MetricReward(
            lambda image, target: function(image, target, **formula.options),
            higher_is_better=True,
            value_range=(0.0, formula.white),
            needs="hr",
            name=self.__name__,
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reward": None}

    def __repr__(self) -> str:
        return f"NamedMetric({self.metric!r})"


def _forget(metric: Any) -> None:
    """Drops what a module of torchmetrics has gathered; nobody can have made one without importing the package."""
    torchmetrics = sys.modules.get("torchmetrics")
    if torchmetrics is not None and isinstance(metric, torchmetrics.Metric):
        metric.reset()
