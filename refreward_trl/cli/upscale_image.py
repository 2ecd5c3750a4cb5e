"""One image file through a generator into another image file, strip by strip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from refreward_trl.cli.upscale_jobs import Job

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from refreward_trl.data.picture_writers import Layout
    from refreward_trl.data.pictures import Picture
    from refreward_trl.generators import Generator
    from refreward_trl.generators.tiling import UpscaleSettings

_LUMA = (0.299, 0.587, 0.114)
"""What the channels of a grey image that went through a generator count: Rec. 601, as in Pillow."""


@dataclass(frozen=True)
class PictureImage:
    """A picture as the LR image of a generator: grey in three channels, [0, 1]."""

    picture: Picture

    @property
    def size(self) -> tuple[int, int]:
        return self.picture.size

    def window(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return _unit(self.picture.pixels[top:bottom, left:right], self.picture.largest).expand(3, -1, -1)


@dataclass(frozen=True)
class Sizes:
    """(height, width) of an image and of its enlargement."""

    before: tuple[int, int]
    after: tuple[int, int]


def upscale_image(
    generator: Generator,
    job: Job,
    settings: UpscaleSettings,
    *,
    scale: float,
    quality: int,
    on_progress: Callable[[float], None],
) -> Sizes:
    """Reads, upscales and writes one image; the output appears complete or not at all.

    Raises:
        DataError: The image cannot be used, its format cannot hold the result, or the result is not finite.
        SetupError: The output cannot be written.
    """
    from refreward_trl.data.picture_writers import open_writer
    from refreward_trl.data.pictures import read_picture
    from refreward_trl.generators.tiling import upscale_rows

    picture = read_picture(job.source)
    if job.kind == "jpg" and picture.alpha is not None and int(picture.alpha.min()) == picture.largest:
        picture = replace(picture, alpha=None)
    size = target_size(picture.size, scale)
    with open_writer(job.target, job.kind, _layout(picture, size, job.kind), quality=quality) as writer:
        top, depth = 0, writer.layout.depth
        settings = replace(settings, scratch=job.target.parent)
        rows = upscale_rows(generator, PictureImage(picture), settings, target=size, on_progress=on_progress)
        for strip in rows:
            bottom = top + strip.shape[-2]
            writer.write(_stored(_with_alpha(_in_channels(strip, picture), picture, size, (top, bottom)), depth))
            top = bottom
    return Sizes(picture.size, size)


def target_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Returns the (height, width) of an image of `size` enlarged by `scale`."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _layout(picture: Picture, size: tuple[int, int], kind: str) -> Layout:
    from refreward_trl.data.picture_writers import SIXTEEN_BIT_FORMATS, Layout

    return Layout(
        height=size[0],
        width=size[1],
        channels=picture.pixels.shape[2] + (picture.alpha is not None),
        depth=16 if picture.largest > 255 and kind in SIXTEEN_BIT_FORMATS else 8,
        icc_profile=picture.icc_profile,
        exif=picture.exif,
    )


def _in_channels(strip: Tensor, picture: Picture) -> Tensor:
    """Returns `(1, n, w)` for a grey picture."""
    if picture.pixels.shape[2] == 3:
        return strip
    red, green, blue = _LUMA
    return (red * strip[0] + green * strip[1] + blue * strip[2])[None]


def _with_alpha(strip: Tensor, picture: Picture, size: tuple[int, int], rows: tuple[int, int]) -> Tensor:
    """Adds the same rows of the bicubically enlarged alpha channel, which never rings in what is clear or opaque."""
    if picture.alpha is None:
        return strip
    import torch

    from refreward_trl.resampling import resize_window

    alpha = picture.alpha[..., None]

    def window(top: int, bottom: int, left: int, right: int) -> Tensor:
        return _unit(alpha[top:bottom, left:right], picture.largest)

    enlarged = resize_window(window, picture.size, size, rows, (0, size[1]))
    return torch.cat([strip, enlarged.clamp(0, 1)])


def _unit(pixels: np.ndarray, largest: int) -> Tensor:
    """`(h, w, c)` of whole numbers -> `(c, h, w)` float32 in [0, 1]."""
    import numpy as np
    import torch

    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)).div_(largest)


def _stored(strip: Tensor, depth: int) -> np.ndarray:
    """`(c, n, w)` in [0, 1] -> `(n, w, c)` of whole numbers, rounded to nearest."""
    import numpy as np

    scaled = (strip * (2**depth - 1)).round_()
    return scaled.permute(1, 2, 0).numpy().astype(np.uint16 if depth == 16 else np.uint8)
