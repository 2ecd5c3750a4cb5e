"""Other reward interfaces made to fit ours, and ours made to fit TRL's own text trainers.

Every adapter is a plain callable object that pickles when what it wraps does, with a `__name__` for metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from refreward_trl.data.images import to_pil
from refreward_trl.errors import DataError, RefRewardError, RewardError
from refreward_trl.rewards.batching import float_image, read_images, sample_labels
from refreward_trl.rewards.calling import call_reward
from refreward_trl.rewards.composite import read_rewards, reward_name
from refreward_trl.types import RewardFunction

ImageFrom = Callable[[Any, dict[str, Any]], Any]
"""`(completion, columns of its row) -> SR image or None`."""


class DDPOReward:
    """A reward of the DDPO contract, see `from_ddpo`."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.__name__ = reward_name(fn)

    def __call__(
        self,
        *,
        prompts: Any,
        completions: Any,
        lr_image: Any,
        completion_ids: Any = None,
        trainer_state: Any = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: Any,
    ) -> Tensor:
        """Returns `(B,)` rewards, with a graph if the wrapped function keeps one.

        Raises:
            RewardError: If the function returns anything but `(rewards, info)` with one reward per image.
        """
        count = len(completions)
        labels = sample_labels(columns, count)
        images = _present_images(completions, "completions", labels)
        metadata = [row_of({"lr_image": lr_image, **columns}, row, count) for row in range(count)]
        values: list[Tensor] = [torch.empty(0)] * count
        for rows in _rows_by_size(images):
            batch = torch.stack([images[row] for row in rows])
            returned = self.fn(batch, tuple(prompts[row] for row in rows), tuple(metadata[row] for row in rows))
            if not (isinstance(returned, tuple) and len(returned) == 2):
                raise RewardError(
                    f"returned {type(returned).__name__}, expected the pair (rewards, info)",
                    where=f"reward {self.__name__!r}",
                    fix="the DDPO contract is (images, prompts, metadata) -> (rewards, info)",
                )
            rewards = read_rewards(returned[0], name=self.__name__, labels=[labels[row] for row in rows])
            for row, reward in zip(rows, rewards, strict=True):
                values[row] = reward
        return torch.stack(values)


def from_ddpo(fn: Callable[..., Any]) -> DDPOReward:
    """Wraps a reward written for ddpo-pytorch, flow_grpo or TRL's former DDPO trainer.

    Args:
        fn: `(images, prompts, metadata) -> (rewards, info)`. `images` is a float tensor `(b, 3, H, W)` in [0, 1],
            `prompts` a tuple of strings, `metadata` a tuple of dicts with the row's columns (`lr_image`, `hr_image`,
            ...). Images of different sizes come in one call per size. `info` is ignored.

    Example:
        >>> import torch
        >>> def brightness(images, prompts, metadata):
        ...     return images.mean(dim=(1, 2, 3)), {}
        >>> from_ddpo(brightness)(prompts=[""], completions=torch.ones(1, 3, 8, 8), lr_image=torch.ones(1, 3, 2, 2))
        tensor([1.])
    """
    return DDPOReward(fn)


class PILReward:
    """A reward on PIL images, see `from_pil`."""

    def __init__(self, fn: Callable[..., Any], batched: bool) -> None:
        self.fn = fn
        self.batched = batched
        self.__name__ = reward_name(fn)

    def __call__(self, *, completions: Any, lr_image: Any, prompts: Any = None, **columns: Any) -> Any:
        """Returns what the wrapped function returns: one value per completion."""
        labels = sample_labels(columns, len(completions))
        sr_pils = [to_pil(image) for image in _present_images(completions, "completions", labels)]
        lr_pils = [to_pil(image) for image in _present_images(lr_image, "lr_image", labels)]
        if self.batched:
            return self.fn(sr_pils, lr_pils)
        return [self.fn(sr_pil, lr_pil) for sr_pil, lr_pil in zip(sr_pils, lr_pils, strict=True)]


def from_pil(fn: Callable[..., Any], *, batched: bool = False) -> PILReward:
    """Wraps a function of 8-bit RGB PIL images. The result has no gradient.

    Args:
        fn: `(sr_pil, lr_pil) -> float | None`.
        batched: Whether `fn` takes a list of each instead, and returns a list.

    Example:
        >>> import torch
        >>> def height(sr_pil, lr_pil):
        ...     return sr_pil.height / lr_pil.height
        >>> from_pil(height)(completions=torch.ones(1, 3, 8, 8), lr_image=torch.ones(1, 3, 2, 2))
        [4.0]
    """
    return PILReward(fn, batched)


class TRLReward:
    """One of our rewards in the form that TRL's text trainers call, see `to_trl`."""

    def __init__(self, reward: RewardFunction, image_from: ImageFrom, lr_column: str) -> None:
        self.reward = reward
        self.image_from = image_from
        self.lr_column = lr_column
        self.__name__ = reward_name(reward)

    def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Any = None,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Returns one Python float per completion; None where `image_from` found no image or the reward gave none.

        Raises:
            DataError: Without the LR column, or for an image that cannot be read.
            RewardError: Naming the reward, if it or `image_from` raised, or it returned something that is not a
                reward.
        """
        if self.lr_column not in columns:
            raise DataError(
                f"the dataset has no column {self.lr_column!r}",
                where=f"reward {self.__name__!r}",
                fix=f"pass to_trl(..., lr_column=...) one of {sorted(columns)}",
            )
        count = len(completions)
        labels = sample_labels(columns, count)
        images = [
            self._image(completion, row_of(columns, row, count), labels[row])
            for row, completion in enumerate(completions)
        ]
        rows = [row for row, image in enumerate(images) if image is not None]
        result: list[float | None] = [None] * count
        if not rows:
            return result
        arguments = {
            column: _take(values, rows, count) for column, values in columns.items() if column != self.lr_column
        }
        arguments |= {
            "prompts": _take(prompts, rows, count),
            "completions": [images[row] for row in rows],
            "completion_ids": None,
            "lr_image": [
                float_image(columns[self.lr_column][row], where=f"{labels[row]}, column {self.lr_column!r}")
                for row in rows
            ],
            "trainer_state": trainer_state,
            "log_metric": log_metric,
            "log_extra": _SpreadLog(log_extra, rows, count) if log_extra else None,
        }
        with torch.no_grad():  # TRL calls rewards with gradients enabled
            returned = call_reward(self.reward, self.__name__, arguments)
        rewards = read_rewards(returned, name=self.__name__, labels=[labels[row] for row in rows])
        for row, reward in zip(rows, rewards.tolist(), strict=True):
            result[row] = None if reward != reward else reward
        return result

    def _image(self, completion: Any, columns: dict[str, Any], label: str) -> Tensor | None:
        try:
            image = self.image_from(completion, columns)
        except RefRewardError:
            raise
        except Exception as error:
            raise RewardError(
                f"image_from raised {type(error).__name__}: {error}",
                where=f"reward {self.__name__!r}, {label}",
                fix="return None for a completion that names no image",
            ) from error
        return None if image is None else float_image(image, where=f"reward {self.__name__!r}, {label}").detach()


def to_trl(reward: RewardFunction, image_from: ImageFrom, *, lr_column: str = "lr_image") -> TRLReward:
    """Makes one of our rewards usable in `reward_funcs` of TRL's GRPOTrainer and RLOOTrainer.

    There the policy writes text, and the text chooses or describes an image.

    Args:
        reward: Any reward of our contract.
        image_from: `(completion, columns) -> image`. `completion` is as TRL has it: a string, or a list of messages
            for conversational data (`completion_text` reads both). `columns` holds its dataset row. The image may be a
            path, a PIL image or a tensor; None means that the completion names none, which TRL leaves out of its
            statistics.
        lr_column: The dataset column with the LR image, in any of these forms.

    Returns:
        A callable object that returns a list of Python floats and None. It pickles if `reward` and `image_from` do.

    Example:
        A completion such as "2" picks a candidate of its row:

        >>> def pick(completion, columns):
        ...     text = completion_text(completion).strip()
        ...     return columns["candidates"][int(text)] if text.isdigit() else None
        >>> from refreward_trl.rewards import RefReward
        >>> reward_func = to_trl(RefReward.from_pretrained("default"), pick)
        >>> # GRPOTrainer(..., reward_funcs=[reward_func], train_dataset=rows with "prompt", "lr_image", "candidates")
    """
    return TRLReward(reward, image_from, lr_column)


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """Returns the text of a completion: the string itself, or the text of all messages and their text blocks."""
    if isinstance(completion, str):
        return completion
    texts = []
    for message in completion:
        content = message["content"]
        blocks = [content] if isinstance(content, str) else content or []
        texts += [block if isinstance(block, str) else block.get("text", "") for block in blocks]
    return "".join(texts)


class _SpreadLog:
    """`log_extra` for a reward that saw only some rows: TRL's table wants one value per completion."""

    def __init__(self, log_extra: Callable[[str, list[Any]], None], rows: Sequence[int], count: int) -> None:
        self.log_extra = log_extra
        self.rows = rows
        self.count = count

    def __call__(self, column: str, values: Sequence[Any]) -> None:
        spread: list[Any] = [None] * self.count
        for row, value in zip(self.rows, values, strict=True):
            spread[row] = value
        self.log_extra(column, spread)


def row_of(columns: Mapping[str, Any], row: int, count: int) -> dict[str, Any]:
    """Returns one row's entries; what is no column of `count` entries (a setting) is the same for all rows."""
    return {column: values[row] if _is_column(values, count) else values for column, values in columns.items()}


def _take(values: Any, rows: Sequence[int], count: int) -> Any:
    return [values[row] for row in rows] if _is_column(values, count) else values


def _is_column(values: Any, count: int) -> bool:
    return isinstance(values, (list, tuple, Tensor)) and len(values) == count


def _present_images(images: Any, column: str, labels: Sequence[str]) -> list[Tensor]:
    return [image for image in read_images(images, column=column, labels=labels, optional=False) if image is not None]


def _rows_by_size(images: Sequence[Tensor]) -> list[list[int]]:
    rows: dict[torch.Size, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image.shape, []).append(row)
    return list(rows.values())
