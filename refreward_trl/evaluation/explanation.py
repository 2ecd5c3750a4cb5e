"""Why an image got its score: which regions moved it, and what the score is without the LR image.

The question that a map answers here is "what would the score be if this region showed no more than the LR image
does?": region by region, the SR image fades into the enlarged LR image. That needs no gradient, so it works for every
scorer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from refreward_trl.data.images import from_pil, to_uint8
from refreward_trl.errors import DataError
from refreward_trl.resampling import upscale

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

Scorer: TypeAlias = Callable[[Float[Tensor, "b 3 h w"], Float[Tensor, "b 3 H W"]], Float[Tensor, " b"]]

RAISES = (230, 97, 0)
LOWERS = (26, 99, 214)
"""Orange and blue, which colour-blind readers tell apart."""
BATCH = 8
_MARGIN = 12
_LEAST_PANEL = 256


@dataclass(frozen=True)
class Explanation:
    """What moved one score.

    Attributes:
        score: The score of the SR image.
        enlarged_lr: The score of the enlarged LR image in its place.
        without_lr: The score of the SR image beside an LR image of one colour, the mean of the true one.
        regions: `(rows, columns)`: by how much the score would fall if the region showed the enlarged LR image only.
            Positive where the detail of the SR image raises the score. Neighbouring regions overlap.
    """

    score: float
    enlarged_lr: float
    without_lr: float
    regions: Float[Tensor, "r c"]


@torch.no_grad()
def explain(
    score: Scorer, lr_image: Float[Tensor, "3 h w"], sr_image: Float[Tensor, "3 H W"], *, rows: int = 8
) -> Explanation:
    """Asks a scorer about an image and its variants.

    Args:
        score: The scorer.
        lr_image: float pixels in [0, 1].
        sr_image: float pixels in [0, 1], a whole multiple of the LR size.
        rows: Regions along the longer side; the others follow from the shape of the image.

    Raises:
        DataError: The sizes do not fit, or `rows` is under 1.
    """
    scale = sr_image.shape[-1] // lr_image.shape[-1]
    if rows < 1 or sr_image.shape[-2:] != (scale * lr_image.shape[-2], scale * lr_image.shape[-1]):
        raise DataError(
            f"SR size {tuple(sr_image.shape[-2:])} for LR size {tuple(lr_image.shape[-2:])}, {rows} rows",
            where="explain",
            fix="pass the LR image that the SR image was made from, and at least one row",
        )
    plain = upscale(lr_image[None], scale)[0].clamp(0, 1)
    masks = soft_regions(sr_image.shape[-2], sr_image.shape[-1], rows)
    faded = [torch.lerp(sr_image, plain, mask) for mask in masks.flatten(0, 1)]
    blank = lr_image.mean(dim=(1, 2), keepdim=True).expand_as(lr_image)
    pairs = [(lr_image, sr_image), (lr_image, plain), (blank, sr_image), *((lr_image, image) for image in faded)]
    scores = torch.cat(
        [
            score(*(torch.stack(list(side)) for side in zip(*pairs[start : start + BATCH], strict=True)))
            for start in range(0, len(pairs), BATCH)
        ]
    ).cpu()
    whole, enlarged, without = scores[:3].tolist()
    return Explanation(whole, enlarged, without, (whole - scores[3:]).view(masks.shape[:2]))


def soft_regions(height: int, width: int, rows: int) -> Float[Tensor, "r c H W"]:
    """Returns overlapping windows over an image that sum to 1 at every pixel.

    Args:
        height, width: Of the image.
        rows: Windows along the longer side.
    """
    longer = max(height, width)
    counts = [max(1, round(rows * side / longer)) for side in (height, width)]
    single = torch.eye(counts[0] * counts[1]).view(-1, 1, *counts)
    windows = F.interpolate(single, size=(height, width), mode="bilinear", align_corners=False)
    return windows.view(*counts, height, width)


def draw_explanation(
    explanation: Explanation,
    lr_image: Float[Tensor, "3 h w"],
    sr_image: Float[Tensor, "3 H W"],
    *,
    title: str = "score",
) -> UInt8[Tensor, "3 _ _"]:
    """Draws LR image, SR image and the map of what moved the score, with the figures below.

    Args:
        explanation: What `explain` found.
        lr_image: float pixels in [0, 1].
        sr_image: float pixels in [0, 1].
        title: Name of the score.
    """
    enlarge = max(1, -(-_LEAST_PANEL // max(sr_image.shape[-2:])))
    scale = sr_image.shape[-1] // lr_image.shape[-1]
    panels = [
        _magnified(lr_image, enlarge * scale),
        _magnified(sr_image, enlarge),
        _magnified(_overlay(explanation.regions, sr_image), enlarge),
    ]
    height, width = panels[0].shape[-2:]
    font = ImageFont.load_default(15)
    lines = _captions(explanation, title)
    picture = Image.new(
        "RGB", (3 * width + 4 * _MARGIN, height + 2 * _MARGIN + 22 * (len(lines) + 1)), (255, 255, 255)
    )
    draw = ImageDraw.Draw(picture)
    for index, (panel, name) in enumerate(zip(panels, ("LR", "SR", "what moved the score"), strict=True)):
        left = _MARGIN + index * (width + _MARGIN)
        draw.text((left, 4), name, fill=(0, 0, 0), font=font)
        picture.paste(Image.fromarray(to_uint8(panel).permute(1, 2, 0).numpy()), (left, _MARGIN + 14))
    _write_lines(draw, lines, height + _MARGIN + 24, font)
    return from_pil(picture, where="explanation")


def _captions(explanation: Explanation, title: str) -> list[tuple[str, tuple[int, int, int]]]:
    strongest = float(explanation.regions.abs().max())
    return [
        (
            f"{title}: {explanation.score:.3f}   the enlarged LR image itself: {explanation.enlarged_lr:.3f}   "
            f"without the LR image: {explanation.without_lr:.3f}",
            (0, 0, 0),
        ),
        (f"orange: detail that raises the score (strongest region {strongest:.3f})", RAISES),
        ("blue: detail that lowers it", LOWERS),
    ]


def _write_lines(
    draw: ImageDraw.ImageDraw,
    lines: list[tuple[str, tuple[int, int, int]]],
    top: int,
    font: FreeTypeFont | ImageFont.ImageFont,
) -> None:
    for number, (text, colour) in enumerate(lines):
        draw.text((_MARGIN, top + 22 * number), text, fill=colour, font=font)


def _overlay(regions: Tensor, sr_image: Tensor) -> Tensor:
    """The image in grey, coloured by how much each region moved the score, relative to the strongest."""
    smooth = F.interpolate(regions[None, None].float(), size=sr_image.shape[-2:], mode="bilinear", align_corners=False)
    strength = (smooth[0, 0] / regions.abs().max().clamp(min=1e-12)).to(sr_image.device)
    colours = [torch.tensor(colour, device=sr_image.device).view(3, 1, 1) / 255 for colour in (RAISES, LOWERS)]
    grey = sr_image.mean(dim=0, keepdim=True).expand_as(sr_image)
    colour = torch.where(strength > 0, colours[0], colours[1])
    return torch.lerp(grey, colour, 0.75 * strength.abs())


def _magnified(image: Tensor, times: int) -> Tensor:
    return image.detach().cpu().clamp(0, 1).repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)
