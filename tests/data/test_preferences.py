"""Preference groups: votes merge as stated, both formats give back what was written, bad rows are all named."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from refreward_trl.data.image_sources import ImageBytes, ImageFile, ImageTensor
from refreward_trl.data.images import to_pil
from refreward_trl.data.preferences import (
    ASPECTS,
    Candidate,
    PreferenceChoice,
    PreferenceRecord,
    read_preferences,
    write_preferences,
)
from refreward_trl.data.sources import DataProblems
from refreward_trl.errors import ConfigError, DataError


def picture(number: int, height: int = 16, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def group(sample_id: str = "a@0", count: int = 3, **fields: Any) -> PreferenceRecord:
    number = sum(map(ord, sample_id)) * 100
    candidates = tuple(
        Candidate(ImageTensor(picture(number + k, 32, 48)), f"method{k}", "blur" if k else "") for k in range(count)
    )
    values = {"photo": sample_id.partition("@")[0], "lr_image": ImageTensor(picture(number + 50)), "source": "human"}
    return PreferenceRecord(sample_id=sample_id, candidates=candidates, **{**values, **fields})


def plain(record: PreferenceRecord) -> dict[str, Any]:
    """A record as values that can be compared."""
    images = {"lr_image": record.lr_image, "hr_image": record.hr_image}
    pixels = {name: None if source is None else source.read().tolist() for name, source in images.items()}
    candidates = [(made.image.read().tolist(), made.generator, made.kind) for made in record.candidates]
    return {**vars(record), **pixels, "candidates": candidates, "ranks": dict(record.ranks)}


# Merging


def votes(*answers: tuple[int, int, str, float], ranks: tuple[int | None, ...] = ()) -> list[tuple]:
    choices = tuple(PreferenceChoice(a, b, preferred, weight=w) for a, b, preferred, w in answers)  # type: ignore[arg-type]
    return [tuple(pair) for pair in group(choices=choices, ranks={"overall": ranks}).pairs()]


def test_ranks_order_every_two_that_have_one() -> None:
    assert votes(ranks=(2, 1, 1)) == [(1, 0, 1, False), (2, 0, 1, False), (1, 2, 1, True)]
    assert votes(ranks=(1, None, 5)) == [(0, 2, 1, False)]
    assert votes() == []


def test_the_majority_wins_by_its_margin() -> None:
    assert votes((0, 1, "first", 1), (0, 1, "first", 1), (1, 0, "first", 1)) == [(0, 1, 1, False)]
    assert votes((0, 1, "first", 1), (0, 1, "second", 2.5)) == [(1, 0, 1.5, False)]


def test_equal_votes_are_a_tie_and_so_is_a_majority_of_ties() -> None:
    assert votes((0, 1, "first", 1), (1, 0, "first", 1)) == [(0, 1, 2, True)]
    assert votes((1, 0, "tie", 0.5)) == [(0, 1, 0.5, True)]
    assert votes((0, 1, "first", 1), (0, 1, "tie", 1), (0, 1, "tie", 1)) == [(0, 1, 2, True)]
    assert votes((0, 1, "first", 1), (0, 1, "first", 1), (0, 1, "tie", 1)) == [(0, 1, 2, False)]
    # 0.1 + 0.2 is not 0.3 in floating point, and yet nobody is ahead.
    ((_, _, weight, tie),) = votes((0, 1, "first", 0.1), (0, 1, "first", 0.2), (0, 1, "second", 0.3))
    assert tie and weight == pytest.approx(0.6)


def test_ranks_are_one_vote_beside_the_choices() -> None:
    assert votes((0, 1, "second", 1), ranks=(1, 2, None)) == [(0, 1, 2, True)]
    assert votes((0, 1, "second", 3), ranks=(1, 2, None)) == [(1, 0, 2, False)]


def test_who_asks_first_does_not_matter() -> None:
    turned = {"first": "second", "second": "first", "tie": "tie"}
    answers = [(0, 1, "first", 1.0), (1, 2, "tie", 2.0), (2, 0, "second", 0.5), (1, 0, "first", 0.25)]
    swapped = [(b, a, turned[preferred], w) for a, b, preferred, w in reversed(answers)]
    assert votes(*answers) == votes(*swapped)


def test_aspects_are_kept_apart() -> None:
    choice = PreferenceChoice(0, 1, "second", aspect="consistency")
    record = group(choices=(choice,), ranks={"naturalness": (1, 2, 3)})
    assert record.aspects == ("consistency", "naturalness")
    assert [len(record.pairs(aspect)) for aspect in ASPECTS] == [0, 1, 3]
    assert record.pairs("consistency")[0].better == 1
    with pytest.raises(ConfigError, match="no aspect 'beauty'"):
        record.pairs("beauty")


# Loading


@pytest.mark.parametrize("count", range(2, 9))
def test_a_group_of_any_size_loads(count: int) -> None:
    loaded = group(count=count, ranks={"overall": tuple(range(count))}).load()
    assert loaded.candidates.shape == (count, 3, 32, 48) and loaded.lr_image.shape == (3, 16, 24)
    assert len(loaded.better_worse) == count * (count - 1) // 2 == len(loaded.weights)
    assert loaded.generators == tuple(f"method{k}" for k in range(count)) and loaded.ties == ()
    assert set(loaded.as_row()) >= {"sample_id", "lr_image", "candidates", "better_worse", "kinds"}


def test_ties_weights_and_the_hr_image_are_loaded() -> None:
    choices = (PreferenceChoice(0, 1, "tie", weight=2), PreferenceChoice(2, 1, "first", weight=3))
    loaded = group(choices=choices, hr_image=ImageTensor(picture(1, 32, 48))).load()
    assert (loaded.ties, loaded.tie_weights) == (((0, 1),), (2.0,))
    assert (loaded.better_worse, loaded.weights) == (((2, 1),), (3.0,))
    assert loaded.hr_image is not None and loaded.hr_image.shape == (3, 32, 48)
    row = loaded.as_row()
    assert row["ties"].tolist() == [[0, 1]] and row["weights"].tolist() == [3.0]


def test_candidates_of_several_sizes_stay_apart_and_make_no_batch() -> None:
    record = group()
    larger = Candidate(ImageTensor(picture(7, 64, 96)))
    loaded = replace(record, candidates=(*record.candidates, larger)).load()
    assert isinstance(loaded.candidates, tuple) and [len(image[0]) for image in loaded.candidates] == [32, 32, 32, 64]
    with pytest.raises(DataError, match=r"sample a@0: the candidates have different sizes .*96x64"):
        loaded.as_row()


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (8, 12, "12x8 pixels, smaller than its LR image of 24x16"),
        (33, 48, "48x33 pixels, no whole multiple"),
        (32, 72, "72x32 pixels, no whole multiple"),
        (32, 24, "24x32 pixels, no whole multiple"),
    ],
)
def test_an_sr_image_must_be_a_whole_multiple_of_its_lr_image(height: int, width: int, message: str) -> None:
    record = group()
    odd = Candidate(ImageTensor(picture(7, height, width), where="odd.png"))
    with pytest.raises(DataError, match=rf"^odd.png: candidate 3 has {message}"):
        replace(record, candidates=(*record.candidates, odd)).load()
    with pytest.raises(DataError, match="the HR image has"):
        replace(record, hr_image=odd.image).load()


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(ImageTensor(picture(0, 32, 48)).encoded()[:200])
    with pytest.raises(DataError, match=r"half\.png: the image is damaged"):
        replace(group(), lr_image=ImageFile(tmp_path / "half.png")).load()


# Files


def dataset() -> list[PreferenceRecord]:
    choice = PreferenceChoice(1, 0, "tie", aspect="naturalness", annotator="ann", weight=0.5)
    ranks = {"overall": (1, None, 1), "consistency": (3, 2, 1)}
    return [
        group("Größe 1/ä@0", ranks=ranks, choices=(choice, PreferenceChoice(0, 2, "second"))),
        group("b@0", count=2, degradation="seesr", source="psnr_y", hr_image=ImageTensor(picture(3, 64, 96))),
        group("b@1", count=8, source="constructed"),
    ]


FORMATS = ("imagefolder", "parquet")


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_written_is_read(form: Any, tmp_path: Path) -> None:
    write_preferences(dataset(), tmp_path / "d", format=form)
    assert [plain(record) for record in read_preferences(tmp_path / "d")] == [plain(r) for r in dataset()]


@pytest.mark.parametrize("form", FORMATS)
def test_both_formats_are_ordinary_hugging_face_datasets(form: Any, tmp_path: Path) -> None:
    import datasets

    write_preferences(dataset(), tmp_path / "d", format=form)
    options = {"data_dir" if form == "imagefolder" else "data_files": str(tmp_path / "d")}
    if form == "parquet":
        options = {"data_files": str(tmp_path / "d/preferences.parquet")}
    table = datasets.load_dataset(form, **options)["train"]  # type: ignore[arg-type]
    assert [len(row["candidates"]) for row in table] == [3, 2, 8]
    assert table[0]["lr"].size == (24, 16) and table[0]["candidates"][2].size == (48, 32)
    # What `datasets` makes of it, is one of ours again.
    table.to_parquet(str(tmp_path / "again.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for path in (tmp_path / "again.parquet", tmp_path / "saved"):
        assert [plain(record) for record in read_preferences(path)] == [plain(r) for r in dataset()]


@pytest.mark.parametrize("form", FORMATS)
def test_splits_are_kept(form: Any, tmp_path: Path) -> None:
    records = [replace(r, split="train" if r.photo == "b" else "val") for r in dataset()]
    write_preferences(records, tmp_path / "d", format=form)
    splits = {r.sample_id: r.split for r in read_preferences(tmp_path / "d")}
    assert splits == {r.sample_id: r.split for r in records}
    assert [r.sample_id for r in read_preferences(tmp_path / "d", split="train")] == ["b@0", "b@1"]
    assert len(read_preferences(tmp_path / "d", split="train+val")) == 3
    with pytest.raises(ConfigError, match="no split 'test'") as caught:
        read_preferences(tmp_path / "d", split="test")
    assert caught.value.fix == "Splits: train, val"


def test_a_folder_for_each_split_is_read_too(tmp_path: Path) -> None:
    first, *others = dataset()
    write_preferences([first], tmp_path / "d/val")
    write_preferences(others, tmp_path / "d/train")
    assert [(r.sample_id, r.split) for r in read_preferences(tmp_path / "d")] == [
        ("b@0", "train"),
        ("b@1", "train"),
        (first.sample_id, "val"),
    ]


def test_a_split_of_a_dataset_without_splits_is_refused(tmp_path: Path) -> None:
    write_preferences(dataset(), tmp_path / "d")
    with pytest.raises(ConfigError, match="no split 'train'"):
        read_preferences(tmp_path / "d", split="train")


def test_files_keep_their_bytes(tmp_path: Path) -> None:
    to_pil(picture(0, 32, 48)).save(tmp_path / "x.jpeg", quality=70)
    content = (tmp_path / "x.jpeg").read_bytes()
    record = replace(group(), hr_image=ImageFile(tmp_path / "x.jpeg"), lr_image=ImageBytes(content))
    for form in FORMATS:
        write_preferences([record], tmp_path / form, format=form)  # type: ignore[arg-type]
        (read,) = read_preferences(tmp_path / form)
        assert read.hr_image is not None and read.hr_image.encoded() == read.lr_image.encoded() == content


def test_reading_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for form in FORMATS:
        write_preferences(dataset(), tmp_path / form, format=form)  # type: ignore[arg-type]
    monkeypatch.setattr(Image, "open", None)
    for form in FORMATS:
        assert len(read_preferences(tmp_path / form)) == 3


def test_shards_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refreward_trl.data import preference_writers

    monkeypatch.setattr(preference_writers, "GROUP_BYTES", 1)
    monkeypatch.setattr(preference_writers, "SHARD_BYTES", 12_000)
    records = [replace(group(f"p{n}@0"), split="train") for n in range(4)]
    write_preferences(records, tmp_path / "d", format="parquet")
    assert len(list((tmp_path / "d").glob("train-0000?-of-00004.parquet"))) == 4
    assert [r.sample_id for r in read_preferences(tmp_path / "d")] == [r.sample_id for r in records]


def test_any_sample_id_gets_files_of_its_own(tmp_path: Path) -> None:
    """Whatever a path could make of the name, and where small letters and capitals are the same."""
    records = [group(name) for name in ("a/b", "a_b", "A_b", "..", "../../x", ".", "a" * 300, "a" * 301)]
    write_preferences(records, tmp_path / "d")
    assert [plain(record) for record in read_preferences(tmp_path / "d")] == [plain(record) for record in records]
    folders = [path.name.lower() for path in (tmp_path / "d/images").iterdir()]
    assert len(set(folders)) == len(records) and sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_preferences(dataset(), tmp_path / "d")
    with pytest.raises(ConfigError, match="something is there already"):
        write_preferences(dataset(), tmp_path / "d")
    with pytest.raises(DataError, match="'b@0' repeats"):
        write_preferences([group("b@0"), group("b@0")], tmp_path / "e")
    assert not (tmp_path / "e").exists()


# Bad rows


ROW = {"sample_id": "a", "lr_file_name": "lr.png", "candidates_file_names": ["0.png", "1.png"], "ranks": [1, 2]}


def write_rows(folder: Path, *rows: dict[str, Any] | str) -> Path:
    for name, size in (("lr", (16, 24)), ("0", (32, 48)), ("1", (32, 48))):
        to_pil(picture(len(name), *size)).save(folder / f"{name}.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


BAD = {
    "sample_id is missing": {"sample_id": None},
    "sample_id: expected text, got 3": {"sample_id": 3},
    "lr_file_name is missing": {"lr_file_name": None},
    "there is no file gone.png": {"candidates_file_names": ["0.png", "gone.png"]},
    "candidates_file_names is missing": {"candidates_file_names": None},
    "leads out of the dataset": {"lr_file_name": "../lr.png"},
    "/etc/hostname leads out": {"lr_file_name": "/etc/hostname"},
    "1 candidate, and there is nothing to compare": {"candidates_file_names": ["0.png"], "ranks": [1]},
    "0 candidates": {"candidates_file_names": [], "ranks": []},
    "ranks: 3 ranks for 2 candidates": {"ranks": [1, 2, 3]},
    "ranks: rank 1.5 is no whole number": {"ranks": [1, 1.5]},
    "ranks: rank True": {"ranks": [True, 2]},
    "ranks: rank nan": {"ranks": [1, float("nan")]},
    "generators: 1 names for 2": {"generators": ["a"]},
    "beauty_ranks: unknown aspect 'beauty'": {"beauty_ranks": [1, 2]},
    "unknown column 'rank'; did you mean 'ranks'?": {"rank": [1, 2], "ranks": None},
    "second is 2, which is out of range; there are candidates 0 to 1": {
        "choices": [{"first": 0, "second": 2, "preferred": "first"}]
    },
    "first is -1, which is out of range": {"choices": [{"first": -1, "second": 1, "preferred": "first"}]},
    "compares candidate 1 with itself": {"choices": [{"first": 1, "second": 1, "preferred": "first"}]},
    "preferred is 'left'": {"choices": [{"first": 0, "second": 1, "preferred": "left"}]},
    "unknown aspect 'taste'": {"choices": [{"first": 0, "second": 1, "preferred": "tie", "aspect": "taste"}]},
    "weight is 0": {"choices": [{"first": 0, "second": 1, "preferred": "tie", "weight": 0}]},
    "unknown key 'wieght'": {"choices": [{"first": 0, "second": 1, "preferred": "tie", "wieght": 2}]},
    "choice 0 is 'A'": {"choices": ["A"]},
    "choices: expected a list": {"choices": {"first": 0}},
}


def test_every_bad_row_is_named_in_one_pass(tmp_path: Path) -> None:
    rows: list[Any] = [{**ROW, "sample_id": f"s{n}", **change} for n, change in enumerate(BAD.values())]
    write_rows(tmp_path, *rows, "{broken", "[1]", {**ROW, "sample_id": "fine"}, {**ROW, "sample_id": "fine"})
    with pytest.raises(DataProblems) as caught:
        read_preferences(tmp_path)
    problems = caught.value.problems
    for line, text in enumerate(BAD, start=1):
        (found,) = (p for p in problems if re.search(rf"metadata\.jsonl: line {line}\b", p.where or ""))
        assert text in found.what
    tail = "\n".join(problem.what for problem in problems)
    assert "not valid JSON" in tail and "not a JSON object" in tail and "'fine' repeats" in tail
    assert len(problems) == len(BAD) + 3
    assert caught.value.exit_code == 3


def test_several_mistakes_of_one_row_are_all_named(tmp_path: Path) -> None:
    write_rows(tmp_path, {**ROW, "ranks": [1], "photo": 3, "lr_file_name": "gone.png"})
    with pytest.raises(DataProblems) as caught:
        read_preferences(tmp_path)
    assert [problem.what.split(":")[0] for problem in caught.value.problems] == ["lr_file_name", "photo", "ranks"]


def test_what_is_absent_or_null_has_defaults(tmp_path: Path) -> None:
    first = {**ROW, "sample_id": "x@y@3", "photo": None, "generators": None, "choices": None, "extra": {"any": 1}}
    write_rows(tmp_path, first, {**ROW, "ranks": [None, None], "generators": ["a", None]})
    one, two = read_preferences(tmp_path)
    assert (one.photo, one.source, one.choices, one.degradation, one.split) == ("x@y", "unknown", (), "", "")
    assert [candidate.generator for candidate in one.candidates] == ["", ""]
    assert (two.photo, two.ranks, two.pairs()) == ("a", {}, [])


def test_a_link_of_the_users_own_may_lead_out(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data", ROW)
    (tmp_path / "data/lr.png").rename(tmp_path / "elsewhere.png")
    os.symlink(tmp_path / "elsewhere.png", tmp_path / "data/lr.png")
    assert read_preferences(tmp_path / "data")[0].load().lr_image.shape == (3, 16, 24)


def test_bad_cells_of_parquet_are_named_too(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from refreward_trl.data.preference_writers import features

    cell = {"bytes": ImageTensor(picture(0)).encoded(), "path": None}
    large = {"bytes": ImageTensor(picture(0, 32, 48)).encoded(), "path": None}
    outside = {"bytes": None, "path": "/etc/hostname"}
    rows = [
        {"sample_id": "a", "lr": None, "candidates": [large, large]},
        {"sample_id": "b", "lr": cell, "candidates": [large]},
        {"sample_id": "c", "lr": cell, "candidates": [large, large], "ranks": [1]},
        {"sample_id": "d", "lr": cell, "candidates": [large, outside], "ranks": [1, 2]},
        {"sample_id": "e", "lr": cell, "candidates": [large, None], "ranks": [1, 2]},
    ]
    table = pyarrow.Table.from_pylist(rows, schema=features().arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "all.parquet")
    with pytest.raises(DataProblems) as caught:
        read_preferences(tmp_path / "all.parquet")
    assert [problem.what for problem in caught.value.problems] == [
        "the LR image is missing",
        "1 candidate, and there is nothing to compare",
        "ranks: 1 ranks for 2 candidates",
    ]
    pyarrow.parquet.write_table(table.slice(3), tmp_path / "some.parquet")
    outside_record, empty_record = read_preferences(tmp_path / "some.parquet")
    with pytest.raises(DataError, match=r"row 0, column candidates\[1\]: the path /etc/hostname leads out"):
        outside_record.load()
    with pytest.raises(DataError, match=r"row 1, column candidates\[1\]: the cell is empty"):
        empty_record.load()


def test_no_other_column_is_decoded(tmp_path: Path) -> None:
    """A table may say that any column holds images, and its cells may name any file."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    from refreward_trl.data.preference_converters import convert_preferences
    from refreward_trl.data.preference_writers import features

    image, secret = datasets.Image(), {"bytes": None, "path": "/nowhere/secret.png"}
    cell, large = ({"bytes": ImageTensor(picture(0, *size)).encoded(), "path": None} for size in ((16, 24), (32, 48)))
    other = {"bytes": ImageTensor(picture(1, 32, 48)).encoded(), "path": None}
    stray = {"extra": secret, "nested": [{"picture": secret}]}
    rows = [{"sample_id": "a", "lr": cell, "candidates": [large, other], "ranks": [1, 2], **stray}]
    kinds = {"extra": image, "nested": datasets.List({"picture": image})}
    schema = datasets.Features({**features(), **kinds}).arrow_schema
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), tmp_path / "a.parquet")
    assert len(read_preferences(tmp_path / "a.parquet")[0].pairs()) == 1
    rows = [{"images": [cell, large, other], "chosen": "A", "rejected": "B", **stray}]
    text = datasets.Value("string")
    kinds |= {"images": datasets.List(image), "chosen": text, "rejected": text}
    table = pyarrow.Table.from_pylist(rows, schema=datasets.Features(kinds).arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert len(convert_preferences(tmp_path / "b.parquet", "trl")[0].pairs()) == 1


@pytest.mark.parametrize("content", ["nothing", "empty", "pictures"])
def test_what_is_no_dataset_is_refused(content: str, tmp_path: Path) -> None:
    if content == "empty":
        (tmp_path / "metadata.jsonl").write_text("\n")
    if content == "pictures":
        to_pil(picture(0)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no preference dataset|no rows"):
        read_preferences(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        read_preferences(tmp_path / "gone")
