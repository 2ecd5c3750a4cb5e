"""The reward model as a reward: `RefReward` scores SR images against their LR images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from refreward_trl.errors import ConfigError, RewardError
from refreward_trl.rewards.batching import is_single_image, rate_pairs, read_images, sample_labels, scale_between
from refreward_trl.rewards.score_cache import ScoreCache

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
    checkpoints: ClassVar[tuple[bool | str, ...]] = (False, True)
    """What `checkpoint` may be."""

    def __init__(
        self,
        source: str | Path = "default",
        *,
        device: str | torch.device | None = None,
        batch_size: int = 16,
        checkpoint: bool | Literal["blocks"] = False,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {batch_size}", where=f"reward {self.__name__!r}")
        if checkpoint not in self.checkpoints:
            raise ConfigError(
                f"checkpoint must be one of {', '.join(map(repr, self.checkpoints))}, got {checkpoint!r}",
                where=f"reward {self.__name__!r}",
            )
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

    def locate(self) -> Path | None:
        """Returns the folder of the judge on this disk; None where it is a name on the hub. Loads nothing.

        Raises:
            CheckpointError: It is neither.
        """
        from refreward_trl.reward_model.loading import locate_folder  # takes seconds: transformers

        return locate_folder(self.source)

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

    @property
    def _may_refuse(self) -> bool:
        """Whether NaN is an answer of the judge that holds no score, and not a number gone wrong."""
        return False

    def _score_batch(self, lr_image: Tensor, sr_image: Tensor) -> Tensor:
        return self.judge.rate(lr_image, sr_image)

    def _rate_batch(self, lr_image: Tensor, sr_image: Tensor) -> Tensor:
        device = self.device or _default_device(sr_image.device)
        self.judge.to(device)
        with torch.autocast(device.type, enabled=False):
            lr_image, sr_image = lr_image.to(device), sr_image.to(device)
            if self.checkpoint and self.checkpoint != "blocks" and torch.is_grad_enabled() and sr_image.requires_grad:
                scores = recompute_in_backward(
                    self._score_batch, lr_image, sr_image, use_reentrant=False, preserve_rng_state=False
                )
            else:
                scores = self._score_batch(lr_image, sr_image)
        # The pixels were checked, so the judge is at fault: as NaN it would pass for "not scored" and train nothing.
        if not self._may_refuse and not bool(scores.detach().isfinite().all()):
            raise RewardError(
                f"the judge {str(self.source)!r} gave a score that is not finite",
                where=f"reward {self.__name__!r}",
                fix="check its weights; if it runs in float16, use bfloat16 or float32",
            )
        return scores.to(sr_image.device)


class RefReward(JudgeReward):
    """The LR-conditioned multimodal reward model as a reward: the expected rating, differentiable in the SR pixels.

    Args:
        source: `"default"`; a folder written by `RefRewardTrainer`, `MLLMJudge.save_pretrained` or stock transformers;
            a folder with a LoRA adapter; or a name on the Hugging Face Hub.
        device: See `JudgeReward`.
        dtype: Precision of its weights (`"float32"`, `"bfloat16"`, `"float16"`); None for float32.
        batch_size: The most images per call of the judge.
        checkpoint: As in `JudgeReward`; or `"blocks"`: recompute block by block, which alone makes a single
            call smaller. The candidates of a group then share no work where there is a gradient.
        ask: `"rate"`; or `"reason"`: the judge thinks in words first. Then the reward is not differentiable, and an
            answer that holds no rating is no score.
        spec: JSON file of the judge's spec, where its folder has none.
        quantization: `"8bit"` or `"4bit"`; needs bitsandbytes.
        share_lr: Let neighbouring rows with equal LR images, such as the candidates of a group, share the work on
            them. It changes a score by rounding only.
        cache: An SQLite file of scores to keep and look up; scores with a graph are neither.
        batch_tokens: The most tokens per forward of the judge, if that is fewer images than `batch_size`.
        num_samples: With `ask="reason"`, answers per image; their mean is the score.
        temperature: With `ask="reason"`, of sampling; several samples need one above 0.

    Example:
        Three lines score an image:

        >>> from refreward_trl.rewards import RefReward
        >>> reward = RefReward.from_pretrained("default")
        >>> reward.score("photo_lr.png", "photo_sr.png")  # doctest: +SKIP
        3.71
    """

    __name__ = "refreward"
    checkpoints = (False, True, "blocks")

    def __init__(
        self,
        source: str | Path = "default",
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        batch_size: int = 16,
        checkpoint: bool | Literal["blocks"] = False,
        ask: Literal["rate", "reason"] = "rate",
        spec: str | Path | None = None,
        quantization: Literal["8bit", "4bit"] | None = None,
        share_lr: bool = True,
        cache: str | Path | None = None,
        batch_tokens: int | None = None,
        num_samples: int = 1,
        temperature: float = 0.0,
    ) -> None:
        super().__init__(source, device=device, batch_size=batch_size, checkpoint=checkpoint)
        if ask not in ("rate", "reason"):
            raise ConfigError(f"ask must be 'rate' or 'reason', got {ask!r}", where="reward 'refreward'")
        self.dtype = _read_dtype(dtype)
        self.ask = ask
        self.spec = spec
        self.quantization: Literal["8bit", "4bit"] | None = quantization
        self.share_lr = share_lr
        self.cache = cache
        self.limits: dict[str, Any] = {"batch_size": batch_size, "batch_tokens": batch_tokens}
        self.sampling: dict[str, Any] = {"num_samples": num_samples, "temperature": temperature}
        if ask == "rate" and (num_samples, temperature) != (1, 0.0):
            raise ConfigError("num_samples and temperature go with ask: reason", where="reward 'refreward'")
        self._cache: ScoreCache | None = None

    @classmethod
    def from_pretrained(cls, source: str | Path = "default", **options: Any) -> Self:
        """Returns the reward of a judge; see the class for the arguments. The judge loads at the first score."""
        return cls(source, **options)

    def _load(self) -> Judge:
        from refreward_trl.reward_model.loading import load_judge_as  # takes seconds: transformers
        from refreward_trl.reward_model.scoring import RateJudge

        kind: Any = RateJudge
        options = self.limits
        if self.ask == "reason":
            from refreward_trl.reward_model.reasoning import ReasonJudge as kind

            options = self.limits | self.sampling
        return load_judge_as(
            kind,
            self.source,
            spec=self.spec,
            dtype=self.dtype or torch.float32,
            quantization=self.quantization,
            device=self.device or "cpu",
            **options,
        )

    @property
    def _may_refuse(self) -> bool:
        return self.ask == "reason"

    def _score_batch(self, lr_image: Tensor, sr_image: Tensor) -> Tensor:
        if torch.is_grad_enabled() and sr_image.requires_grad:
            return self._ask_with_graph(lr_image, sr_image)
        cache = self._open_cache()
        if cache is None:
            return self._ask(lr_image, sr_image)
        keys = [cache.key(*pair) for pair in zip(lr_image, sr_image, strict=True)]
        known = cache.find(keys)
        rows = [row for row, score in enumerate(known) if score is None]
        scores = torch.tensor([math.nan if score is None else score for score in known], device=sr_image.device)
        if rows:
            scores[rows] = self._ask(lr_image[rows], sr_image[rows]).to(scores.dtype)
            cache.store({keys[row]: scores[row].item() for row in rows})
        return scores

    def _ask(self, lr_image: Tensor, sr_image: Tensor) -> Tensor:
        shared: Any = getattr(self.judge, "rate_neighbours", None) if self.share_lr else None
        return (shared or self.judge.rate)(lr_image, sr_image)

    def _ask_with_graph(self, lr_image: Tensor, sr_image: Tensor) -> Tensor:
        if self.checkpoint != "blocks":
            return self._ask(lr_image, sr_image)
        from refreward_trl.reward_model.recomputation import recomputed_blocks

        judge: Any = self.judge
        with recomputed_blocks(judge.model):
            return judge.rate(lr_image, sr_image)

    def _open_cache(self) -> ScoreCache | None:
        if self.cache is not None and self._cache is None:
            judge: Any = self.judge
            settings = f"{self.ask}|{self.dtype}|{self.quantization}|{self.sampling}"
            self._cache = ScoreCache(self.cache, identity=f"{judge.weights_digest()}|{judge.spec.hash}|{settings}")
        return self._cache

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_cache": None}


def _read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    known = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and known not in DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}", where="reward 'refreward'")
    return known


def _default_device(images: torch.device) -> torch.device:
    if images.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return images
