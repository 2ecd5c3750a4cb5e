"""The reward model as a reward: `RefReward` scores SR images against their LR images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from refreward_trl.errors import ConfigError, RewardError
from refreward_trl.rewards.batching import is_single_image, rate_pairs, read_images, sample_labels, scale_between

if TYPE_CHECKING:
    from refreward_trl.reward_model.scoring import RateJudge

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Judge(Protocol):
    """What a judge must offer to be a reward: `RateJudge` and `ConvJudge` do."""

    def rate(self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
        """Scores pixels in [0, 1], higher is better, differentiable in the SR pixels."""
        ...

    def to(self, device: torch.device) -> Any:
        """Moves the judge."""
        ...


class JudgeReward(ABC):
    """A judge under the reward contract.

    It is no `nn.Module` (TRL would take it for a text classifier, and a trainer would register its weights), loads
    nothing before its first score, and pickles as its arguments alone. A judge's own precision holds: the trainer's
    autocast does not reach it.

    Args:
        source: `"default"` for the judge that comes with the package, a folder, or what else the subclass can load.
        device: Where the judge runs. None follows images that are on an accelerator; images on the host go to the
            current CUDA device if there is one, else they stay on the CPU.
        batch_size: The most images per call of the judge.
        checkpoint: Recompute the judge in the backward pass, call by call, instead of keeping its activations: with a
            smaller `batch_size` the least memory, for one more forward pass.
    """

    __name__: str

    def __init__(
        self,
        source: str | Path = "default",
        *,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        checkpoint: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}", where=f"reward {self.__name__!r}")
        self.source = source
        self.device = None if device is None else torch.device(device)
        self.batch_size = batch_size
        self.checkpoint = checkpoint
        self._judge: Judge | None = None

    @abstractmethod
    def _load(self) -> Judge:
        """Reads the frozen judge from `self.source`."""

    def score(self, lr_image: Any, sr_image: Any) -> float | list[float]:
        """Scores SR images without a graph.

        Args:
            lr_image: The LR image of each SR image, or one for all of them.
            sr_image: One image (a path, a PIL image, a uint8 tensor `(3, H, W)`, or a float tensor `(3, H, W)` in
                [0, 1]), a tensor `(B, 3, H, W)`, or a list of images of any sizes.

        Returns:
            A float for one SR image, else a list of floats. Higher is better.

        Raises:
            DataError: For images that cannot be read, and for an SR image that is no whole multiple of its LR image.
            RewardError: If the judge gives NaN or infinity.
        """
        single = is_single_image(sr_image)
        images = [sr_image] if single else sr_image
        labels = [f"image {index}" for index in range(len(images))]
        with torch.no_grad():
            scores = self._rate(
                read_images(lr_image, column="lr_image", labels=labels, optional=False),
                read_images(images, column="sr_image", labels=labels, optional=False),
                labels,
            )
        return scores[0] if single else list(scores)

    def __call__(
        self, *, completions: Any, lr_image: Any, prompts: Any = None, **columns: Any
    ) -> list[float | None] | Tensor:
        """Scores completions as a reward.

        Args:
            completions: B SR images: `(B, 3, H, W)` in [0, 1], or a list of any images as in `score`; None is not
                scored.
            lr_image: Their B LR images, of any kind.
            prompts: Ignored.
            **columns: Ignored, but for `sample_id`, which errors name.

        Returns:
            If a completion requires grad and gradients are enabled, a tensor `(B,)` with a graph to the pixels and NaN
            where a completion is None. Otherwise a list of floats and None.

        Raises:
            DataError: As in `score`, naming the sample.
        """
        labels = sample_labels(columns, len(completions))
        return self._rate(
            read_images(lr_image, column="lr_image", labels=labels, optional=False),
            read_images(completions, column="completions", labels=labels),
            labels,
        )

    @property
    def judge(self) -> Judge:
        """The judge itself, loaded at the first use."""
        if self._judge is None:
            self._judge = self._load()
        return self._judge

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_judge": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.source)!r})"

    def _rate(
        self, lr_images: Sequence[Tensor | None], sr_images: Sequence[Tensor | None], labels: Sequence[str]
    ) -> Any:
        for lr_image, sr_image, label in zip(lr_images, sr_images, labels, strict=True):
            if lr_image is not None and sr_image is not None:
                scale_between(lr_image, sr_image, where=f"reward {self.__name__!r}, {label}")
        return rate_pairs(self._rate_batch, lr_images, sr_images, batch_size=self.batch_size)

    def _rate_batch(self, lr_image: Tensor, sr_image: Tensor) -> Tensor:
        device = self.device or _default_device(sr_image.device)
        self.judge.to(device)
        with torch.autocast(device.type, enabled=False):
            lr_image, sr_image = lr_image.to(device), sr_image.to(device)
            if self.checkpoint and torch.is_grad_enabled() and sr_image.requires_grad:
                scores = recompute_in_backward(
                    self.judge.rate, lr_image, sr_image, use_reentrant=False, preserve_rng_state=False
                )
            else:
                scores = self.judge.rate(lr_image, sr_image)
        # The pixels were checked, so the judge is at fault: as NaN it would pass for "not scored" and train nothing.
        if not bool(scores.detach().isfinite().all()):
            raise RewardError(
                f"the judge {str(self.source)!r} gave a score that is not finite",
                where=f"reward {self.__name__!r}",
                fix="check its weights; if it runs in float16, use bfloat16 or float32",
            )
        return scores.to(sr_image.device)


class RefReward(JudgeReward):
    """The LR-conditioned multimodal reward model as a reward: the expected rating, differentiable in the SR pixels.

    Args:
        source: `"default"`, or a folder written by `RefRewardTrainer` or `RateJudge.save_pretrained`.
        device: See `JudgeReward`.
        dtype: Precision of its weights (`"float32"`, `"bfloat16"`, `"float16"`); None for float32.
        batch_size: The most images per call of the judge.
        checkpoint: See `JudgeReward`.

    Example:
        Three lines score an image:

        >>> from refreward_trl.rewards import RefReward
        >>> reward = RefReward.from_pretrained("default")
        >>> reward.score("photo_lr.png", "photo_sr.png")  # doctest: +SKIP
        3.71
    """

    __name__ = "refreward"

    def __init__(
        self,
        source: str | Path = "default",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 16,
        checkpoint: bool = False,
    ) -> None:
        super().__init__(source, device=device, batch_size=batch_size, checkpoint=checkpoint)
        self.dtype = _read_dtype(dtype)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "default",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 16,
    ) -> Self:
        """Returns the reward of a saved judge; see the class for the arguments. The judge loads at the first score."""
        return cls(source, device=device, dtype=dtype, batch_size=batch_size)

    def _load(self) -> RateJudge:
        from refreward_trl.reward_model.loading import load_judge  # takes seconds: transformers

        judge = load_judge(self.source)  # frozen, in eval mode
        if self.dtype is not None:
            judge.model.to(self.dtype)  # pyright: ignore[reportArgumentType] (transformers wraps `to` untyped)
        return judge


def _read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    known = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and known not in DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}", where="reward 'refreward'")
    return known


def _default_device(images: torch.device) -> torch.device:
    if images.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return images
