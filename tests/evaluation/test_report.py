"""The page must be one file, well formed, and unable to run or load what its data says."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from refreward_trl.errors import DataError
from refreward_trl.evaluation.charts import DotPlot, DotRow, Line, LineChart, Mark
from refreward_trl.evaluation.report import (
    Cell,
    Comparison,
    Gallery,
    Headline,
    Report,
    Section,
    Table,
    data_uri,
    interval,
    number,
    render_report,
    write_report,
)
from refreward_trl.evaluation.statistics import Estimate

HOSTILE = """<script src="https://evil.example/x.js">alert('1')</script> & "quoted" 'name'"""
VOID = {"meta", "img", "input", "link", "br", "path"}


class Page(HTMLParser):
    """Collects elements and text, and fails on a tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def named(self, tag: str, attribute: str | None = None) -> list[dict[str, str | None]]:
        return [given for name, given in self.elements if name == tag and (attribute is None or attribute in given)]


def comparison(name: str = "photo", *, hr: bool = True) -> Comparison:
    random = torch.Generator().manual_seed(0)
    image = torch.rand((3, 64, 96), generator=random)
    lr_image = torch.rand((3, 16, 24), generator=random)
    return Comparison(
        name, "largest gain", lr_image, image, image.flip(0), image if hr else None, [("reward", "1", "2")]
    )


def full_report(text: str = "plain") -> Report:
    blocks = [
        Gallery(text, [comparison(text), comparison(text, hr=False)], text, text),
        LineChart(
            text,
            [Line(text, [0, 1, 2], [1.0, float("nan"), 3.0], [text, "b", "c"]), Line("b", [0, 2], [1.0, 2.0])],
            unit=text,
            note=text,
        ),
        LineChart("second", [Line("a", [0, 1], [0.0, -1.0])], zero=True),
        DotPlot(
            text, [text, "other"], [DotRow(text, [Mark(0, 0.5, text, 0.4, 0.6), Mark(1, 0.2, ".2")], text)], 0.5, text
        ),
        Table(text, ["name", text], [[text, Cell(text, text, "good")]], note=text),
    ]
    return Report(
        title=text,
        lead=text,
        headlines=[Headline(text, text, text, "good")],
        caveats=[text],
        sections=[Section("all", text, [text], blocks)],
        facts=[(text, text)],
    )


def test_page_is_well_formed_and_every_anchor_leads_somewhere() -> None:
    page = Page(render_report(full_report()))
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len(set(ids))
    assert {link["href"] for link in page.named("a", "href")} <= {f"#{name}" for name in ids}


def test_page_loads_nothing_from_outside() -> None:
    text = render_report(full_report())
    page = Page(text)
    sources = [str(given["src"]) for _, given in page.elements if "src" in given]
    assert sources and all(source.startswith("data:image/webp;base64,") for source in sources)
    assert not page.named("link") and not page.named("iframe") and not page.named("script", "src")
    without_images = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest|import\(", without_images)


def test_names_from_outside_are_text_and_never_markup() -> None:
    hostile, plain = Page(render_report(full_report(HOSTILE))), Page(render_report(full_report()))
    assert [name for name, _ in hostile.elements] == [name for name, _ in plain.elements]
    for (_, given), (_, expected) in zip(hostile.elements, plain.elements, strict=True):
        assert list(given) == list(expected)
    assert "".join(hostile.words).count(HOSTILE) >= 15
    assert any(HOSTILE in str(given.get("alt")) for given in hostile.named("img"))


def test_slider_has_both_images_the_lr_image_and_a_name_for_readers() -> None:
    page = Page(
        render_report(Report("t", "l", [], [], [Section("a", "b", blocks=[Gallery("g", [comparison("cat")])])]))
    )
    classes = [given.get("class") for given in page.named("img")]
    assert classes == ["lr", "after", "before", "hr"]
    assert all(given["alt"] for given in page.named("img"))
    (slider,) = page.named("input")
    assert slider["type"] == "range" and "cat" in str(slider["aria-label"])
    assert all(given["width"] == "96" and given["height"] == "64" for given in page.named("img"))


def test_lr_pixels_are_embedded_exactly() -> None:
    image = torch.randint(0, 256, (3, 16, 24), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    payload = base64.b64decode(data_uri(image, lossless=True).split(",")[1])
    decoded = torch.tensor(bytearray(Image.open(io.BytesIO(payload)).convert("RGB").tobytes()), dtype=torch.uint8)
    assert torch.equal(decoded.view(16, 24, 3).permute(2, 0, 1), image)
    with pytest.raises(DataError, match="one image"):
        data_uri(image[None])


def test_loupe_starts_where_most_changed() -> None:
    before = torch.full((3, 200, 300), 0.5)
    after = before.clone()
    after[:, 120:160, 200:250] = 1.0
    x, y = Comparison("p", "r", before[:, ::4, ::4], before, after).focus
    assert x == pytest.approx(100 * 225 / 300, abs=6)
    assert y == pytest.approx(100 * 140 / 200, abs=6)


def test_tiny_photos_can_be_shown() -> None:
    image = torch.rand(3, 8, 12)
    item = Comparison("p", "r", image[:, ::4, ::4], image, image)
    assert 0 <= item.focus[0] <= 100 and 0 <= item.focus[1] <= 100
    Page(render_report(Report("t", "l", [], [], [Section("a", "b", blocks=[Gallery("g", [item])])])))


def test_file_is_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "report.html"
    write_report(target, full_report())
    assert target.read_text(encoding="utf-8") == render_report(full_report())
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_numbers_are_written_with_signs_and_dashes() -> None:
    assert number(0.256, sign=True) == "+0.26"
    assert number(-0.256) == "\N{MINUS SIGN}0.26"
    assert number(0.001, sign=True) == "0.00"
    assert number(-0.001, sign=True) == "0.00"
    assert number(float("nan")) == "\N{EN DASH}"
    assert interval(Estimate(0.5, 0.1, 0.9)) == "95 % CI 0.10 to 0.90"
    assert "no interval" in interval(Estimate(0.5, float("nan"), float("nan")))
