"""One self-contained HTML page: pictures to compare, curves, tables, and words that say what the numbers are.

The page loads nothing: images are data URIs, charts inline SVG, styles and the little script are in the file.
Everything that is inserted goes through Jinja's escaping.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Literal, TypeAlias

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from refreward_trl.data.images import to_pil
from refreward_trl.errors import DataError
from refreward_trl.evaluation.charts import DotPlot, LineChart, signed_minus
from refreward_trl.evaluation.statistics import Estimate

Tone: TypeAlias = Literal["", "good", "bad", "muted", "strong"]

LOUPE_PIXELS = 48
"""Side, in HR pixels, of the region that a comparison enlarges."""
TEMPLATES = Path(__file__).parent / "templates"
WEBP_QUALITY = 95


@dataclass(frozen=True)
class Cell:
    """A table cell: text, small print under it, and how it is to be read."""

    text: str
    detail: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its header.

    Attributes:
        title: Caption.
        header: Column names.
        rows: Cells or plain strings, as many per row as the header has.
        note: A sentence below.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    note: str = ""
    kind: str = field(default="table", init=False)

    @property
    def cells(self) -> list[list[Cell]]:
        """The rows with every string made a `Cell`."""
        return [[Cell(cell) if isinstance(cell, str) else cell for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Comparison:
    """One photo before and after, with its LR image and, where there is one, its HR image.

    Attributes:
        name: Name of the photo.
        remark: Why it is shown, e.g. "largest gain".
        lr_image: `(3, h, w)` in [0, 1] or uint8.
        before: `(3, H, W)`, what is under the slider's left half.
        after: `(3, H, W)`.
        hr_image: `(3, H, W)` or None.
        figures: Rows of `(label, before, after)`, already written out.
    """

    name: str
    remark: str
    lr_image: Tensor
    before: Float[Tensor, "3 H W"]
    after: Float[Tensor, "3 H W"]
    hr_image: Tensor | None = None
    figures: Sequence[tuple[str, str, str]] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the SR image."""
        return self.before.shape[-2], self.before.shape[-1]

    @cached_property
    def focus(self) -> tuple[float, float]:
        """Centre `(x, y)`, in percent, of the loupe-sized region that changed most."""
        height, width = self.size
        side = min(LOUPE_PIXELS, height, width)
        change = (self.after.float() - self.before.float()).abs().mean(dim=0)
        local = F.avg_pool2d(change[None, None], side, stride=max(1, side // 4))[0, 0]
        row, column = divmod(int(local.argmax()), local.shape[1])
        stride = max(1, side // 4)
        return 100 * (column * stride + side / 2) / width, 100 * (row * stride + side / 2) / height


@dataclass(frozen=True)
class Gallery:
    """Comparisons to switch between.

    Attributes:
        title: Headline.
        before_label, after_label: Names of the two sides, e.g. "before" and "after ReFL".
        comparisons: The photos, the most telling first.
    """

    title: str
    comparisons: Sequence[Comparison]
    before_label: str = "before"
    after_label: str = "after"
    kind: str = field(default="gallery", init=False)


Block: TypeAlias = Gallery | LineChart | DotPlot | Table


@dataclass(frozen=True)
class Section:
    """A chapter: paragraphs, then blocks. `anchor` is its id in links."""

    anchor: str
    title: str
    paragraphs: Sequence[str] = ()
    blocks: Sequence[Block] = ()


@dataclass(frozen=True)
class Headline:
    """A figure at the top of the page."""

    label: str
    value: str
    detail: str = ""
    tone: Tone = ""


@dataclass(frozen=True)
class Report:
    """The page.

    Attributes:
        title: What was done, in a line.
        lead: What came out, in a sentence or two.
        headlines: The figures a reader should take away.
        caveats: What the figures are not; shown before anything else.
        sections: The chapters.
        facts: Names and values about the run: seed, versions, settings.
    """

    title: str
    lead: str
    headlines: Sequence[Headline]
    caveats: Sequence[str]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, str]] = ()


def render_report(report: Report) -> str:
    """Returns the page as HTML text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = data_uri
    environment.filters["pixels_uri"] = lambda image: data_uri(image, lossless=True)
    return environment.get_template("report.html.j2").render(report=report, loupe=LOUPE_PIXELS, quality=WEBP_QUALITY)


def write_report(path: str | Path, report: Report) -> None:
    """Writes the page to `path`; it appears complete or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    target = Path(path)
    text = render_report(report)
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.tmp")
    staged.write_text(text, encoding="utf-8")
    staged.replace(target)


def data_uri(image: Tensor, *, lossless: bool = False) -> str:
    """One `(3, H, W)` image as a WebP data URI: lossless for LR images, else near enough not to hide an artefact."""
    if image.dim() != 3 or image.shape[0] != 3:
        raise DataError(f"expected one image (3, H, W), got shape {tuple(image.shape)}", where="report")
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "WEBP", lossless=lossless, quality=WEBP_QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def number(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """Writes a number; a dash for NaN."""
    if not isfinite(value):
        return "\N{EN DASH}"
    text = f"{value:.{digits}f}"
    plus = "+" if sign and float(text) > 0 else ""
    return plus + signed_minus(text)


def interval(estimate: Estimate, digits: int = 2, *, sign: bool = False) -> str:
    """Writes a 95 % interval, or that there is none."""
    if not (isfinite(estimate.low) and isfinite(estimate.high)):
        return "no interval: one photo"
    return f"95 % CI {number(estimate.low, digits, sign=sign)} to {number(estimate.high, digits, sign=sign)}"
