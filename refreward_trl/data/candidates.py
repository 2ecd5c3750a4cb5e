"""Constructed candidates of one LR image whose order is known because of how they were made.

The HR image is better than any artefact put on it, a mild artefact better than a severe one, a candidate moved towards
the HR image better than the one it came from, and so on. These orders are facts about construction; they are not human
opinion and are never called so.

Most artefacts leak into the low-resolution band, where a plain LR-consistency score finds them. A *back-projected*
candidate has the HR image's own low-resolution content put back, so that only what cannot be read off the LR image by
down-sampling tells the two apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Generator, Tensor

from refreward_trl.data.degradations import degrade
from refreward_trl.data.preferences import PreferenceGroup, PreferencePair
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.randomness import stateless_generator
from refreward_trl.resampling import downscale, upscale

RGB = Float[Tensor, "3 H W"]
Artefact = Callable[[Tensor, float, Generator, Tensor], Tensor]

EVALUATION_COLUMNS = (
    "artefact",
    "severity",
    "other_crop",
    "pasted_detail",
    "unseen_artefact",
    "unseen_severity",
    "projected_artefact",
    "projected_severity",
    "projected_pasted_detail",
    "projected_unseen_artefact",
)


def uniform(generator: Generator, low: float, high: float) -> float:
    """Returns one uniform draw from `[low, high)`."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def integer(generator: Generator, low: int, high: int) -> int:
    """Returns one integer draw from `low..high - 1`."""
    return int(torch.randint(low, high, (), generator=generator))


def gaussian_blur(image: RGB, sigma: float) -> RGB:
    """Blurs with a Gaussian of `sigma` pixels, mirrored borders."""
    radius = max(2, math.ceil(3 * sigma))
    taps = torch.exp(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()
    padded = F.pad(image[None], (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, taps.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)
    return F.conv2d(rows, taps.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)[0]


def _line_blur(image: Tensor, length: int, horizontal: bool) -> Tensor:
    taps = torch.full((3, 1, 1, length) if horizontal else (3, 1, length, 1), 1.0 / length)
    pad = (length // 2, length // 2, 0, 0) if horizontal else (0, 0, length // 2, length // 2)
    return F.conv2d(F.pad(image[None], pad, mode="reflect"), taps, groups=3)[0]


def _jpeg(image: Tensor, quality: int) -> Tensor:
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    decoded = torch.frombuffer(bytearray(Image.open(buffer).convert("RGB").tobytes()), dtype=torch.uint8)
    return decoded.view(*image.shape[1:], 3).permute(2, 0, 1).float() / 255


def _blur(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    return gaussian_blur(image, 0.6 + 2.4 * severity)


def _noise(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    return image + torch.randn(image.shape, generator=generator) * (0.02 + 0.12 * severity)


def _jpeg_artefact(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    return _jpeg(image, int(60 - 52 * severity))


def _oversharpen(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    return image + (1 + 4 * severity) * (image - gaussian_blur(image, 1.2))


def _hallucination(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    return image + (0.3 + 0.9 * severity) * (other - gaussian_blur(other, 2.0))


def _colour(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    direction = torch.rand(3, generator=generator) * 2 - 1
    direction = direction / direction.abs().max().clamp(min=0.3)
    return image * (1 + direction.view(3, 1, 1) * (0.05 + 0.3 * severity))


def _shift(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    """Moves a patch of half the image's side: locally misplaced structure."""
    size = min(image.shape[1:]) // 2
    top = integer(generator, 0, image.shape[1] - size + 1)
    left = integer(generator, 0, image.shape[2] - size + 1)
    distance = int(2 + 14 * severity)
    dy, dx = (distance * (2 * integer(generator, 0, 2) - 1) for _ in range(2))
    window = (slice(None), slice(top, top + size), slice(left, left + size))
    moved = image.clone()
    moved[window] = torch.roll(image, (dy, dx), (1, 2))[window]
    return moved


def _painting(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    """A median filter: the flat, painted look of over-smoothed detail."""
    radius = 1 + round(3 * severity)
    side = 2 * radius + 1
    padded = F.pad(image[:, None], (radius,) * 4, mode="reflect")
    median = F.unfold(padded, side).median(1).values.view_as(image)
    return torch.lerp(image, median, 0.4 + 0.6 * severity)


def _neighbours(image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the pixels to the right, left, below and above, mirrored at the borders."""
    padded = F.pad(image[None], (1,) * 4, mode="reflect")[0]
    return padded[:, 1:-1, 2:], padded[:, 1:-1, :-2], padded[:, 2:, 1:-1], padded[:, :-2, 1:-1]


def _diffuse(image: Tensor, edge: float, steps: int) -> Tensor:
    """Perona-Malik diffusion: evens out what is weaker than `edge` and leaves stronger edges alone."""
    for _ in range(steps):
        flows = [pixels - image for pixels in _neighbours(image)]
        image = image + 0.2 * sum(flow * torch.exp(-((flow.mean(0, keepdim=True) / edge) ** 2)) for flow in flows)
    return image


def _shock(image: Tensor, sigma: float, steps: int) -> Tensor:
    """A shock filter (Osher and Rudin): pulls ramps apart into edges at the zeros of the Laplacian."""
    for _ in range(steps):
        grey = gaussian_blur(image, sigma).mean(0, keepdim=True)
        curvature = sum(_neighbours(grey)) - 4 * grey
        right, left, below, above = _neighbours(image)
        slope = torch.hypot(_minmod(right - image, image - left), _minmod(below - image, image - above))
        image = image - 0.5 * torch.tanh(200 * curvature) * slope
    return image


def _minmod(first: Tensor, second: Tensor) -> Tensor:
    return torch.where(first * second > 0, first.sign() * torch.minimum(first.abs(), second.abs()), 0.0)


def _flatten(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    """Clean edges around flat paint: how adversarially trained networks draw texture that they cannot see."""
    shock_sigma, shock_steps = uniform(generator, 0.8, 2.0), integer(generator, 0, 16)
    crispness, softness = uniform(generator, 0, 1.2), uniform(generator, 0.3, 0.7)
    flat = _diffuse(image, 0.02 + 0.08 * severity, 8 + round(16 * severity))
    flat = gaussian_blur(_shock(flat, shock_sigma, shock_steps), softness)
    return torch.lerp(image, flat + crispness * (flat - gaussian_blur(flat, 1.2)), 0.5 + 0.5 * severity)


def _warp(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    height, width = image.shape[1:]
    coarse = torch.randn(1, 2, max(3, height // 10), max(3, width // 10), generator=generator)
    flow = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0] * (1 + 4 * severity)
    flow = flow * torch.tensor([2 / width, 2 / height]).view(2, 1, 1)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = (torch.stack([columns, rows]) + flow).permute(1, 2, 0)
    return F.grid_sample(image[None], grid[None], mode="bicubic", padding_mode="reflection", align_corners=True)[0]


def _checkerboard(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    """The pattern of transposed convolutions, stronger where the image has detail."""
    rows, columns = (torch.arange(side) for side in image.shape[1:])
    pattern = ((rows[:, None] + columns[None]) % 2) * 2.0 - 1
    detail = (image - gaussian_blur(image, 1.5)).abs().mean(0, keepdim=True)
    return image + pattern * (0.02 + 0.12 * severity) * (0.4 + 0.6 * detail / (detail.max() + 1e-6))


def _motion_blur(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    return _line_blur(image, 3 + 2 * round(5 * severity), horizontal=bool(integer(generator, 0, 2)))


def _ringing(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    """A sharp low-pass in the Fourier domain: ripples beside every edge."""
    height, width = image.shape[1:]
    radius = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    kept = torch.fft.rfft2(image) * (radius < 0.30 - 0.2 * severity)
    return torch.fft.irfft2(kept, s=(height, width))


def _posterize(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    levels = 24 - 19 * severity
    return (image * levels).round() / levels


def _speckle(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    return image * (1 + torch.randn(image.shape[1:], generator=generator) * (0.08 + 0.4 * severity))


def _kuwahara(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    """A Kuwahara filter: each pixel takes the mean of the most even of the four squares that touch it."""
    side = 2 + round(3 * severity)
    padded = F.pad(image[None], (side - 1,) * 4, mode="reflect")
    means = F.avg_pool2d(padded, side, stride=1)[0]
    spreads = F.avg_pool2d(padded.square(), side, stride=1)[0] - means.square()
    height, width = image.shape[1:]
    corners = [(top, left) for top in (0, side - 1) for left in (0, side - 1)]
    views = [(slice(None), slice(top, top + height), slice(left, left + width)) for top, left in corners]
    chosen = torch.stack([spreads[view].sum(0) for view in views]).argmin(0)
    return torch.stack([means[view] for view in views]).gather(0, chosen.expand(1, 3, height, width))[0]


def _pixelate(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    block = 2 + round(3 * severity)
    size = [max(1, side // block) for side in image.shape[1:]]
    small = F.interpolate(image[None], size=size, mode="area")
    return F.interpolate(small, size=image.shape[1:], mode="nearest")[0]


def _stripes(image: Tensor, severity: float, generator: Generator, other: Tensor) -> Tensor:
    period = uniform(generator, 3, 9)
    phase = uniform(generator, 0, 2 * math.pi)
    wave = torch.sin(torch.arange(image.shape[2]) * (2 * math.pi / period) + phase)
    return image + wave * (0.02 + 0.1 * severity)


ARTEFACTS: dict[str, Artefact] = {
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg_artefact,
    "oversharpen": _oversharpen,
    "hallucination": _hallucination,
    "colour": _colour,
    "shift": _shift,
    "painting": _painting,
    "flatten": _flatten,
    "warp": _warp,
    "checkerboard": _checkerboard,
    "motion_blur": _motion_blur,
    "ringing": _ringing,
    "posterize": _posterize,
    "speckle": _speckle,
    "kuwahara": _kuwahara,
    "pixelate": _pixelate,
    "stripes": _stripes,
}
JUDGE_KINDS = (
    "blur",
    "noise",
    "jpeg",
    "oversharpen",
    "hallucination",
    "colour",
    "shift",
    "painting",
    "flatten",
    "warp",
)
"""What the default judge is trained on."""
PAINTED_KIND = "flatten"
PAINTED_SHARE = 0.5
"""Share of groups whose restored candidate is drawn as flat paint."""
HELDOUT_KINDS = ("motion_blur", "ringing", "posterize", "speckle", "kuwahara", "pixelate", "stripes")
"""What the held-out judge is trained on: artefacts that the default judge never sees. (A restored candidate drawn as
flat paint is among the groups of both.)"""
UNSEEN_KIND = "checkerboard"
"""Trained on by neither; the test of generalisation."""


def apply_artefact(kind: str, image: RGB, severity: float, *, generator: Generator, other: RGB | None = None) -> RGB:
    """Puts one artefact on an image.

    Args:
        kind: A key of `ARTEFACTS`.
        image: `(3, H, W)` float in [0, 1].
        severity: 0 (just visible) to 1 (gross).
        generator: Source of every draw.
        other: A crop of another photo, of the same size; used by `"hallucination"`. The flipped image if not given.

    Returns:
        `(3, H, W)` in [0, 1].
    """
    if kind not in ARTEFACTS:
        raise ConfigError(f"unknown artefact {kind!r}", fix=f"one of {', '.join(ARTEFACTS)}")
    if other is None:
        other = image.flip(1, 2)
    return ARTEFACTS[kind](image, severity, generator, other).clamp(0, 1)


def paste_detail(image: RGB, other: RGB, sigma: float) -> RGB:
    """Keeps the image's low frequencies and takes the high ones of another photo: sharp and inconsistent."""
    return (gaussian_blur(image, sigma) + other - gaussian_blur(other, sigma)).clamp(0, 1)


def back_project(candidate: RGB, hr_image: RGB, *, scale: int = 4, rounds: int = 6) -> RGB:
    """Gives a candidate the HR image's low-resolution content.

    `rounds` passes of two down-samplers (area and bicubic) in turn, then as many again of the bicubic one alone: it
    makes the LR images, so what it leaves over is what an LR-consistency score would find. Each pass clips, since what
    clipping takes away at the end would tell the two apart again.
    """
    candidate, hr_image = candidate[None], hr_image[None]
    for reduce in [lambda x: F.avg_pool2d(x, scale), lambda x: downscale(x, scale)] * rounds + [
        lambda x: downscale(x, scale)
    ] * rounds:
        residual = reduce(hr_image) - reduce(candidate)
        correction = F.interpolate(residual, scale_factor=scale, mode="bicubic", align_corners=False)
        candidate = (candidate + correction).clamp(0, 1)
    return candidate[0]


def textured_crop(photo: Tensor, size: int, generator: Generator, *, tries: int = 12) -> RGB:
    """Cuts a random `(3, size, size)` crop with visible texture: on a flat crop most artefacts cannot be seen.

    Args:
        photo: uint8 `(3, H, W)`, each side at least `size`.

    Returns:
        Float crop in [0, 1], randomly flipped; the most textured of `tries` draws if none passes the threshold.
    """
    height, width = photo.shape[1:]
    if height < size or width < size:
        raise DataError(
            f"photo of {width}x{height} px is smaller than the crop of {size} px", fix="lower the crop size"
        )
    best, best_texture = photo[:, :size, :size].float() / 255, -1.0
    for _ in range(tries):
        top, left = integer(generator, 0, height - size + 1), integer(generator, 0, width - size + 1)
        crop = photo[:, top : top + size, left : left + size].float() / 255
        grey = crop.mean(0)
        texture = float(grey.diff(dim=0).abs().mean() + grey.diff(dim=1).abs().mean())
        if texture > best_texture:
            best, best_texture = crop, texture
        if texture > 0.03 and crop.std() > 0.06:
            break
    if integer(generator, 0, 2):
        best = best.flip(2)
    return best.contiguous()


def _quantise(image: Tensor) -> Tensor:
    return (image.clamp(0, 1) * 255).round().byte()


def _other_name(names: Sequence[str], photo: str, generator: Generator) -> str:
    others = [name for name in names if name != photo]
    if not others:
        raise DataError("candidates need at least two photos: artefacts borrow texture from another one")
    return others[integer(generator, 0, len(others))]


def severity_pair(generator: Generator) -> tuple[float, float]:
    """Draws a mild and a clearly more severe artefact strength (gap 0.35 to 0.65)."""
    mild = uniform(generator, 0, 0.6)
    return mild, min(1.0, mild + uniform(generator, 0.35, 0.65))


GROUP_PAIRS = (
    *((0, worse) for worse in range(1, 12)),  # the HR image is better than everything made from it
    (1, 2),  # mild before severe, same kind and same draws
    (3, 4),
    (1, 5),  # one artefact before two
    (6, 7),  # slight blur before another photo's crop
    (6, 8),  # slight blur before pasted detail
    (9, 7),  # the upsampled LR image before another photo's crop
    (1, 7),
    (3, 7),
    (10, 11),  # a restored image moved towards the HR image before the restored image
    (11, 7),
)


def constructed_group(
    photos: Mapping[str, Tensor],
    index: int,
    *,
    seed: int = 0,
    crop_size: int = 128,
    scale: int = 4,
    kinds: Sequence[str] = JUDGE_KINDS,
    degradations: Sequence[str] = ("bicubic", "seesr"),
    projected_share: float = 0.6,
    painted_share: float = PAINTED_SHARE,
    restore: Callable[[Tensor], Tensor] | None = None,
) -> PreferenceGroup:
    """Builds group `index`: one LR image and 12 candidates ordered by construction (`GROUP_PAIRS`).

    Candidates: 0 the HR image; 1, 2 one artefact mild and severe; 3, 4 another; 5 is 1 with one more; 6 slight blur;
    7 another crop; 8 pasted detail; 9 the upsampled LR image (sharpened in a third of the groups); 11 a restored image
    (`restore(lr_image)`, or the upsampled LR image, smoothed or drawn as flat paint with clean edges) and 10 the same
    moved towards the HR image.

    Args:
        photos: uint8 `(3, H, W)` by name, at least two.
        index: Group number; the group is a pure function of `(seed, index)` and the photos.
        projected_share: Share of groups whose artefacts are back-projected onto the HR image's low-resolution content.
        painted_share: Share of groups whose restored candidate is flat paint; without effect with `restore`.
        restore: Optional SR method, float `(1, 3, h, w)` -> `(1, 3, H, W)`.
    """
    names = sorted(photos)
    photo = names[index % len(names)]
    draws = stateless_generator(seed, "group", photo, index)
    hr_image = textured_crop(photos[photo], crop_size, draws)
    other = textured_crop(photos[_other_name(names, photo, draws)], crop_size, draws)
    degradation = degradations[integer(draws, 0, len(degradations))]
    lr_image = degrade(hr_image, degradation, generator=draws, scale=scale)

    first, second, third = (kinds[int(i)] for i in torch.randperm(len(kinds), generator=draws)[:3])
    made: list[Tensor] = []
    for position, kind in enumerate((first, second)):
        for severity in severity_pair(draws):
            same_draws = stateless_generator(seed, "artefact", photo, index, position)
            made.append(apply_artefact(kind, hr_image, severity, generator=same_draws, other=other))
    made.append(apply_artefact(third, made[0], uniform(draws, 0.2, 0.8), generator=draws, other=other))
    slight_blur = gaussian_blur(hr_image, uniform(draws, 0.6, 1.5))
    pasted = paste_detail(hr_image, other, uniform(draws, 1.2, 2.2))
    upsampled = upscale(lr_image[None], scale)[0]
    shown = upsampled
    if uniform(draws, 0, 1) < 0.3:
        shown = (upsampled + uniform(draws, 1, 3) * (upsampled - gaussian_blur(upsampled, 1.5))).clamp(0, 1)
    restored = restore(lr_image[None])[0] if restore else _restored(upsampled, painted_share, draws)
    improved = torch.lerp(restored, hr_image, uniform(draws, 0.15, 0.6))

    if uniform(draws, 0, 1) < projected_share:
        made = [back_project(candidate, hr_image, scale=scale) for candidate in made]
        pasted = back_project(pasted, hr_image, scale=scale)
        # The blend stays between the two, so projecting both keeps their order.
        restored, improved = (back_project(image, hr_image, scale=scale) for image in (restored, improved))
    candidates = [hr_image, *made, slight_blur, other, pasted, shown, improved, restored]
    return PreferenceGroup(
        sample_id=f"{photo}@{index}",
        photo=photo,
        lr_image=_quantise(lr_image),
        candidates=_quantise(torch.stack(candidates)),
        better_worse=GROUP_PAIRS,
        kinds=("hr", first, first, second, second, third, "slight_blur", "other_crop", "pasted_detail", "upsampled",
               "improved", "restored"),
    )  # fmt: skip


def _restored(upsampled: Tensor, painted_share: float, draws: Generator) -> Tensor:
    if uniform(draws, 0, 1) >= painted_share:
        return gaussian_blur(upsampled, uniform(draws, 0.5, 1.5))
    edge, steps = uniform(draws, 0.01, 0.05), integer(draws, 4, 16)
    painted = _shock(_diffuse(upsampled, edge, 12), uniform(draws, 1, 2.2), steps)
    painted = gaussian_blur(painted, uniform(draws, 0.3, 0.8))
    return torch.lerp(upsampled, painted, uniform(draws, 0.5, 1.3)).clamp(0, 1)


def constructed_pairs(
    photos: Mapping[str, Tensor],
    column: str,
    count: int,
    *,
    seed: int = 0,
    crop_size: int = 128,
    scale: int = 4,
    degradation: str = "bicubic",
    kinds: Sequence[str] = JUDGE_KINDS,
) -> list[PreferencePair]:
    """Builds the pairs of one evaluation column, spread evenly over photos and kinds.

    Args:
        photos: uint8 `(3, H, W)` by name; use photos that no judge was trained on.
        column: One of `EVALUATION_COLUMNS`.
        count: Number of pairs.
    """
    if column not in EVALUATION_COLUMNS:
        raise ConfigError(f"unknown evaluation column {column!r}", fix=f"one of {', '.join(EVALUATION_COLUMNS)}")
    names = sorted(photos)
    question = column.removeprefix("projected_")
    pairs = []
    for index in range(count):
        photo = names[index % len(names)]
        kind = UNSEEN_KIND if question.startswith("unseen") else kinds[(index + index // len(names)) % len(kinds)]
        draws = stateless_generator(seed, f"pair/{question}", photo, index)
        hr_image = textured_crop(photos[photo], crop_size, draws)
        other = textured_crop(photos[_other_name(names, photo, draws)], crop_size, draws)
        lr_image = degrade(hr_image, degradation, generator=draws, scale=scale)
        better, worse, kind = _question(question, kind, hr_image, other, draws, seed, index)
        if column.startswith("projected_"):
            better = better if better is hr_image else back_project(better, hr_image, scale=scale)
            worse = back_project(worse, hr_image, scale=scale)
            # One grey level of noise on both: an untouched HR image would be told by its missing rounding error.
            better, worse = (image + torch.randn(image.shape, generator=draws) / 255 for image in (better, worse))
        pairs.append(
            PreferencePair(
                f"{photo}@{index}", photo, column, kind, _quantise(lr_image), _quantise(better), _quantise(worse)
            )
        )
    return pairs


def _question(
    question: str, kind: str, hr_image: Tensor, other: Tensor, draws: Generator, seed: int, index: int
) -> tuple[Tensor, Tensor, str]:
    if question.endswith("artefact"):
        worse = apply_artefact(kind, hr_image, uniform(draws, 0, 1), generator=draws, other=other)
        return hr_image, worse, kind
    if question.endswith("severity"):
        severities = severity_pair(draws)
        better, worse = (
            apply_artefact(
                kind, hr_image, severity, generator=stateless_generator(seed, "severity", index), other=other
            )
            for severity in severities
        )
        return better, worse, kind
    slight_blur = gaussian_blur(hr_image, uniform(draws, 0.6, 1.5))
    if question == "other_crop":
        return slight_blur, other, question
    return slight_blur, paste_detail(hr_image, other, uniform(draws, 1.2, 2.2)), question
