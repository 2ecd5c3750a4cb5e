"""Metrics of single images, each with its protocol: formulas of our own, judges, the user's rewards, other packages.

A metric is measured on the 8-bit SR image; what is lower for better images stays so, and says it. Packages that are
not ours are imported when one of their metrics is asked for (`foreign_metrics`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import ConfigError, DataError
from refreward_trl.evaluation.protocols import HR, LR, METRICS, Protocol, digest
from refreward_trl.evaluation.sr_benchmark import gradient_energy
from refreward_trl.rewards import load_reward, reward_name, score_all
from refreward_trl.rewards.composite import RewardSpec
from refreward_trl.rewards.fidelity import SSIM_WINDOW, LRConsistency, image_psnr, image_ssim
from refreward_trl.rewards.heldout import HeldOutJudge
from refreward_trl.rewards.refreward import JudgeReward, RefReward
from refreward_trl.types import RewardFunction

Better: TypeAlias = Literal["higher", "lower", "neither"]
Kind: TypeAlias = Literal["fidelity", "reward", "figure"]

RGB = "RGB"
LUMA = (
    "luma Y of BT.601 as in MATLAB's rgb2ycbcr: (65.481 R + 128.553 G + 24.966 B + 16) / 255 for R, G, B in [0, 1], "
    "so 16/255 to 235/255; Y is not rounded"
)
COLOURS = {"rgb": RGB, "y": LUMA}
LUMA_WEIGHTS = (65.481, 128.553, 24.966)
MAX_PSNR = 100.0
"""PSNR in dB of equal images, which would be infinite and leave no mean."""
NEVER_CAPPED = 200.0


@dataclass(frozen=True)
class Sample:
    """One image to measure, all on one device, float32 in [0, 1]."""

    sample_id: str
    lr_image: Float[Tensor, "1 3 h w"]
    sr_image: Float[Tensor, "1 3 H W"]
    hr_image: Float[Tensor, "1 3 H W"] | None = None


Measure: TypeAlias = Callable[[Sample], float]


@dataclass(frozen=True)
class Metric:
    """A figure of one image.

    Attributes:
        name: What it was asked for by, e.g. "psnr_y:4".
        protocol: How it is taken.
        measure: `Sample -> float`; NaN means not scored. Needs `hr_image` if the protocol is against it.
        better: Which direction is better, if any is.
        kind: "fidelity": distance to a given image. "reward": an opinion of quality. "figure": a description.
        unit: Of the number.
        digits: Decimals to show.
        min_side: Least height and width of the SR image in pixels.
    """

    name: str
    protocol: Protocol
    measure: Measure
    better: Better = "higher"
    kind: Kind = "fidelity"
    unit: str = ""
    digits: int = 3
    min_side: int = 1

    @property
    def needs_hr(self) -> bool:
        """Whether there must be an HR image."""
        return self.protocol.against == HR


def load_metric(word: str, *, device: torch.device | str = "cpu") -> Metric:
    """Makes a metric of the word that asks for it.

    Args:
        word: `NAME` or `NAME:ARGUMENT`, of `protocols.METRICS`; any other name is a reward's dotted path.
        device: Where a network of another package runs; judges choose for themselves.

    Raises:
        ConfigError: There is no such metric or reward, or the argument does not fit.
        SetupError: Its package is not installed.
        CheckpointError: A judge cannot be read.
    """
    from refreward_trl.evaluation import foreign_metrics

    name, _, argument = word.partition(":")
    if name in ("psnr", "ssim"):
        raise ConfigError(
            f"there are several kinds of {name}, which differ by decibels and are never mixed",
            where=f"metric {word!r}",
            fix=f"say {name}_y (luma, as in most SR papers) or {name}_rgb; {name}_y:4 crops a border of 4 pixels",
        )
    if name in ("psnr_rgb", "psnr_y", "ssim_rgb", "ssim_y"):
        return _formula(word, name, _border(word, argument))
    if name == "pyiqa":
        return foreign_metrics.pyiqa_metric(word, argument, device)
    if name in ("refreward", "heldout_judge"):
        return _reward_metric(word, name, {"source": argument} if argument else {})
    if argument:
        raise ConfigError(f"{name} takes no argument, got {argument!r}", where=f"metric {word!r}", fix=f"say {name}")
    if name == "gradient_energy":
        return _gradient_energy(word)
    if name == "stlpips":
        return foreign_metrics.stlpips_metric(word, device)
    if name in foreign_metrics.TORCHMETRICS:
        return foreign_metrics.torchmetrics_metric(word)
    return _reward_metric(word, name, {})


def _border(word: str, argument: str) -> int:
    if argument and not argument.isdecimal():
        raise ConfigError(
            f"the border must be a number of pixels, got {argument!r}", where=f"metric {word!r}", fix="e.g. psnr_y:4"
        )
    return int(argument or 0)


def _formula(word: str, name: str, border: int) -> Metric:
    kind, colour = name.split("_")

    def measure(sample: Sample) -> float:
        assert sample.hr_image is not None
        image, target = (_prepared(each, colour, border) for each in (sample.sr_image, sample.hr_image))
        if kind == "psnr":
            return image_psnr(image, target, cap=NEVER_CAPPED).clamp(max=MAX_PSNR).item()
        return image_ssim(image, target).item()

    details = {
        "psnr": f"10 log10(1 / mean squared error over all pixels and channels), at most {MAX_PSNR:g} dB",
        "ssim": "Gaussian window 11x11, sigma 1.5, K1 0.01, K2 0.03, data range 1, population covariance, windows "
        "wholly inside the image, mean over positions and channels",
    }
    return Metric(
        word,
        Protocol(kind, HR, COLOURS[colour], border, details=details[kind] + "; float64"),
        measure,
        unit="dB" if kind == "psnr" else "",
        digits=2 if kind == "psnr" else 4,
        min_side=2 * border + (1 if kind == "psnr" else SSIM_WINDOW),
    )


def _prepared(image: Float[Tensor, "1 3 H W"], colour: str, border: int) -> Float[Tensor, "1 c h w"]:
    """The image in float64 and the metric's colour space, without its border."""
    image = image[..., border : image.shape[-2] - border, border : image.shape[-1] - border].double()
    return luma(image) if colour == "y" else image


def luma(image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 1 H W"]:
    """BT.601 luma of RGB in [0, 1], in [16 / 255, 235 / 255]."""
    weights = image.new_tensor(LUMA_WEIGHTS).view(3, 1, 1)
    return ((image * weights).sum(dim=1, keepdim=True) + 16) / 255


def _gradient_energy(word: str) -> Metric:
    details = "mean squared difference of horizontal neighbours plus that of vertical ones"
    return Metric(
        word,
        Protocol("gradient_energy", "nothing", RGB, details=details),
        lambda sample: gradient_energy(sample.sr_image).item(),
        better="neither",
        kind="figure",
        digits=5,
        min_side=2,
    )


def _reward_metric(word: str, name: str, kwargs: dict[str, Any]) -> Metric:
    try:
        reward = load_reward(RewardSpec(name, kwargs=kwargs))
    except ConfigError as error:
        if "." in name:
            raise
        raise ConfigError(
            error.what,
            where=f"metric {word!r}",
            fix=f"the metrics are {', '.join(METRICS)}; a reward of your own is a dotted path (my_file.my_reward)",
        ) from error

    def measure(sample: Sample) -> float:
        columns: dict[str, Any] = {"sample_id": [sample.sample_id]}
        if sample.hr_image is not None:
            columns["hr_image"] = sample.hr_image
        table = score_all(
            [reward], [word], None, completions=sample.sr_image, lr_image=sample.lr_image, columns=columns
        )
        return table.per_reward[word].item()

    is_formula = isinstance(reward, LRConsistency)
    return Metric(
        word,
        _reward_protocol(name, reward),
        measure,
        kind="fidelity" if is_formula else "reward",
        unit="dB" if is_formula else "",
        digits=2 if is_formula else 3,
    )


def _reward_protocol(name: str, reward: RewardFunction) -> Protocol:
    if isinstance(reward, LRConsistency):
        return Protocol(
            name,
            LR,
            RGB,
            resampling="SR image reduced by anti-aliased bicubic (refreward_trl.resampling.downscale), not rounded",
            details=f"PSNR in dB; 10 ** (-{reward.cap / 10:g}) is added to the squared error, at most {reward.cap:g}",
        )
    if isinstance(reward, JudgeReward):
        return Protocol(name, LR, RGB, details="score of a learned judge", judge=judge_identity(reward))
    return Protocol(
        name,
        "what the reward chooses",
        RGB,
        details="a reward of the user's",
        package="",
        judge=source_digest(reward),
    )


def judge_identity(reward: JudgeReward) -> str:
    """Names a judge by what it is asked and by its weights, read or of the shipped judge; loads it."""
    judge: Any = reward.judge
    if isinstance(reward, RefReward):
        return f"spec {judge.spec.hash}, weights {_weights_digest(judge.model)}"
    if isinstance(reward, HeldOutJudge):
        return f"weights {_weights_digest(judge)}"
    raise DataError(
        f"{type(reward).__name__} says neither question nor weights",
        where="judge",
        fix="use refreward or heldout_judge",
    )


def _weights_digest(network: torch.nn.Module) -> str:
    """Digest of all weights as they are computed with: another precision is another judge."""
    parts = []
    for name, tensor in sorted(network.state_dict().items()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        parts.append(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest(*parts)


def source_digest(reward: RewardFunction) -> str:
    target: Any = getattr(reward, "func", reward)
    target = target if inspect.isroutine(target) else type(target)
    try:
        file = inspect.getsourcefile(target)
    except TypeError:
        file = None
    source = digest(Path(file).read_bytes()) if file else "unknown"
    return f"{reward_name(reward)}, source {source}"
