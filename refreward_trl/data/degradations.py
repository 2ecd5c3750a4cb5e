"""Seeded degradations HR -> LR: the second-order pipelines that SR papers train on, and a mild bicubic one.

A degradation happens in two steps: `draw_settings` turns a preset (ranges and probabilities) into one concrete
`DegradationSettings`, and `apply_settings` runs it. Both draw from the generator that they are given and from nothing
else, so an LR image is a pure function of the HR image, the preset and the seed.

The second-order pipeline is that of Real-ESRGAN (Wang et al. 2021, arXiv 2107.10833, section 3): twice blur, resize,
noise and JPEG, where the last resize, a sinc filter (ringing) and the last JPEG come in random order. Resizing is not
anti-aliased there, on purpose: aliasing is one of the degradations. The numbers are those of the published configs.
"""

from __future__ import annotations

import difflib
import io
import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from refreward_trl.data.images import from_pil, to_float, to_pil, to_uint8
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.resampling import downscale

T = TypeVar("T")
Range: TypeAlias = tuple[float, float]
KernelKind: TypeAlias = Literal[
    "iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso", "sinc"
]
ResizeMode: TypeAlias = Literal["area", "bilinear", "bicubic"]

KERNEL_MIX: dict[KernelKind, float] = {
    "iso": 0.45,
    "aniso": 0.25,
    "generalized_iso": 0.12,
    "generalized_aniso": 0.03,
    "plateau_iso": 0.12,
    "plateau_aniso": 0.03,
}
"""Probability of each shape among the kernels that are not sinc; all presets share it."""

RESIZE_MODES: tuple[ResizeMode, ...] = ("area", "bilinear", "bicubic")

PHOTONS_AT_WHITE = 256.0
"""Poisson counts at value 1. Real-ESRGAN counts distinct grey levels, rounded up to a power of two: 256 for photos."""


@dataclass(frozen=True)
class StagePreset:
    """Ranges and probabilities of one blur -> resize -> noise -> JPEG stage. Every range is uniform, ends included.

    Attributes:
        blur_prob: Probability that the stage blurs at all.
        kernel_sizes: Odd kernel sides in pixels, equally likely.
        sigma: Gaussian standard deviation per axis, in pixels.
        beta_generalized: Shape exponent of generalized Gaussians; below and above 1 are equally likely.
        beta_plateau: The same for plateau kernels.
        sinc_prob: Probability of a sinc kernel instead of one of `KERNEL_MIX`.
        resize_prob: Probabilities of enlarging, shrinking, keeping.
        resize_range: Smallest and largest factor (of the input in stage 1, of the LR size in stage 2).
        gaussian_prob: Probability of Gaussian noise; Poisson noise otherwise.
        gaussian_sigma: Its standard deviation in 8-bit steps (of 255).
        poisson_scale: Multiplier of the Poisson noise.
        gray_prob: Probability that the noise is the same in all three channels.
        jpeg_quality: Pillow's JPEG quality, whole numbers; 4:2:0 chroma.
    """

    resize_range: Range
    gaussian_sigma: Range
    poisson_scale: Range
    jpeg_quality: tuple[int, int]
    sigma: Range
    blur_prob: float = 1.0
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)
    beta_generalized: Range = (0.5, 4.0)
    beta_plateau: Range = (1.0, 2.0)
    kernel_sizes: tuple[int, ...] = tuple(range(7, 22, 2))
    sinc_prob: float = 0.1
    gaussian_prob: float = 0.5
    gray_prob: float = 0.4


@dataclass(frozen=True)
class DegradationPreset:
    """A distribution over degradations.

    Attributes:
        name: The preset's name in recipes.
        description: One line for help texts and reports.
        stages: Two stages (second order), or none: anti-aliased bicubic downscale plus `mild_sigma` noise.
        final_sinc_prob: Probability of the last sinc filter; without stages it is not used.
        no_degradation_prob: Share of samples that get the anti-aliased bicubic downscale alone.
        mild_sigma: Standard deviation of the Gaussian noise after a bicubic downscale, in [0, 1] units.
    """

    name: str
    description: str
    stages: tuple[StagePreset, StagePreset] | None
    final_sinc_prob: float = 0.8
    no_degradation_prob: float = 0.0
    mild_sigma: Range = (0.0, 0.0)


@dataclass(frozen=True)
class KernelSettings:
    """One blur kernel; `cutoff` (radians per pixel) is used by "sinc" only, the others by all the rest."""

    kind: KernelKind
    size: int
    sigma_x: float = 0.0
    sigma_y: float = 0.0
    rotation: float = 0.0
    beta: float = 1.0
    cutoff: float = math.pi


@dataclass(frozen=True)
class NoiseSettings:
    """One noise: Gaussian `strength` is a sigma in [0, 1] units, Poisson `strength` a multiplier."""

    kind: Literal["gaussian", "poisson"]
    strength: float
    gray: bool


@dataclass(frozen=True)
class StageSettings:
    """What one stage does: blur (or not), resize by a factor, noise, JPEG."""

    kernel: KernelSettings | None
    resize_factor: float
    resize_mode: ResizeMode
    noise: NoiseSettings
    jpeg_quality: int


@dataclass(frozen=True)
class DegradationSettings:
    """One concrete degradation, drawn by `draw_settings`. Without `stages` it is bicubic plus `mild_sigma` noise."""

    stages: tuple[StageSettings, StageSettings] | None = None
    final_resize_mode: ResizeMode = "bicubic"
    final_kernel: KernelSettings | None = None
    sinc_before_jpeg: bool = True
    mild_sigma: float = 0.0


_SECOND_RESIZE_PROB = (0.3, 0.4, 0.3)

PRESETS: dict[str, DegradationPreset] = {
    preset.name: preset
    for preset in (
        DegradationPreset(
            name="realesrgan",
            description="heavy second-order degradation of Real-ESRGAN (also OSEDiff, HYPIR, VOSR)",
            stages=(
                StagePreset(
                    (0.15, 1.5), gaussian_sigma=(1, 30), poisson_scale=(0.05, 3), jpeg_quality=(30, 95), sigma=(0.2, 3)
                ),
                StagePreset(
                    (0.3, 1.2),
                    gaussian_sigma=(1, 25),
                    poisson_scale=(0.05, 2.5),
                    jpeg_quality=(30, 95),
                    sigma=(0.2, 1.5),
                    blur_prob=0.8,
                    resize_prob=_SECOND_RESIZE_PROB,
                ),
            ),
        ),
        DegradationPreset(
            name="seesr",
            description="light second-order degradation of SeeSR (also PiSA-SR, GDPO-SR)",
            stages=(
                StagePreset(
                    (0.3, 1.5), gaussian_sigma=(1, 15), poisson_scale=(0.05, 2), jpeg_quality=(60, 95), sigma=(0.2, 3)
                ),
                StagePreset(
                    (0.6, 1.2),
                    gaussian_sigma=(1, 12),
                    poisson_scale=(0.05, 1),
                    jpeg_quality=(60, 100),
                    sigma=(0.2, 1.5),
                    blur_prob=0.5,
                    resize_prob=_SECOND_RESIZE_PROB,
                ),
            ),
        ),
        DegradationPreset(
            name="stablesr",
            description="light second-order degradation of StableSR with less blur (also S3Diff); 1 % plain bicubic",
            # StableSR's configs name kernel sizes 21 and 11, but its dataset never reads them: it draws 7 to 21.
            stages=(
                StagePreset(
                    (0.3, 1.5),
                    gaussian_sigma=(1, 15),
                    poisson_scale=(0.05, 2),
                    jpeg_quality=(60, 95),
                    sigma=(0.2, 1.5),
                    beta_generalized=(0.5, 2),
                    beta_plateau=(1, 1.5),
                ),
                StagePreset(
                    (0.6, 1.2),
                    gaussian_sigma=(1, 12),
                    poisson_scale=(0.05, 1),
                    jpeg_quality=(60, 100),
                    sigma=(0.2, 1.0),
                    blur_prob=0.5,
                    resize_prob=_SECOND_RESIZE_PROB,
                    beta_generalized=(0.5, 2),
                    beta_plateau=(1, 1.5),
                ),
            ),
            no_degradation_prob=0.01,
        ),
        DegradationPreset(
            name="bicubic",
            description="mild: anti-aliased bicubic downscale and Gaussian noise, sigma U(0, 0.015); no blur, no JPEG",
            stages=None,
            mild_sigma=(0.0, 0.015),
        ),
    )
}


def get_preset(preset: str | DegradationPreset) -> DegradationPreset:
    """Returns the preset of that name (a preset object passes through).

    Raises:
        ConfigError: No preset has that name; the message names the nearest one.
    """
    if isinstance(preset, DegradationPreset):
        return preset
    if preset in PRESETS:
        return PRESETS[preset]
    near = difflib.get_close_matches(preset, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"unknown degradation {preset!r}", where="degradation", fix=f"{hint}Presets: {', '.join(PRESETS)}"
    )


@torch.no_grad()
def degrade(
    hr_image: Float[Tensor, "3 H W"], preset: str | DegradationPreset, *, generator: torch.Generator, scale: int = 4
) -> Float[Tensor, "3 h w"]:
    """Degrades one HR image to its LR image.

    Args:
        hr_image: Float `(3, H, W)` in [0, 1] on the CPU; H and W are multiples of `scale`.
        preset: A preset or its name in `PRESETS`.
        generator: CPU generator; the only source of randomness.
        scale: Super-resolution factor.

    Returns:
        Float `(3, H / scale, W / scale)` in [0, 1] whose values are multiples of 1/255.

    Raises:
        DataError: The image has another shape, or a side that is not a multiple of `scale`.
        ConfigError: The preset is unknown.
    """
    preset = get_preset(preset)
    return apply_settings(hr_image, draw_settings(preset, generator), generator=generator, scale=scale)


def draw_settings(preset: DegradationPreset, generator: torch.Generator) -> DegradationSettings:
    """Draws one concrete degradation from a preset; the noise itself is drawn later, by `apply_settings`."""
    draw = _Draw(generator)
    if preset.stages is None or draw.chance(preset.no_degradation_prob):
        return DegradationSettings(mild_sigma=draw.uniform(preset.mild_sigma))
    first, second = (_draw_stage(stage, draw) for stage in preset.stages)
    sizes = preset.stages[1].kernel_sizes
    has_sinc = draw.chance(preset.final_sinc_prob)
    return DegradationSettings(
        stages=(first, second),
        final_resize_mode=draw.choose(RESIZE_MODES),
        final_kernel=KernelSettings("sinc", draw.choose(sizes), cutoff=draw.uniform((math.pi / 3, math.pi)))
        if has_sinc
        else None,
        sinc_before_jpeg=draw.chance(0.5),
    )


@torch.no_grad()
def apply_settings(
    hr_image: Float[Tensor, "3 H W"], settings: DegradationSettings, *, generator: torch.Generator, scale: int = 4
) -> Float[Tensor, "3 h w"]:
    """Runs one concrete degradation. Arguments, result and errors are those of `degrade`."""
    height, width = _lr_size(hr_image, scale)
    image = hr_image[None]
    if settings.stages is None:
        image = downscale(image, scale)
        if settings.mild_sigma > 0:
            image = image + settings.mild_sigma * _randn(image, generator)
        return to_float(to_uint8(image[0]))

    first, second = settings.stages
    image = _apply_blur(image, first.kernel)
    size = (hr_image.shape[-2] * first.resize_factor, hr_image.shape[-1] * first.resize_factor)
    image = _resize(image, size, first.resize_mode)
    image = _jpeg(_add_noise(image, first.noise, generator), first.jpeg_quality)

    image = _apply_blur(image, second.kernel)
    size = (height * second.resize_factor, width * second.resize_factor)
    image = _resize(image, size, second.resize_mode)
    image = _add_noise(image, second.noise, generator)

    if settings.sinc_before_jpeg:
        image = _apply_blur(_resize(image, (height, width), settings.final_resize_mode), settings.final_kernel)
        image = _jpeg(image, second.jpeg_quality)
    else:
        image = _jpeg(image, second.jpeg_quality)
        image = _apply_blur(_resize(image, (height, width), settings.final_resize_mode), settings.final_kernel)
    return to_float(to_uint8(image[0]))


def blur_kernel(settings: KernelSettings) -> Float[Tensor, "k k"]:
    """Returns the `(size, size)` float kernel; it sums to 1 and is symmetric about its centre.

    Generalized Gaussian exp(-q^beta / 2) and plateau 1 / (1 + q^beta) with q = x' S^-1 x (Real-ESRGAN, section 3.1;
    with beta 1 the former is a Gaussian); "sinc" is the 2-D circular low-pass cutoff * J1(cutoff * r) / (2 pi r).
    """
    axis = torch.arange(settings.size, dtype=torch.float64) - settings.size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    if settings.kind == "sinc":
        radius = torch.sqrt(x**2 + y**2)
        values = settings.cutoff * torch.special.bessel_j1(settings.cutoff * radius) / (2 * math.pi * radius)
        values[settings.size // 2, settings.size // 2] = settings.cutoff**2 / (4 * math.pi)  # the limit at r = 0
    else:
        cos, sin = math.cos(settings.rotation), math.sin(settings.rotation)
        along, across = (cos * x + sin * y) / settings.sigma_x, (cos * y - sin * x) / settings.sigma_y
        quadratic = along**2 + across**2
        if settings.kind.startswith("plateau"):
            values = 1 / (1 + quadratic**settings.beta)
        else:
            values = torch.exp(-0.5 * quadratic**settings.beta)
    return (values / values.sum()).float()


@dataclass
class _Draw:
    """Scalar draws from one generator."""

    generator: torch.Generator
    _unit: Tensor = field(default_factory=lambda: torch.empty((), dtype=torch.float64))

    def unit(self) -> float:
        return float(self._unit.uniform_(generator=self.generator))

    def uniform(self, limits: Range) -> float:
        return limits[0] + (limits[1] - limits[0]) * self.unit()

    def chance(self, probability: float) -> bool:
        return self.unit() < probability

    def choose(self, options: tuple[T, ...], weights: tuple[float, ...] | None = None) -> T:
        weights = weights or (1.0,) * len(options)
        remaining = self.unit() * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            remaining -= weight
            if remaining < 0:
                return option
        return options[-1]

    def integer(self, limits: tuple[int, int]) -> int:
        return min(limits[1], limits[0] + int(self.unit() * (limits[1] - limits[0] + 1)))


def _draw_stage(stage: StagePreset, draw: _Draw) -> StageSettings:
    kernel = _draw_kernel(stage, draw) if draw.chance(stage.blur_prob) else None
    low, high = stage.resize_range
    limits = draw.choose(((1.0, high), (low, 1.0), (1.0, 1.0)), stage.resize_prob)
    factor = draw.uniform(limits)
    mode: ResizeMode = draw.choose(RESIZE_MODES)
    if draw.chance(stage.gaussian_prob):
        noise = NoiseSettings("gaussian", draw.uniform(stage.gaussian_sigma) / 255, draw.chance(stage.gray_prob))
    else:
        noise = NoiseSettings("poisson", draw.uniform(stage.poisson_scale), draw.chance(stage.gray_prob))
    return StageSettings(kernel, factor, mode, noise, draw.integer(stage.jpeg_quality))


def _draw_kernel(stage: StagePreset, draw: _Draw) -> KernelSettings:
    size = draw.choose(stage.kernel_sizes)
    if draw.chance(stage.sinc_prob):
        # Real-ESRGAN lets only large kernels cut off low: a small one cannot hold the rings.
        return KernelSettings("sinc", size, cutoff=draw.uniform((math.pi / (3 if size < 13 else 5), math.pi)))
    kind: KernelKind = draw.choose(tuple(KERNEL_MIX), tuple(KERNEL_MIX.values()))
    sigma_x = draw.uniform(stage.sigma)
    sigma_y, rotation = sigma_x, 0.0
    if kind.endswith("aniso"):
        sigma_y, rotation = draw.uniform(stage.sigma), draw.uniform((-math.pi, math.pi))
    beta = 1.0
    if kind.startswith(("generalized", "plateau")):
        low, high = stage.beta_generalized if kind.startswith("generalized") else stage.beta_plateau
        beta = draw.uniform((low, 1.0) if draw.chance(0.5) else (1.0, high))
    return KernelSettings(kind, size, sigma_x, sigma_y, rotation, beta)


def _lr_size(hr_image: Tensor, scale: int) -> tuple[int, int]:
    shape = tuple(hr_image.shape)
    if len(shape) != 3 or shape[0] != 3 or not hr_image.is_floating_point():
        raise DataError(
            f"expected a float image (3, H, W) in [0, 1], got {hr_image.dtype} of shape {shape}", where="hr_image"
        )
    if min(shape[1:]) < scale or shape[1] % scale or shape[2] % scale:
        raise DataError(
            f"size {shape[2]}x{shape[1]} is not a multiple of scale {scale}",
            where="hr_image",
            fix=f"crop the HR image to a multiple of {scale}",
        )
    return shape[1] // scale, shape[2] // scale


def _apply_blur(image: Tensor, settings: KernelSettings | None) -> Tensor:
    if settings is None:
        return image
    # By FFT: a 21x21 depthwise convolution takes three times as long on one CPU thread.
    half = settings.size // 2
    mode = "reflect" if half < min(image.shape[-2:]) else "replicate"
    padded = F.pad(image, (half,) * 4, mode=mode)
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(blur_kernel(settings), s=size)
    return torch.fft.irfft2(spectrum, s=size)[..., settings.size - 1 :, settings.size - 1 :]


def _resize(image: Tensor, size: tuple[float, float], mode: ResizeMode) -> Tensor:
    target = (max(1, int(size[0])), max(1, int(size[1])))
    if target == tuple(image.shape[-2:]):
        return image
    align_corners = None if mode == "area" else False
    return F.interpolate(image, size=target, mode=mode, align_corners=align_corners)


def _add_noise(image: Tensor, settings: NoiseSettings, generator: torch.Generator) -> Tensor:
    image = image.clamp(0, 1)
    if settings.kind == "gaussian":
        noise = _randn(image[:, :1] if settings.gray else image, generator)
    else:
        clean = _luma(image) if settings.gray else image
        noise = torch.poisson(clean * PHOTONS_AT_WHITE, generator=generator) / PHOTONS_AT_WHITE - clean
    return (image + settings.strength * noise).clamp(0, 1)


def _luma(image: Tensor) -> Tensor:
    return (image * image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)


def _randn(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    to_pil(image[0]).save(buffer, "JPEG", quality=quality, subsampling=2)
    with Image.open(buffer, formats=("JPEG",)) as decoded:
        return to_float(from_pil(decoded))[None]
