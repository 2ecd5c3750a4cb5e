"""Fidelity, LR-consistency and reward figures of super-resolution on whole photos, as the generator is deployed.

Every photo goes through the path a user gets (`Generator.generate`), is rounded to 8 bits as a saved file would be,
and only then measured. Baselines and two variants of a latent generator stand beside it: what its autoencoder alone
can do (`reconstruct`, a ceiling) and what is left when its denoiser does nothing (`bypass_denoiser`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan, nan
from statistics import fmean
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from refreward_trl.data.candidates import gaussian_blur
from refreward_trl.data.images import to_float, to_uint8
from refreward_trl.errors import DataError
from refreward_trl.generators.base import Generator
from refreward_trl.generators.module import ModuleGenerator
from refreward_trl.resampling import downscale, upscale
from refreward_trl.rewards.batching import scale_between
from refreward_trl.rewards.composite import score_all
from refreward_trl.rewards.fidelity import image_psnr, image_ssim
from refreward_trl.types import RewardFunction

PROTOCOL = (
    "RGB, whole photos, SR image rounded to 8 bits, no border crop; "
    "LR-PSNR: SR image reduced by anti-aliased bicubic against the LR image"
)
"""How the figures of this module are taken; PSNRs of another protocol must not be compared with them."""

SMOOTHING_SIGMAS = (0.0, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
"""Widths in HR pixels that the smoothed bicubic baseline may choose from."""

Row: TypeAlias = dict[str, Any]
Upscaler: TypeAlias = Callable[[Float[Tensor, "1 3 h w"], Row], Float[Tensor, "1 3 H W"]]
"""LR image and dataset row -> SR image in [0, 1]. Only a ceiling may look at the row's `hr_image`."""
Progress: TypeAlias = Callable[[Sequence[Row]], Iterable[Row]]
"""Wraps the rows to iterate over, as `tqdm` does."""
Keep: TypeAlias = Callable[[str, Tensor], None]


def evaluate_generator(
    generator: Generator,
    dataset: Sequence[Row],
    rewards: Mapping[str, RewardFunction],
    *,
    model: nn.Module | None = None,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> list[Row]:
    """Measures a generator through its deployed path.

    Args:
        generator: The generator.
        dataset: Rows of `PairDataset` in evaluation mode (whole photos); `hr_image` may be missing.
        rewards: Rewards to record, by name.
        model: The denoiser to use instead of the generator's own (the one a trainer prepared).
        progress: Wraps the rows, e.g. `tqdm`.
        keep: See `evaluate_upscaler`.

    Returns:
        One row per photo: `sample_id`, `reward/<name>` (NaN where not scored), `lr_psnr` in dB, `gradient_energy`, and
        `hr_psnr` in dB and `ssim` where the dataset has HR images.
    """
    return evaluate_upscaler(
        lambda lr_image, row: generator.generate(lr_image, _prompts(generator, row), model=model),
        dataset,
        rewards,
        device=generator.device,
        progress=progress,
        keep=keep,
    )


def evaluate_upscaler(
    upscaler: Upscaler,
    dataset: Sequence[Row],
    rewards: Mapping[str, RewardFunction] | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> list[Row]:
    """`evaluate_generator` for anything that makes an SR image of an LR image.

    Args:
        upscaler: See `Upscaler`.
        dataset: As in `evaluate_generator`.
        rewards: Rewards to record, by name.
        device: Where the images are sent.
        progress: Wraps the rows.
        keep: Called with `sample_id` and the measured image, float `(3, H, W)` in [0, 1] of 8-bit values.

    Raises:
        DataError: The dataset is empty, an SR image is no multiple of its LR image, or holds NaN.
    """
    rows = _Rows(dataset)
    if len(rows) == 0:
        raise DataError(
            "the evaluation dataset is empty",
            where="evaluate_upscaler",
            fix="name a split or folder that holds photos",
        )
    return [
        _measure(upscaler, row, rewards or {}, torch.device(device), keep)
        for row in (progress(rows) if progress else rows)
    ]


@dataclass(frozen=True)
class GeneratorReport:
    """A generator beside what it must beat and what bounds it, all on the same photos.

    Attributes:
        sigma: Width of the smoothed bicubic baseline, chosen on these photos.
        generator: Rows of the deployed path.
        bicubic: Rows of bicubic enlargement.
        smoothed: Rows of the smoothed bicubic baseline.
        bypass: Rows with the denoiser switched off; None for a generator without a latent.
        ceiling: Rows of the HR images encoded and decoded; None for a generator without a latent.
    """

    sigma: float
    generator: Sequence[Row]
    bicubic: Sequence[Row]
    smoothed: Sequence[Row]
    bypass: Sequence[Row] | None
    ceiling: Sequence[Row] | None

    @property
    def margin(self) -> float:
        """HR-PSNR of the generator over the better of the two bicubic baselines, in dB."""
        baseline = max(mean_of(self.bicubic, "hr_psnr"), mean_of(self.smoothed, "hr_psnr"))
        return mean_of(self.generator, "hr_psnr") - baseline

    @property
    def detail(self) -> float:
        """Gradient energy of the generator's images over that of bicubic's."""
        return mean_of(self.generator, "gradient_energy") / mean_of(self.bicubic, "gradient_energy")

    @property
    def denoiser_share(self) -> float:
        """HR-PSNR in dB that is lost when the denoiser does nothing; NaN for a generator without a latent."""
        return nan if self.bypass is None else mean_of(self.generator, "hr_psnr") - mean_of(self.bypass, "hr_psnr")

    def summary(self) -> dict[str, dict[str, float]]:
        """The blocks `generator` and `bicubic` of `summary.json`; PSNRs in dB."""
        return {
            "generator": {
                "hr_psnr": mean_of(self.generator, "hr_psnr"),
                "gradient_energy": mean_of(self.generator, "gradient_energy"),
                "vae_ceiling_psnr": nan if self.ceiling is None else mean_of(self.ceiling, "hr_psnr"),
            },
            "bicubic": {
                "hr_psnr": mean_of(self.bicubic, "hr_psnr"),
                "gradient_energy": mean_of(self.bicubic, "gradient_energy"),
                "smoothed_hr_psnr": mean_of(self.smoothed, "hr_psnr"),
                "smoothed_sigma": self.sigma,
            },
        }


def benchmark_generator(
    generator: Generator,
    dataset: Sequence[Row],
    rewards: Mapping[str, RewardFunction],
    *,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> GeneratorReport:
    """Measures a generator, its baselines and its bounds on photos with HR images.

    Args:
        generator: The generator.
        dataset: Whole photos with `hr_image`; read several times, so pass a list where rows are costly to make.
        rewards: Recorded for the generator and for bicubic.
        progress: Wraps the rows of each of the measurements.
        keep: Gets the generator's images, see `evaluate_upscaler`.
    """
    scale, has_latent = generator.scale, not isinstance(generator, ModuleGenerator)
    on_device = partial(evaluate_upscaler, device=generator.device, progress=progress)
    sigma = best_smoothing(dataset, scale)
    return GeneratorReport(
        sigma=sigma,
        generator=evaluate_generator(generator, dataset, rewards, progress=progress, keep=keep),
        bicubic=on_device(bicubic(scale), dataset, rewards),
        smoothed=on_device(smoothed_bicubic(scale, sigma), dataset),
        bypass=on_device(bypass_denoiser(generator), dataset) if has_latent else None,
        ceiling=on_device(reconstruct(generator), dataset) if has_latent else None,
    )


def bicubic(scale: int) -> Upscaler:
    """The baseline every SR method must beat."""
    return lambda lr_image, _: upscale(lr_image, scale)


def smoothed_bicubic(scale: int, sigma: float) -> Upscaler:
    """Bicubic, then a Gaussian of `sigma` HR pixels: on noisy LR images it wins PSNR over plain bicubic for free."""
    if sigma == 0:
        return bicubic(scale)
    return lambda lr_image, _: gaussian_blur(upscale(lr_image, scale)[0], sigma)[None]


def best_smoothing(dataset: Sequence[Row], scale: int, *, sigmas: Sequence[float] = SMOOTHING_SIGMAS) -> float:
    """The width of `sigmas` with the highest mean HR-PSNR on these photos.

    It is chosen on the very photos it is then measured on: a baseline gets the advantage.
    """
    totals = dict.fromkeys(sigmas, 0.0)
    for row in _Rows(dataset):
        lr_image, hr_image = to_float(row["lr_image"])[None], to_float(row["hr_image"])[None]
        for sigma in sigmas:
            smoothed = to_float(to_uint8(smoothed_bicubic(scale, sigma)(lr_image, row)))
            totals[sigma] += image_psnr(smoothed, hr_image).item()
    return max(totals, key=totals.__getitem__)


def bypass_denoiser(generator: Generator) -> Upscaler:
    """The generator with its denoiser switched off: the latent of the upsampled LR image is decoded as it is."""

    def run(lr_image: Tensor, _: Row) -> Tensor:
        with torch.no_grad():
            condition = generator.prepare(lr_image)
            image = generator.decode(generator.encode(condition), condition)
            return generator.postprocess(image, condition).clamp(0, 1)

    return run


def reconstruct(generator: Generator) -> Upscaler:
    """The autoencoder's ceiling: the HR image encoded and decoded. It sees the HR image, so it is no method."""

    def run(lr_image: Tensor, row: Row) -> Tensor:
        with torch.no_grad():
            condition = generator.prepare(lr_image)
            height, width = condition.upsampled.shape[-2:]
            hr_image = to_float(row["hr_image"])[None].to(lr_image.device)
            bottom, right = height - hr_image.shape[-2], width - hr_image.shape[-1]
            padded = F.pad(hr_image, (0, right, 0, bottom), mode="replicate")
            ideal = replace(condition, upsampled=padded)
            return generator.decode(generator.encode(ideal), ideal).clamp(0, 1)

    return run


def gradient_energy(image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """Mean squared difference of neighbouring pixels, rows plus columns: how much detail (or noise) an image holds."""
    across, down = image.diff(dim=-1), image.diff(dim=-2)
    return across.square().mean(dim=(1, 2, 3)) + down.square().mean(dim=(1, 2, 3))


def column(rows: Sequence[Row], name: str) -> list[float]:
    """One figure of all rows, in order."""
    return [row[name] for row in rows]


def mean_of(rows: Sequence[Row], name: str) -> float:
    """Mean of one figure over the photos that have it; NaN when none has."""
    scored = [value for value in column(rows, name) if not isnan(value)]
    return fmean(scored) if scored else nan


def _prompts(generator: Generator, row: Row) -> list[str] | None:
    return [row["prompt"]] if generator.takes_prompts and "prompt" in row else None


class _Rows(Sequence):
    """A dataset as a sequence whose rows are built when their turn comes, so that a progress bar counts that too."""

    def __init__(self, dataset: Sequence[Row]) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Row:
        if index >= len(self._dataset):
            raise IndexError(index)
        return self._dataset[index]


@torch.no_grad()
def super_resolve(
    upscaler: Upscaler, row: Row, device: torch.device
) -> tuple[Float[Tensor, "1 3 h w"], Float[Tensor, "1 3 H W"], int]:
    """Returns a row's LR image, its SR image as an 8-bit file would hold it, both in [0, 1], and the factor between.

    Raises:
        DataError: The SR image is no multiple of its LR image, or holds NaN.
    """
    lr_image = to_float(row["lr_image"])[None].to(device)
    sr_image = to_float(to_uint8(upscaler(lr_image, row)))
    return lr_image, sr_image, scale_between(lr_image[0], sr_image[0], where=f"sample {row['sample_id']!r}")


@torch.no_grad()
def _measure(
    upscaler: Upscaler, row: Row, rewards: Mapping[str, RewardFunction], device: torch.device, keep: Keep | None
) -> Row:
    lr_image, sr_image, scale = super_resolve(upscaler, row, device)
    if keep is not None:
        keep(row["sample_id"], sr_image[0])
    figures: Row = {"sample_id": row["sample_id"]}
    columns: dict[str, Any] = {"sample_id": [row["sample_id"]]}
    if "hr_image" in row:
        hr_image = to_float(row["hr_image"])[None].to(device)
        columns["hr_image"] = hr_image
        figures["hr_psnr"] = image_psnr(sr_image, hr_image).item()
        figures["ssim"] = image_ssim(sr_image, hr_image).item()
    figures["lr_psnr"] = image_psnr(downscale(sr_image, scale), lr_image).item()
    figures["gradient_energy"] = gradient_energy(sr_image).item()
    if rewards:
        table = score_all(
            list(rewards.values()), list(rewards), None, completions=sr_image, lr_image=lr_image, columns=columns
        )
        figures |= {f"reward/{name}": values.item() for name, values in table.per_reward.items()}
    return figures
