"""Pairs: rows are pure functions of (seed, index), LR and HR show the same place, bad data is named in one pass."""

from __future__ import annotations

import csv
import io
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from refreward_trl.data import pairs
from refreward_trl.data.collators import collate_pairs
from refreward_trl.data.degradations import PRESETS, degrade
from refreward_trl.data.images import list_images, to_float, to_pil, to_uint8, write_png
from refreward_trl.data.pairs import PairDataset, load_pairs
from refreward_trl.data.sources import PHOTOS, default_photos
from refreward_trl.errors import ConfigError, DataError, RefRewardError
from refreward_trl.randomness import stateless_generator
from refreward_trl.resampling import downscale


def hr_photo(number: int, height: int = 64, width: int = 80) -> Tensor:
    """A smooth random photo, so that its downscale determines the place."""
    coarse = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(number))
    image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")[0].clamp(0, 1)
    return to_uint8(image)


def lr_photo(hr_image: Tensor, scale: int = 4) -> Tensor:
    return to_uint8(downscale(to_float(hr_image)[None], scale)[0])


def write_pairs(folder: Path, count: int = 3, hr: bool = True, lr: bool = True) -> Path:
    for number in range(count):
        image = hr_photo(number)
        if hr:
            write_png(folder / "hr" / f"p{number}.png", image)
        if lr:
            write_png(folder / "lr" / f"p{number}.png", lr_photo(image))
    return folder


def write_flat(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        write_png(folder / f"p{number}.png", hr_photo(number, 66, 81))
    return folder


def content(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.numpy().tobytes() if isinstance(value, Tensor) else value for key, value in row.items()}


def psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * torch.log10((to_float(a) - to_float(b)).square().mean()))


# The default photos


def test_the_default_photos_are_split_by_photo_and_licensed() -> None:
    splits = {split: {path.stem for path in default_photos(split)} for split in ("train", "heldout", "val", "test")}
    assert {split: len(names) for split, names in splits.items()} == {"train": 47, "heldout": 16, "val": 8, "test": 15}
    assert len(set.union(*splits.values())) == 86
    files = {path.name for path in list_images(PHOTOS)}
    assert {f"{name}.webp" for names in splits.values() for name in names} == files
    with (PHOTOS / "LICENSES.csv").open(newline="") as file:
        licences = list(csv.DictReader(file))
    assert {row["file"] for row in licences} == files
    assert {row["license"].lower() for row in licences} == {"public domain", "cc0-1.0"}
    assert all(row["author"] and row["source"].startswith("http") for row in licences)
    assert json.loads((PHOTOS / "split.json").read_text())["format_version"] == 1


def test_default_photos_load_whole_and_cropped() -> None:
    whole = load_pairs("default", split="val")
    assert whole.photos == [path.stem for path in default_photos("val")] and len(whole) == 8
    row = whole[0]
    assert row["sample_id"] == whole.photos[0] and row["lr_image"].dtype == torch.uint8
    assert row["hr_image"].shape[1:] == tuple(4 * side for side in row["lr_image"].shape[1:])
    crops = load_pairs("default", split="val", crop_size=128, crops_per_image=1000)
    assert len(crops) == 8000
    row = crops[8 * 7 + 3]
    assert row["sample_id"] == f"{whole.photos[3]}@7"
    assert row["lr_image"].shape == (3, 32, 32) and row["hr_image"].shape == (3, 128, 128)


def test_unknown_splits_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'heldout'"):
        load_pairs("default", split="held_out")


# Purity


@pytest.fixture
def crops(tmp_path: Path) -> PairDataset:
    return load_pairs(write_flat(tmp_path / "flat"), crop_size=32, crops_per_image=5)


def test_rows_depend_on_nothing_but_the_index(crops: PairDataset, tmp_path: Path) -> None:
    expected = [content(crops[index]) for index in range(len(crops))]
    order = list(range(len(crops))) * 2
    random.Random(0).shuffle(order)
    torch.manual_seed(5)
    assert all(content(crops[index]) == expected[index] for index in order)
    again = load_pairs(tmp_path / "flat", crop_size=32, crops_per_image=50)
    assert [content(again[index]) for index in range(len(crops))] == expected
    assert len({row["sample_id"] for row in expected}) == len({row["hr_image"] for row in expected}) == 15


def test_rows_do_not_depend_on_the_other_photos(crops: PairDataset, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "p1.png").write_bytes((tmp_path / "flat" / "p1.png").read_bytes())
    single = load_pairs(alone, crop_size=32, crops_per_image=5)
    assert [content(single[draw]) for draw in range(5)] == [content(crops[1 + 3 * draw]) for draw in range(5)]


def test_the_global_generator_is_neither_used_nor_moved(crops: PairDataset) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = content(crops[4])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert content(crops[4]) == first


@pytest.mark.parametrize("workers", [0, 2])
def test_worker_processes_give_the_same_batches(crops: PairDataset, workers: int) -> None:
    loader = DataLoader(crops, batch_size=4, num_workers=workers, collate_fn=collate_pairs)
    rows = [
        {"sample_id": sample_id, "lr_image": lr_image, "hr_image": hr_image}
        for batch in loader
        for sample_id, lr_image, hr_image in zip(batch["sample_id"], batch["lr_image"], batch["hr_image"], strict=True)
    ]
    assert [content(row) for row in rows] == [content(crops[index]) for index in range(len(crops))]


def test_the_dataset_survives_pickling_without_its_pixels(crops: PairDataset) -> None:
    data = pickle.dumps(crops)
    copy = pickle.loads(data)
    assert len(data) < 10_000
    assert [content(copy[index]) for index in range(len(copy))] == [
        content(crops[index]) for index in range(len(crops))
    ]


def test_rows_can_be_written_to(crops: PairDataset, tmp_path: Path) -> None:
    for dataset in (crops, load_pairs(tmp_path / "flat"), load_pairs(write_pairs(tmp_path / "pairs"))):
        expected = content(dataset[0])
        row = dataset[0]
        row["hr_image"].zero_()
        row["lr_image"].zero_()
        assert content(dataset[0]) == expected


@pytest.mark.parametrize("changes", [{"seed": 1}, {"degradation": "realesrgan"}])
def test_seed_and_preset_change_the_lr_image(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_flat(tmp_path)
    assert content(load_pairs(folder)[0])["lr_image"] != content(load_pairs(folder, **changes)[0])["lr_image"]
    assert torch.equal(load_pairs(folder)[0]["hr_image"], load_pairs(folder, **changes)[0]["hr_image"])


def test_indices_outside_are_refused(crops: PairDataset) -> None:
    for index in (-1, len(crops)):
        with pytest.raises(IndexError):
            crops[index]


# Geometry


def test_whole_hr_photos_are_cut_to_a_multiple_and_degraded_by_the_documented_generator(tmp_path: Path) -> None:
    dataset = load_pairs(write_flat(tmp_path), degradation="seesr", seed=3)
    row = dataset[1]
    assert row["hr_image"].shape == (3, 64, 80) and torch.equal(row["hr_image"], hr_photo(1, 66, 81)[:, :64, :80])
    generator = stateless_generator(3, "degradation", "p1", 0)
    assert torch.equal(row["lr_image"], to_uint8(degrade(to_float(row["hr_image"]), "seesr", generator=generator)))


@pytest.mark.parametrize("layout", ["pairs", "flat"])
@pytest.mark.parametrize("scale", [2, 4])
def test_lr_and_hr_crops_show_the_same_place(layout: str, scale: int, tmp_path: Path) -> None:
    for number in range(2):
        write_png(tmp_path / "hr" / f"{number}.png", hr_photo(number))
        if layout == "pairs":
            write_png(tmp_path / "lr" / f"{number}.png", lr_photo(hr_photo(number), scale))
    dataset = load_pairs(tmp_path, degradation="bicubic", scale=scale, crop_size=32, crops_per_image=24)
    inside = (slice(None), slice(2, -2), slice(2, -2))  # the borders of a crop are resampled differently
    for row in dataset:  # type: ignore[attr-defined]
        assert row["hr_image"].shape == (3, 32, 32) and row["lr_image"].shape == (3, 32 // scale, 32 // scale)
        assert psnr(row["lr_image"][inside], lr_photo(row["hr_image"], scale)[inside]) > 34


def test_crops_reach_every_place_and_orientation(tmp_path: Path) -> None:
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    write_png(tmp_path / "a.png", torch.stack([y, x, torch.zeros_like(x)]).to(torch.uint8))
    dataset = load_pairs(f"lr:{tmp_path}", crop_size=32, crops_per_image=400)
    corners, orientations = set(), set()
    for index in range(len(dataset)):
        crop = dataset[index]["lr_image"].int()
        corners.add((int(crop[0].min()), int(crop[1].min())))
        step = (crop[:, 1, 0] - crop[:, 0, 0], crop[:, 0, 1] - crop[:, 0, 0])
        orientations.add(tuple(int(value) for change in step for value in change[:2]))
    assert {top for top, _ in corners} == {left for _, left in corners} == set(range(9))
    assert len(orientations) == 8


def test_without_augment_crops_are_plain_windows(tmp_path: Path) -> None:
    write_flat(tmp_path, 1)
    photo = hr_photo(0, 66, 81)
    windows = photo.unfold(1, 32, 1).unfold(2, 32, 1)
    for index in range(4):
        crop = load_pairs(tmp_path, crop_size=32, crops_per_image=4, augmentation="none")[index]["hr_image"]
        assert (windows == crop[:, None, None]).all(dim=(0, 3, 4)).any()


def test_strong_augmentation_zooms_and_recolours(tmp_path: Path) -> None:
    """Shapes and pairs stay what they are; the crops see more scales and colours than the photo has."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    write_png(tmp_path / "a.png", torch.stack([3 * y, 3 * x, torch.full_like(x, 30)]).to(torch.uint8))
    crops = {
        kind: [dict(row) for row in load_pairs(tmp_path, crop_size=32, crops_per_image=60, augmentation=kind)]
        for kind in ("flips", "strong")
    }
    for row in crops["strong"]:
        assert row["hr_image"].shape == (3, 32, 32) and row["lr_image"].shape == (3, 8, 8)
        assert row["hr_image"].dtype == torch.uint8
    ranges, flat_channels = {}, {}
    for kind, rows in crops.items():
        images = torch.stack([row["hr_image"] for row in rows]).int()
        spread = images.amax((2, 3)) - images.amin((2, 3))
        ranges[kind] = {int(value) for value in spread.flatten()}
        flat_channels[kind] = {int(channel) for channel in spread.argmin(1)}
    assert ranges["flips"] == {0, 93} and flat_channels["flips"] == {2}
    assert max(ranges["strong"]) > 120 and flat_channels["strong"] == {0, 1, 2}


def test_strong_augmentation_is_a_function_of_seed_and_index(tmp_path: Path) -> None:
    write_flat(tmp_path, 2)
    one, same, other = (
        load_pairs(tmp_path, crop_size=32, crops_per_image=3, augmentation="strong", seed=seed) for seed in (1, 1, 2)
    )
    rows = [one[index] for index in (5, 0, 3)]
    for row, index in zip(rows, (5, 0, 3), strict=True):
        assert all(torch.equal(row[key], same[index][key]) for key in ("lr_image", "hr_image"))
    assert any(
        not torch.equal(row["hr_image"], other[index]["hr_image"]) for row, index in zip(rows, (5, 0, 3), strict=True)
    )


def test_strong_augmentation_needs_lr_images_of_its_own_making(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has LR images of its own"):
        load_pairs(write_pairs(tmp_path), crop_size=32, augmentation="strong")
    with pytest.raises(ConfigError, match="augmentation is 'weak'"):
        load_pairs(tmp_path / "hr", crop_size=32, augmentation="weak")  # type: ignore[arg-type]


# Folders


def test_real_pairs_are_left_as_they_are(tmp_path: Path) -> None:
    dataset = load_pairs(write_pairs(tmp_path))
    assert dataset.photos == ["p0", "p1", "p2"] and dataset.has_hr
    assert torch.equal(dataset[2]["lr_image"], lr_photo(hr_photo(2)))
    assert torch.equal(dataset[2]["hr_image"], hr_photo(2))
    assert list(dataset[0]) == ["sample_id", "lr_image", "hr_image"]


@pytest.mark.parametrize("layout", ["subfolder", "prefix"])
def test_lr_only_folders_have_no_hr_image(layout: str, tmp_path: Path) -> None:
    write_pairs(tmp_path, hr=False)
    source = str(tmp_path) if layout == "subfolder" else f"lr:{tmp_path / 'lr'}"
    dataset = load_pairs(source)
    assert not dataset.has_hr and set(dataset[0]) == {"sample_id", "lr_image"}
    assert torch.equal(dataset[1]["lr_image"], lr_photo(hr_photo(1)))
    crop = load_pairs(source, crop_size=32, crops_per_image=2)[3]
    assert crop["lr_image"].shape == (3, 8, 8) and crop["sample_id"] == "p0@1"


def test_hr_only_folders_and_suffixes_and_subfolders(tmp_path: Path) -> None:
    write_pairs(tmp_path, lr=False)
    assert load_pairs(tmp_path).photos == load_pairs(f"hr:{tmp_path / 'hr'}").photos == ["p0", "p1", "p2"]
    (tmp_path / "hr" / "deep").mkdir()
    (tmp_path / "hr" / "p1.png").rename(tmp_path / "hr" / "deep" / "p1.png")
    (tmp_path / "lr" / "deep").mkdir(parents=True)
    for name in ("p0", "p2", "deep/p1"):
        to_pil(lr_photo(hr_photo(0))).save(tmp_path / "lr" / f"{name}.webp")
    assert load_pairs(tmp_path).photos == ["deep/p1", "p0", "p2"]


def test_a_split_is_a_subfolder_if_there_is_one(tmp_path: Path) -> None:
    write_pairs(tmp_path / "val", 1)
    write_flat(tmp_path, 2)
    assert load_pairs(tmp_path, split="val").photos == ["p0"]
    assert load_pairs(tmp_path, split="test").photos == ["p0", "p1"]


# Hugging Face datasets


def png_bytes(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def hf_rows(count: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "hr_image": {"bytes": png_bytes(hr_photo(number)), "path": None},
            "lr_image": {"bytes": png_bytes(lr_photo(hr_photo(number))), "path": None},
            "caption": f"photo {number}",
        }
        for number in range(count)
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    table = datasets.Dataset.from_list(rows)
    for name in ("hr_image", "lr_image"):
        if name in table.column_names:
            table = table.cast_column(name, datasets.Image())
    table.to_parquet(str(path))
    return path


@pytest.fixture(autouse=True)
def hf_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("layout", ["file", "folder", "saved"])
def test_huggingface_tables(layout: str, tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "set"
    folder.mkdir()
    path = write_parquet(folder / "train-00000-of-00001.parquet", hf_rows())
    if layout == "saved":
        datasets.Dataset.from_parquet(str(path)).save_to_disk(str(tmp_path / "saved"))  # type: ignore[union-attr]
    dataset = load_pairs({"file": path, "folder": folder, "saved": tmp_path / "saved"}[layout], split=None)
    assert dataset.photos == ["000000", "000001", "000002"]
    row = dataset[2]
    assert row["caption"] == "photo 2"
    assert torch.equal(row["lr_image"], lr_photo(hr_photo(2))) and torch.equal(row["hr_image"], hr_photo(2))
    copy = pickle.loads(pickle.dumps(load_pairs(folder, crop_size=32, crops_per_image=2)))
    assert content(copy[4]) == content(load_pairs(folder, crop_size=32, crops_per_image=2)[4])


def test_parquet_splits_and_sample_ids(tmp_path: Path) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    rows = [{**row, "sample_id": f"s{number}"} for number, row in enumerate(hf_rows())]
    for row in rows:
        del row["lr_image"]
    write_parquet(folder / "train-00000-of-00001.parquet", rows[:2])
    write_parquet(folder / "test-00000-of-00001.parquet", rows[2:])
    assert load_pairs(tmp_path / "set").photos == ["s0", "s1"]
    dataset = load_pairs(tmp_path / "set", split="test")
    assert dataset[0]["sample_id"] == "s2" and dataset[0]["lr_image"].shape == (3, 16, 20)
    with pytest.raises(ConfigError, match="no split 'val'"):
        load_pairs(tmp_path / "set", split="val")


def test_parquet_may_name_files_beside_it(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    write_png(tmp_path / "set" / "a.png", hr_photo(0))
    cells = [{"hr_image": {"bytes": None, "path": str(tmp_path / "set" / "a.png")}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(cells), tmp_path / "set" / "a.parquet")
    for source in (tmp_path / "set", tmp_path / "set" / "a.parquet"):
        assert torch.equal(load_pairs(source)[0]["hr_image"], hr_photo(0))


@pytest.mark.parametrize("split", [None, "val"])
def test_imagefolders(split: str | None, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "set" / (split or ""))
    lines = [f"hr/p{n}.png,lr/p{n}.png,{n}" for n in range(3)]
    (folder / "metadata.csv").write_text("\n".join(["hr_image_file_name,lr_image_file_name,mos", *lines]) + "\n")
    dataset = load_pairs(tmp_path / "set", split=split)
    assert [dataset[index]["mos"] for index in range(3)] == [0, 1, 2]
    assert torch.equal(dataset[1]["lr_image"], lr_photo(hr_photo(1)))


# Bad data


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    write_pairs(tmp_path, 16)
    for number in range(12):
        write_png(tmp_path / "lr" / f"p{number}.png", torch.zeros(3, 10, 20))
    with pytest.raises(DataError) as caught:
        load_pairs(tmp_path)
    message = str(caught.value)
    assert "12 of 16 entries" in message and "and 2 more" in message and message.count("lr_image of 20x10") == 10
    assert "p0.png: hr_image of 80x64 pixels is not 4 times lr_image of 20x10" in message
    assert "p15" not in message and "fix:" in message


def empty(folder: Path) -> None:
    for path in folder.glob("*/*.png"):
        path.unlink()


def lose_counterparts(folder: Path) -> None:
    (folder / "lr" / "p1.png").rename(folder / "lr" / "q.png")


def make_cmyk(folder: Path) -> None:
    to_pil(hr_photo(1)).convert("CMYK").save(folder / "hr" / "p1.jpg")
    (folder / "hr" / "p1.png").unlink()


def make_transparent(folder: Path) -> None:
    image = to_pil(hr_photo(1)).convert("RGBA")
    image.putalpha(100)
    image.save(folder / "hr" / "p1.png")


def truncate(folder: Path) -> None:
    path = folder / "hr" / "p1.png"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def shrink(folder: Path) -> None:
    write_png(folder / "hr" / "p1.png", torch.zeros(3, 24, 40))
    write_png(folder / "lr" / "p1.png", torch.zeros(3, 6, 10))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lose_counterparts, r"2 of 6 entries(.|\n)*hr/p1.png: no image of this name(.|\n)*lr/q.png: no image"),
        (empty, "hr: the folder holds no images"),
        (shutil.rmtree, "set: the dataset does not exist"),
        (lambda folder: to_pil(hr_photo(0)).save(folder / "hr" / "p1.jpg"), "hr/p1.png: same name as p1.jpg"),
        (truncate, "hr/p1.png: the image is damaged or truncated"),
        (lambda folder: (folder / "hr" / "p1.png").write_text("<html>"), "hr/p1.png: the data is HTML"),
        (make_transparent, "hr/p1.png: the image is partly transparent"),
        (make_cmyk, "hr/p1.jpg: the image is CMYK"),
        (shrink, "lr/p1.png: lr_image of 10x6 pixels is smaller than 8x8"),
    ],
    ids=["no counterpart", "empty", "missing", "same name", "half", "web page", "transparent", "cmyk", "small"],
)
def test_bad_folders_are_named(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "set")
    load_pairs(folder, crop_size=32)
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_pairs(folder, crop_size=32)
    assert caught.value.exit_code == 3


def test_damaged_pixels_of_large_datasets_show_on_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "MAX_CACHE_BYTES", 1000)
    truncate(write_pairs(tmp_path))
    dataset = load_pairs(tmp_path)
    assert torch.equal(dataset[0]["hr_image"], hr_photo(0))
    with pytest.raises(DataError, match=r"p1.png: the image is damaged"):
        dataset[1]


def bad_rows(case: str) -> list[dict[str, Any]]:
    rows = hf_rows()
    if case == "missing columns":
        return [{"hr": row["hr_image"], "caption": "x"} for row in rows]
    if case == "text column":
        return [{"hr_image": "a.png"} for _ in rows]
    if case == "number column":
        return [{"hr_image": 3} for _ in rows]
    if case == "empty cell":
        rows[1]["lr_image"] = None
    elif case == "damaged cell":
        rows[2]["hr_image"] = {"bytes": rows[2]["hr_image"]["bytes"][:200], "path": None}
    elif case == "path out of the dataset":
        rows[1]["hr_image"] = {"bytes": None, "path": "/etc/hostname"}
    elif case == "wrong size":
        rows[0]["lr_image"] = rows[0]["hr_image"]
    elif case == "repeated ids":
        rows = [{**row, "sample_id": "same"} for row in rows]
    return rows


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing columns", "neither column hr_image nor lr_image; there are: hr, caption"),
        ("text column", "column hr_image holds string, not images"),
        ("number column", "column hr_image holds int64, not images"),
        ("empty cell", "row 1, column lr_image: the cell is empty"),
        ("damaged cell", "row 2, column hr_image: the image is damaged"),
        ("path out of the dataset", "row 1, column hr_image: the path /etc/hostname leads out"),
        ("wrong size", "row 0, column hr_image: hr_image of 80x64 pixels is not 4 times lr_image of 80x64"),
        ("repeated ids", "row 1: sample_id 'same' repeats row 0"),
    ],
)
def test_bad_tables_are_named_by_row_and_column(case: str, message: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "set.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(bad_rows(case)), path)
    with pytest.raises(DataError, match=message):
        load_pairs(path)


def test_a_file_that_is_no_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    path.write_text("not parquet")
    with pytest.raises(DataError, match="cannot be read") as caught:
        load_pairs(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 30}, "crop_size 30 is not a positive multiple of scale 4(.|\n)*use 28"),
        ({"crop_size": 0}, "crop_size 0"),
        ({"scale": 0}, "scale 0"),
        ({"crop_size": 32, "crops_per_image": 0}, "crops_per_image 0 is below 1"),
        ({"crops_per_image": 2}, "without crop_size"),
        ({"degradation": "realesrgn"}, "did you mean 'realesrgan'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pairs("default", split="val", **arguments)


def test_errors_are_of_one_family_and_presets_pass_as_objects(tmp_path: Path) -> None:
    assert issubclass(DataError, RefRewardError)
    by_object = load_pairs(write_flat(tmp_path), degradation=PRESETS["stablesr"])
    assert content(by_object[0]) == content(load_pairs(tmp_path, degradation="stablesr")[0])


def test_grey_and_colour_photos_mix(tmp_path: Path) -> None:
    write_flat(tmp_path, 1)
    Image.fromarray(np.full((64, 64), 99, dtype=np.uint8)).save(tmp_path / "grey.png")
    grey = load_pairs(tmp_path)[0]
    assert grey["sample_id"] == "grey" and grey["hr_image"].unique().tolist() == [99]


def test_splits_of_the_default_photos_join() -> None:
    both = {path.name for path in default_photos("train+heldout")}
    assert both == {path.name for split in ("train", "heldout") for path in default_photos(split)}
    with pytest.raises(ConfigError, match="'heldoutt'"):
        default_photos("train+heldoutt")
