"""A corpus of bad images and tables through every route: refused by name, or read as the right pixels; never black."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from refreward_trl.cli import app
from refreward_trl.cli.building import build_train_dataset
from refreward_trl.data.images import read_image, to_float, to_pil, to_uint8
from refreward_trl.data.pairs import load_pairs
from refreward_trl.errors import DataError
from refreward_trl.resampling import downscale
from refreward_trl.rewards.refreward import RefReward
from refreward_trl.trainers.arguments import CropArguments, DataArguments

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore")]

WIDTH, HEIGHT, SCALE = 64, 48, 4
FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tif": "TIFF"}
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def photo() -> Image.Image:
    """A picture without a black pixel, so that every black one has been made up."""
    coarse = np.random.default_rng(0).integers(60, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def flipped(data: bytes, place: int, bit: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def decoded(data: bytes) -> Tensor:
    return pixels(Image.open(io.BytesIO(data)))


@dataclass(frozen=True)
class Sample:
    """A file of the corpus.

    Attributes:
        name: Of the file.
        data: Its bytes.
        right: The pixels that must come out, or None where the file must be refused.
        reason: Part of the refusal.
        open_end: Whether either may happen: the flip of a bit that no format but PNG can notice.
    """

    name: str
    data: bytes
    right: Tensor | None = None
    reason: str = ""
    open_end: bool = False


def spoilt() -> Iterator[Sample]:
    """Ten ways to spoil a file, in four formats."""
    for suffix, image_format in FORMATS.items():
        data = encoded(photo(), image_format)
        other = encoded(photo(), "PNG" if suffix != "png" else "WEBP")
        yield Sample(f"empty.{suffix}", b"", reason="0 bytes")
        yield Sample(f"hundred.{suffix}", data[:100])
        yield Sample(f"half.{suffix}", data[: len(data) // 2])
        yield Sample(f"short.{suffix}", data[:-40])
        yield Sample(f"signature.{suffix}", flipped(data, 1), reason="not a readable")
        yield Sample(f"header.{suffix}", flipped(data, 17), open_end=suffix != "png")
        yield Sample(f"middle.{suffix}", flipped(data, len(data) // 2, 4), open_end=suffix != "png")
        yield Sample(f"page.{suffix}", HTML, reason="HTML")
        yield Sample(f"zeros.{suffix}", bytes(len(data)), reason="not a readable")
        yield Sample(f"another.{suffix}", other, right=decoded(other))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def tiff_of_height(height: int) -> bytes:
    """A TIFF whose header claims another height than its strip fills."""
    data = encoded(photo(), "TIFF")
    entry = struct.pack("<HHI", 257, 4, 1) + struct.pack("<I", HEIGHT)
    assert data.count(entry) == 1
    return data.replace(entry, entry[:8] + struct.pack("<I", height))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


def transparent(lowest: int) -> Image.Image:
    image = photo().convert("RGBA")
    image.putpixel((5, 5), (255, 0, 0, lowest))
    return image


def special() -> Iterator[Sample]:
    """What is no plain 8-bit RGB picture."""
    frames = {"save_all": True, "append_images": [photo().rotate(180)]}
    grey = photo().convert("L")
    deep = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    palette = photo().convert("P", palette=Image.Palette.ADAPTIVE)
    for suffix, image_format in (("png", "PNG"), ("tif", "TIFF")):
        yield Sample(f"grey.{suffix}", encoded(grey, image_format), right=pixels(grey))
        yield Sample(f"deep_grey.{suffix}", encoded(deep, image_format), right=pixels(grey))
        yield Sample(f"palette.{suffix}", encoded(palette, image_format), right=pixels(palette))
        yield Sample(f"opaque.{suffix}", encoded(photo().convert("RGBA"), image_format), right=pixels(photo()))
        yield Sample(f"glass.{suffix}", encoded(transparent(120), image_format), reason="partly transparent")
        yield Sample(f"frames.{suffix}", encoded(photo(), image_format, **frames), reason="animated")
        yield Sample(f"dot.{suffix}", encoded(photo().resize((1, 1)), image_format), reason="1x1")
        yield Sample(f"float.{suffix}", encoded(grey.convert("F"), "TIFF"), reason="'F'")
    yield Sample("frames.webp", encoded(photo(), "WEBP", **frames), reason="animated")
    yield Sample("glass.webp", encoded(transparent(120), "WEBP", lossless=True), reason="partly transparent")
    yield Sample(
        "hole.png", encoded(palette, "PNG", transparency=palette.getpixel((9, 9))), reason="partly transparent"
    )
    for suffix, image_format in (("jpg", "JPEG"), ("tif", "TIFF")):
        yield Sample(f"print.{suffix}", encoded(photo().convert("CMYK"), image_format), reason="CMYK")
    for orientation, turn in (
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ):
        data = encoded(photo().transpose(turn), "PNG", exif=exif(orientation))
        yield Sample(f"turned{orientation}.png", data, right=pixels(photo()))
    yield Sample("bomb.png", png_header(30_000, 30_000), reason="pixels")
    yield Sample("bomb.tif", tiff_of_height(20_000_000), reason="pixels")
    yield Sample("taller.tif", tiff_of_height(HEIGHT * 2), reason="do not cover")
    yield Sample("animation.png", encoded(photo(), "GIF", **frames), reason="not a readable")


CORPUS = {sample.name: sample for sample in (*spoilt(), *special())}
SPOILT = sum(1 for _ in spoilt())


def lr_photo() -> Tensor:
    return to_uint8(downscale(to_float(pixels(photo()))[None], SCALE)[0])


def check(sample: Sample, outcome: Callable[[], Tensor], name: str) -> None:
    """Checks that a route refuses a sample by `name`, or gives the right pixels."""
    try:
        image = outcome()
    except DataError as error:
        assert sample.right is None, error
        assert error.exit_code == 3
        assert name in str(error) and sample.reason in str(error) and "\n" not in error.what.strip()[:20]
        return
    assert sample.right is not None or sample.open_end, "accepted"
    assert tuple(image.shape) == (3, HEIGHT, WIDTH)
    assert sample.right is None or torch.equal(image, sample.right)
    assert not bool((image == 0).all(0).any()), "pixels were filled in"


@pytest.mark.parametrize("name", CORPUS)
def test_datasets(name: str, tally: Callable[[str], Any], tmp_path: Path) -> None:
    sample = CORPUS[name]
    (tmp_path / name).write_bytes(sample.data)
    photo().save(tmp_path / "whole.png")

    def outcome() -> Tensor:
        dataset = load_pairs(tmp_path, degradation="bicubic")
        return dataset[dataset.photos.index(Path(name).stem)]["hr_image"]

    with tally("bad-image").trial():
        check(sample, outcome, f"{name}: ")


@pytest.mark.parametrize("name", CORPUS)
def test_training_data(name: str, tally: Callable[[str], Any], tmp_path: Path) -> None:
    """A table whose second row is spoilt, as a training run opens it: all its crops, or an error before the run."""
    import pyarrow
    import pyarrow.parquet

    sample = CORPUS[name]
    rows = [{"hr_image": {"bytes": data, "path": None}} for data in (encoded(photo(), "PNG"), sample.data)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "set.parquet")
    data = DataArguments(dataset=str(tmp_path / "set.parquet"), dataset_split="train", degradation="bicubic")
    crops = CropArguments(crops_per_image=3, augmentation="none")
    data.crop_size = 32

    def outcome() -> Tensor:
        dataset = build_train_dataset(data, crops, seed=0)
        images = [dataset[index]["hr_image"] for index in range(len(dataset))]
        assert not any(bool((image == 0).all(0).any()) for image in images), "pixels were filled in"
        return dataset._images(1)["hr_image"]

    with tally("bad-image").trial():
        check(sample, outcome, "row 1, column hr_image: ")


@pytest.fixture(scope="module")
def reward() -> RefReward:
    return RefReward.from_pretrained("default")


@pytest.mark.parametrize("name", CORPUS)
def test_scores(
    name: str, reward: RefReward, tally: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`refreward score` and `RefReward.score`, with the file as the SR image: an error, or the score of its pixels."""
    sample = CORPUS[name]
    path = tmp_path / name
    path.write_bytes(sample.data)
    to_pil(lr_photo()).save(tmp_path / "lr.png")

    def outcome() -> Tensor:
        score = reward.score(tmp_path / "lr.png", path)
        image = read_image(path)
        assert score == reward.score(lr_photo(), image)
        return image

    sized = "dot" not in name  # a reward speaks of sizes in its own words
    with tally("bad-image").trial():
        if sized:
            check(sample, outcome, f"{name}: ")
        code = app.main(["score", str(tmp_path / "lr.png"), str(path), "--reward", "lr_consistency"])
        printed, complaint = capsys.readouterr()
        if code == 0:
            assert sample.right is not None or sample.open_end
            assert name in printed
        else:
            assert code == 3 and sample.right is None
            assert complaint.count("error: ") == 1 and (name in complaint or not sized)


def test_the_corpus_has_its_size() -> None:
    assert SPOILT == 40 and len(CORPUS) >= 65


@pytest.mark.parametrize("image_format", [*FORMATS.values(), "BMP"])
def test_no_length_is_read_as_half_a_picture(image_format: str, tally: Callable[[str], Any], tmp_path: Path) -> None:
    data = encoded(photo().resize((24, 20)), image_format)
    right = read_bytes(data, tmp_path)
    for length in range(0, len(data), max(1, len(data) // 150)):
        with tally("bad-image").trial():
            try:
                image = read_bytes(data[:length], tmp_path)
            except DataError:
                continue
            assert torch.equal(image, right), length


@pytest.mark.parametrize("image_format", [*FORMATS.values(), "BMP"])
def test_every_bit_of_a_header(image_format: str, tally: Callable[[str], Any], tmp_path: Path) -> None:
    """A flip is refused, or leaves a picture into which no black is filled; nothing else is ever raised."""
    data = encoded(photo().resize((24, 20)), image_format)
    places = sorted({*range(min(60, len(data))), *range(max(0, len(data) - 120), len(data), 3)})
    for place in places:
        for bit in range(8):
            with tally("bad-image").trial():
                try:
                    image = read_bytes(flipped(data, place, bit), tmp_path)
                except DataError:
                    continue
                made_up = int((image == 0).all(0).sum())
                assert image_format == "BMP" or made_up <= image[0].numel() // 8, (place, bit, made_up)


def read_bytes(data: bytes, folder: Path) -> Tensor:
    (folder / "image").write_bytes(data)
    return read_image(folder / "image", max_pixels=10_000)


# Tables and their columns


def write_table(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> Path:
    """An image folder of four pairs with metadata that `change` spoils."""
    folder.mkdir()
    rows = []
    for number in range(4):
        photo().save(folder / f"h{number}.png")
        to_pil(lr_photo()).save(folder / f"l{number}.png")
        rows.append({"hr_image_file_name": f"h{number}.png", "lr_image_file_name": f"l{number}.png"})
    changed = change(rows)
    text = changed if isinstance(changed, str) else "".join(json.dumps(row) + "\n" for row in changed or rows)
    (folder / "metadata.jsonl").write_text(text)
    return folder


def in_two_rows(**cells: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(rows: list[dict[str, Any]]) -> None:
        for number in (1, 2):
            rows[number].update({name: value.format(number) if value else value for name, value in cells.items()})

    return change


TABLES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], tuple[str, ...]]] = {
    "missing files": (
        in_two_rows(hr_image_file_name="gone{}.png"),
        ("2 of 4 entries", "gone1.png: the file does not exist", "gone2.png: the file does not exist"),
    ),
    "empty cells": (
        in_two_rows(lr_image_file_name=None),
        ("2 of 4 entries", "row 1, column lr_image: the cell is empty", "row 2, column lr_image: the cell is empty"),
    ),
    "sizes that do not fit": (
        in_two_rows(lr_image_file_name="h{}.png"),
        ("2 of 4 entries", "row 1, column hr_image: hr_image of 64x48", "row 2, column hr_image: hr_image of 64x48"),
    ),
    "several faults": (
        lambda rows: [
            {**rows[0], "lr_image_file_name": "h0.png"},
            {**rows[1], "hr_image_file_name": "gone.png"},
            {**rows[2], "hr_image_file_name": None},
            rows[3],
        ],
        ("3 of 4 entries", "row 0, column hr_image: ", "gone.png: the file does not exist", "row 2, column hr_image"),
    ),
    "repeated ids": (
        lambda rows: [{**row, "sample_id": "same"} for row in rows],
        ("3 of 4 entries", "row 1: sample_id 'same' repeats row 0", "row 3: sample_id 'same' repeats row 0"),
    ),
    "ids missing": (
        in_two_rows(sample_id="s{}"),
        ("2 of 4 entries", "row 0: sample_id is empty", "row 3: sample_id is empty"),
    ),
    "wrong names": (
        lambda rows: [{"hr_file_name": row["hr_image_file_name"]} for row in rows],
        ("neither column hr_image nor lr_image; there are: hr", "rename column 'hr'"),
    ),
    "no images": (lambda rows: [{"caption": "a"} for _ in rows], ("`file_name`",)),
    "names as text": (
        lambda rows: [{"file_name": row["lr_image_file_name"], "hr_image": "h0.png"} for row in rows],
        ("column hr_image holds string, not images",),
    ),
    "a number for a name": (
        lambda rows: [{**row, "hr_image_file_name": 3} for row in rows],
        ("column hr_image_file_name holds int64, not names of files",),
    ),
    "no rows": (lambda rows: "\n", ("the dataset has no rows",)),
    "no JSON": (lambda rows: "hello\n", ("the dataset cannot be read (JSON parse error",)),
    "half a line": (lambda rows: json.dumps(rows[0])[:-9], ("the dataset cannot be read (JSON parse error",)),
}


@pytest.mark.parametrize("case", TABLES)
def test_bad_tables(case: str, tally: Callable[[str], Any], tmp_path: Path) -> None:
    change, messages = TABLES[case]
    with tally("bad-table").trial():
        with pytest.raises(DataError) as caught:
            load_pairs(write_table(tmp_path / "set", change))
        assert caught.value.exit_code == 3 and "set" in str(caught.value)
        for message in messages:
            assert message in str(caught.value)
        assert "fix: " in str(caught.value) or case == "missing files"


def test_a_good_table_loads(tmp_path: Path) -> None:
    assert len(load_pairs(write_table(tmp_path / "set", lambda rows: None))) == 4


def test_an_empty_split_and_a_wrong_one(tally: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    photo().save(tmp_path / "one.png")
    with tally("bad-table").trial(), pytest.raises(DataError, match="val: the folder holds no images"):
        load_pairs(tmp_path, split="val")


def test_a_bad_image_in_another_column(tally: Callable[[str], Any], tmp_path: Path) -> None:
    import datasets

    good = {"bytes": encoded(photo(), "PNG"), "path": None}
    bad = {"bytes": encoded(photo(), "PNG")[:200], "path": None}
    table = datasets.Dataset.from_list([{"hr_image": good, "mask": good}, {"hr_image": good, "mask": bad}])
    table = table.cast_column("hr_image", datasets.Image()).cast_column("mask", datasets.Image())
    table.save_to_disk(str(tmp_path / "set"))
    dataset = load_pairs(tmp_path / "set", degradation="bicubic")
    assert dataset[0]["mask"].size == (WIDTH, HEIGHT)
    with tally("bad-table").trial(), pytest.raises(DataError, match="row 1, columns mask: a column besides the pair"):
        dataset[1]
