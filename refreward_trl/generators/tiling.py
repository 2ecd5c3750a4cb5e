"""Any size of image through a generator, in overlapping tiles and in a memory that does not grow with the image.

Encoding, prediction and decoding are a chain of passes over the same tiles. Each pass blends its tiles into rows, asks
the pass before it for the rows that its next tiles need, and lets go of those that nobody needs any more; the colour
fix and whoever takes the result draw on the last pass. So a latent is blended before it is predicted from, and a
prediction before it is decoded. Pixels of one image share one field of input noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import ConfigError, DataError
from refreward_trl.generators.base import Condition, Generator, eval_mode
from refreward_trl.generators.color_fix import COLOR_FIXES
from refreward_trl.generators.noise_field import NoiseField
from refreward_trl.generators.streamed_color_fix import CHUNK, FIX_ROWS, REACH
from refreward_trl.generators.tile_grid import Axis, BlendedRows, LineWeights, place
from refreward_trl.resampling import resize_rows, resize_window, upscale

MARGIN = 2
"""LR pixels around a window that bicubic enlargement draws on."""

PASSES = 3

Prepare = Callable[[Tensor], Condition]


@dataclass(frozen=True)
class Tiling:
    """How an image is cut, in SR pixels of the generator.

    Attributes:
        tile: Side of a tile; an image that is no larger is one tile.
        overlap: What neighbours share at least; None is a quarter of the tile.
        batch_size: Equal tiles per forward.

    Raises:
        ConfigError: For a value that cannot work.
    """

    tile: int
    overlap: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, value in (("tile", self.tile), ("batch_size", self.batch_size)):
            if value < 1:
                raise ConfigError(f"{name} is {value}", where=name, fix="use at least 1")
        if self.overlap is not None and not 0 <= self.overlap < self.tile:
            raise ConfigError(
                f"the overlap is {self.overlap}, the tile {self.tile}",
                where="overlap",
                fix="use 0 or more, and less than the tile",
            )

    def halved(self) -> Tiling:
        """Returns tiles of half the side; an overlap that was given becomes half as wide too."""
        overlap = None if self.overlap is None else self.overlap // 2
        return Tiling(self.tile // 2, overlap, self.batch_size)

    def axes(self, generator: Generator, size: tuple[int, int]) -> tuple[Axis, Axis]:
        """Returns the tiles down and across an LR image of `size`."""
        step = generator.size_multiple // math.gcd(generator.size_multiple, generator.scale)
        overlap = self.tile // 4 if self.overlap is None else self.overlap
        return tuple(  # pyright: ignore[reportReturnType] (two, as `size`)
            place(side, self.tile // generator.scale, math.ceil(overlap / generator.scale), step) for side in size
        )


class LRImage(Protocol):
    """An LR image that is read window by window."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        ...

    def window(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Returns `(3, bottom - top, right - left)`, float32 in [0, 1]."""
        ...


@dataclass(frozen=True)
class TensorImage:
    """An LR image in memory, `(3, h, w)` in [0, 1]."""

    pixels: Float[Tensor, "3 h w"]

    @property
    def size(self) -> tuple[int, int]:
        return self.pixels.shape[-2], self.pixels.shape[-1]

    def window(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        return self.pixels[:, top:bottom, left:right]


@dataclass(frozen=True)
class EnlargedImage:
    """An LR image made larger, window by window, before the generator sees it."""

    image: LRImage
    size: tuple[int, int]

    def window(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        resized = resize_window(self.image.window, self.image.size, self.size, (top, bottom), (left, right))
        return resized.clamp(0, 1)


@dataclass(frozen=True)
class UpscaleSettings:
    """How `upscale_rows` works.

    Attributes:
        tiling: How the image is cut.
        color_fix: "none", "adain" or "wavelet"; None is the generator's own.
        seed: Of the input noise of an image in tiles; 0 in one tile is the generator's own fixed noise.
        prompt: Text, for generators with a text encoder; None is the generator's fixed one.
        scratch: Folder for the rows that AdaIN waits for.
    """

    tiling: Tiling
    color_fix: str | None = None
    seed: int = 0
    prompt: str | None = None
    scratch: Path = Path()


def upscale_rows(
    generator: Generator,
    image: LRImage,
    settings: UpscaleSettings,
    *,
    target: tuple[int, int] | None = None,
    on_progress: Callable[[float], None] = lambda part: None,
) -> Iterator[Float[Tensor, "3 n W"]]:
    """Upscales one image.

    An image that fits one tile comes out exactly as `generator.generate` returns it.

    Args:
        generator: The generator.
        image: The LR image.
        settings: How.
        target: (height, width) of the result; by default the generator's scale. Above it the LR image is enlarged
            first (bicubic), below it the generator's result is reduced (anti-aliased bicubic).
        on_progress: Called with the part of the image that was computed since the last call; together 1.

    Yields:
        Strips of rows from top to bottom, in [0, 1], on the CPU.

    Raises:
        DataError: The network returned NaN or infinity.
        ConfigError: A setting does not fit the generator.
    """
    scale = generator.scale
    if target is None:
        target = (image.size[0] * scale, image.size[1] * scale)
    size = lr_size(image.size, target, scale)
    if size != image.size:
        image = EnlargedImage(image, size)
    strips = _native_rows(generator, image, settings, on_progress)
    native = (size[0] * scale, size[1] * scale)
    if native != target:
        strips = resize_rows(strips, native, target)
    for strip in strips:
        yield strip.clamp(0, 1)


def lr_size(size: tuple[int, int], target: tuple[int, int], scale: int) -> tuple[int, int]:
    """Returns the (height, width) at which the generator sees an LR image of `size` that becomes `target`."""
    return max(size[0], math.ceil(target[0] / scale)), max(size[1], math.ceil(target[1] / scale))


def _native_rows(
    generator: Generator, image: LRImage, settings: UpscaleSettings, on_progress: Callable[[float], None]
) -> Iterator[Tensor]:
    prepare = _prepare_with(generator, settings.prompt)
    rows, columns = settings.tiling.axes(generator, image.size)
    color_fix = generator.color_fix if settings.color_fix is None else settings.color_fix
    with eval_mode(generator.denoiser):
        if len(rows.starts) == len(columns.starts) == 1:
            yield _whole(generator, image, settings, prepare, color_fix)
            on_progress(1.0)
            return
        work = _Work(generator, image, rows, columns, prepare, settings, on_progress)
        decoded = _Decode(work, _Predict(work, _Encode(work)))
        yield from FIX_ROWS[color_fix](decoded, _Enlarged(image, generator.scale), settings.scratch)


@torch.no_grad()
def _whole(
    generator: Generator, image: LRImage, settings: UpscaleSettings, prepare: Prepare, color_fix: str
) -> Tensor:
    """Does what `Generator.generate` does, with the settings that it has not."""
    height, width = image.size
    cond = prepare(image.window(0, height, 0, width)[None])
    z = generator.encode(cond)
    noise = None
    if generator.takes_noise and settings.seed != 0:
        noise = NoiseField(settings.seed, z.shape[1]).window(0, 0, *z.shape[-2:])[None].to(z)
    decoded = generator.decode(generator.predict(z, cond, noise), cond)
    if color_fix == generator.color_fix:
        fixed = generator.postprocess(decoded, cond)
    else:
        fixed = COLOR_FIXES[color_fix](decoded, cond.upsampled[..., : cond.size[0], : cond.size[1]])
    _check_finite(fixed)
    return fixed.clamp(0, 1)[0].cpu()


def _prepare_with(generator: Generator, prompt: str | None) -> Prepare:
    if prompt is None:
        return generator.prepare
    if not generator.takes_prompts:
        raise ConfigError(
            f"this {type(generator).__name__} takes no prompt: it has no text encoder",
            where="prompt",
            fix="leave the prompt out, or load a published checkpoint with its base model",
        )
    return lambda lr_image: generator.prepare(lr_image, [prompt] * len(lr_image))


class _Work:
    """What the passes over one image share."""

    def __init__(
        self,
        generator: Generator,
        image: LRImage,
        rows: Axis,
        columns: Axis,
        prepare: Prepare,
        settings: UpscaleSettings,
        on_progress: Callable[[float], None],
    ) -> None:
        self.generator = generator
        self.image = image
        self.rows = rows
        self.columns = columns
        self.prepare = prepare
        self.settings = settings
        self.on_progress = on_progress

    def batches(self) -> Iterator[list[int]]:
        """Yields the columns of tiles that share a forward: only the last tile of a row can be narrower."""
        count = len(self.columns.starts)
        widths = [self.columns.end(index) - start for index, start in enumerate(self.columns.starts)]
        batch: list[int] = []
        for index in range(count):
            if batch and (len(batch) == self.settings.tiling.batch_size or widths[index] != widths[batch[0]]):
                yield batch
                batch = []
            batch.append(index)
        yield batch

    def condition(self, row: int, columns: list[int]) -> Condition:
        """Returns the condition of some tiles of a row."""
        top, bottom = self.rows.starts[row], self.rows.end(row)
        windows = [
            self.image.window(top, bottom, self.columns.starts[index], self.columns.end(index)) for index in columns
        ]
        return self.prepare(torch.stack(windows))


class _Pass(ABC):
    """One pass over all tiles, row of tiles by row of tiles, as far as its rows are asked for."""

    def __init__(self, work: _Work, source: _Pass | None = None) -> None:
        self.work = work
        self.source = source
        self._blended: BlendedRows | None = None
        self._done = 0
        self.ratio = Fraction(work.generator.scale)

    @abstractmethod
    def compute(self, row: int, columns: list[int]) -> Tensor:
        """Returns some tiles of a row, `(b, c, h, w)`."""

    def capacity(self) -> int:
        """Rows to hold."""
        return int(self.work.rows.live * self.ratio)

    def require(self, bottom: int) -> None:
        """Computes what is missing of the rows above `bottom`, in LR pixels."""
        while self._done < len(self.work.rows.starts) and self.work.rows.finished(self._done) < bottom:
            self._compute_row(self._done)
            self._done += 1

    def tile(self, row: int, column: int) -> Tensor:
        """Returns the blended pixels where a tile lies, on the generator's device."""
        assert self._blended is not None
        top, left = self.work.rows.starts[row], self.work.columns.starts[column]
        bottom, right = top + self.work.rows.length, left + self.work.columns.length
        window = self._blended.read(*(int(side * self.ratio) for side in (top, bottom, left, right)))
        return window.to(self.work.generator.device)

    @torch.no_grad()
    def _compute_row(self, row: int) -> None:
        if self.source is not None:
            self.source.require(self.work.rows.starts[row] + self.work.rows.length)
        for columns in self.work.batches():
            tiles = self.compute(row, columns)
            _check_finite(tiles)
            for column, tile in zip(columns, tiles.float().cpu(), strict=True):
                self._rows_for(tile).add(row, column, tile)
            done = len(columns) / (len(self.work.rows.starts) * len(self.work.columns.starts) * PASSES)
            self.work.on_progress(done)

    def _rows_for(self, first: Tensor) -> BlendedRows:
        if self._blended is None:
            work = self.work
            self.ratio = self._ratio_of(first)
            weights = LineWeights(work.rows, self.ratio), LineWeights(work.columns, self.ratio)
            self._blended = BlendedRows(*weights, len(first), self.capacity())
        return self._blended

    def _ratio_of(self, first: Tensor) -> Fraction:
        """Pixels of this pass per LR pixel, which its first tile shows."""
        return Fraction(first.shape[-2], self.work.rows.length)


class _Encode(_Pass):
    """LR image -> latent."""

    def compute(self, row: int, columns: list[int]) -> Tensor:
        return self.work.generator.encode(self.work.condition(row, columns))


class _Predict(_Pass):
    """Latent -> predicted latent."""

    def compute(self, row: int, columns: list[int]) -> Tensor:
        assert self.source is not None
        z = torch.stack([self.source.tile(row, column) for column in columns])
        return self.work.generator.predict(z, self.work.condition(row, columns), self._noise(row, columns, z))

    def _noise(self, row: int, columns: list[int], z: Tensor) -> Tensor | None:
        if not self.work.generator.takes_noise:
            return None
        assert self.source is not None
        field = NoiseField(self.work.settings.seed, z.shape[1])
        top = int(self.work.rows.starts[row] * self.source.ratio)
        lefts = [int(self.work.columns.starts[column] * self.source.ratio) for column in columns]
        return torch.stack([field.window(top, left, *z.shape[-2:]) for left in lefts]).to(z)


class _Decode(_Pass):
    """Predicted latent -> rows of the image, before its colour fix."""

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.work.image.size
        return height * self.work.generator.scale, width * self.work.generator.scale

    def compute(self, row: int, columns: list[int]) -> Tensor:
        assert self.source is not None
        mean = torch.stack([self.source.tile(row, column) for column in columns])
        return self.work.generator.decode(mean, self.work.condition(row, columns))

    def capacity(self) -> int:
        return self.work.rows.length * self.work.generator.scale + CHUNK + 2 * REACH

    def rows(self, top: int, bottom: int) -> Tensor:
        self.require(math.ceil(bottom / self.work.generator.scale))
        assert self._blended is not None
        return self._blended.read(top, bottom, 0, self.size[1])

    def _ratio_of(self, first: Tensor) -> Fraction:
        # Not by the first tile: the decoder cuts off the padding.
        return Fraction(self.work.generator.scale)


class _Enlarged:
    """Rows of the bicubically enlarged LR image, which colour fixes take the colours of."""

    def __init__(self, image: LRImage, scale: int) -> None:
        self._image = image
        self._scale = scale

    @property
    def size(self) -> tuple[int, int]:
        height, width = self._image.size
        return height * self._scale, width * self._scale

    def rows(self, top: int, bottom: int) -> Tensor:
        height, width = self._image.size
        first = max(0, top // self._scale - MARGIN)
        last = min(height, math.ceil(bottom / self._scale) + MARGIN)
        enlarged = upscale(self._image.window(first, last, 0, width)[None], self._scale)[0]
        return enlarged[:, top - first * self._scale : bottom - first * self._scale]


def _check_finite(image: Tensor) -> None:
    if not bool(torch.isfinite(image).all()):
        raise DataError(
            "the network returned NaN or infinity",
            fix="compute with more range or precision: --dtype float32",
        )
