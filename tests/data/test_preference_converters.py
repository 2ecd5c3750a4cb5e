"""A miniature written in each foreign layout becomes the groups that it means, or an error for each bad row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from refreward_trl.data.image_sources import ImageTensor
from refreward_trl.data.images import write_png
from refreward_trl.data.preference_converters import ConvertOptions, convert_preferences, detect_format
from refreward_trl.data.preferences import PreferenceRecord, read_preferences, write_preferences
from refreward_trl.data.sources import DataProblems
from refreward_trl.errors import ConfigError, DataError

LR = {name: number for number, name in enumerate(("lr_a", "lr_b"))}


def pixels(name: str) -> ImageTensor:
    """An image that is the same whenever it is asked for by the same name."""
    side = 8 if name.startswith("lr") else 16
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "big") % 2**40)
    return ImageTensor(torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator))


def png(name: str) -> dict[str, Any]:
    return {"bytes": pixels(name).encoded(), "path": None}


def meaning(records: Sequence[PreferenceRecord], names: Sequence[str]) -> list[dict[str, Any]]:
    """What records say, with images by their names."""
    known = {pixels(name).encoded(): name for name in (*names, *LR)}

    def named(source: Any) -> str:
        return known[ImageTensor(source.read()).encoded()]

    found = []
    for record in records:
        images = [named(candidate.image) for candidate in record.candidates]
        pairs = {
            aspect: sorted((images[p.better], images[p.worse], p.weight, p.tie) for p in record.pairs(aspect))
            for aspect in record.aspects
        }
        found.append(
            {"lr": named(record.lr_image), "candidates": sorted(images), "pairs": pairs, "source": record.source}
        )
    return found


NAMES = ("x", "y", "z", "w")
MEANT = [
    {
        "lr": "lr_a",
        "candidates": ["x", "y", "z"],
        "pairs": {"overall": [("x", "y", 1.0, False), ("x", "z", 1.0, False)]},
        "source": "unknown",
    },
    {
        "lr": "lr_b",
        "candidates": ["w", "x"],
        "pairs": {"overall": [("w", "x", 1.0, False)]},
        "source": "unknown",
    },
]


def check_written(records: list[PreferenceRecord], meant: list[dict[str, Any]], folder: Path) -> None:
    """Records survive both of our formats, and conversion from one into the other."""
    assert meaning(records, NAMES) == meant
    write_preferences(records, folder / "f")
    assert detect_format(folder / "f") == "native"
    write_preferences(convert_preferences(folder / "f", "native"), folder / "p", format="parquet")
    assert detect_format(folder / "p") == "native"
    assert meaning(read_preferences(folder / "p"), NAMES) == meant


# TRL


def said(style: str, answer: str) -> Any:
    if style == "plain":
        return answer
    content = (
        answer if style == "messages" else [{"type": "text", "text": f"<think>B?</think><answer>{answer}</answer>"}]
    )
    return [{"role": "assistant", "content": content}]


@pytest.mark.parametrize("style", ["plain", "messages", "blocks"])
def test_trl_answers_name_candidates(style: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Which?", "images": ["lr_a", "x", "y", "z"], "chosen": "A", "rejected": "B"},
        {"prompt": "Which?", "images": ["lr_a", "z", "x"], "chosen": "Image B", "rejected": "(a)"},
        {"prompt": "Which?", "images": ["lr_b", "x", "w"], "chosen": "B", "rejected": "Candidate A."},
    ]
    table = {
        "prompt": [row["prompt"] for row in rows],
        "images": [[png(name) for name in row["images"]] for row in rows],
        **{key: [said(style, row[key]) for row in rows] for key in ("chosen", "rejected")},
    }
    feature = datasets.List(datasets.Image())
    made = datasets.Dataset.from_dict(table).cast_column("images", feature)
    made.to_parquet(str(tmp_path / "trl.parquet"))
    assert detect_format(tmp_path / "trl.parquet") == "trl"
    check_written(convert_preferences(tmp_path / "trl.parquet", "trl"), MEANT, tmp_path)


def test_trl_images_of_their_own_and_positions(tmp_path: Path) -> None:
    chosen = [("lr_a", "x", "y"), ("lr_a", "x", "z"), ("lr_b", "w", "x")]
    table = {key: [png(row[n]) for row in chosen] for n, key in enumerate(("lr_image", "chosen", "rejected"))} | {
        "prompt": ["Which?"] * 3
    }
    made = datasets.Dataset.from_dict(table)
    for key in ("lr_image", "chosen", "rejected"):
        made = made.cast_column(key, datasets.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    assert detect_format(tmp_path / "saved") == "trl"
    check_written(convert_preferences(tmp_path / "saved", "trl"), MEANT, tmp_path)

    for name in (*NAMES, *LR):
        write_png(tmp_path / f"i/{name}.png", pixels(name).read())
    rows = [{"images": [f"{name}.png" for name in row], "chosen": "better", "rejected": "worse"} for row in chosen]
    file = tmp_path / "i/rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    assert meaning(convert_preferences(file, detect_format(file)), NAMES) == MEANT
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "chosen": "It is B, and sharper."} for row in rows]))
    options = ConvertOptions(images=tmp_path / "i", chosen_first=True)
    assert meaning(convert_preferences(tmp_path / "rows.json", "trl", options), NAMES) == MEANT


def test_trl_rows_that_prefer_nothing_for_certain_are_all_refused(tmp_path: Path) -> None:
    for name in (*NAMES, *LR):
        write_png(tmp_path / f"{name}.png", pixels(name).read())
    good = {"images": ["lr_a.png", "x.png", "y.png"], "chosen": "A", "rejected": "B"}
    bad = {
        "chosen is 'B is sharper', which is none of the 2 candidates": {"chosen": "B is sharper"},
        "rejected is 'C', which is none": {"rejected": "C"},
        "rejected is '', which is none": {"rejected": None},
        "are the same candidate": {"rejected": "a"},
        "1 images after the LR image": {"chosen": "better", "rejected": "worse", "images": ["lr_a.png", "x.png"]},
        "the two images that are compared are the same": {"images": ["lr_a.png", "x.png", "x.png"]},
        "there is no file gone.png": {"images": ["lr_a.png", "gone.png", "x.png"]},
        "leads out of the dataset": {"images": ["../lr_a.png", "y.png", "x.png"]},
        "there is no image in column images": {"images": []},
        "unknown aspect 'taste'": {"aspect": "taste"},
        "weight is 'heavy', not a number": {"weight": "heavy"},
        "weight nan is no finite number above 0": {"weight": "nan"},
        "weight inf is no finite number above 0": {"weight": "inf"},
        "weight 0 is no finite number above 0": {"weight": 0},
        "'s' has another LR image": {"sample_id": "s", "images": ["lr_b.png", "x.png", "y.png"]},
    }
    rows = [{**good, "sample_id": "s"}, *({**good, **change} for change in bad.values())]
    (tmp_path / "rows.jsonl").write_text("\n".join([*map(json.dumps, rows), "{"]))
    with pytest.raises(DataProblems) as caught:
        convert_preferences(tmp_path / "rows.jsonl", "trl")
    assert len(caught.value.problems) == len(bad) + 1
    for number, (text, problem) in enumerate(zip(bad, caught.value.problems, strict=False), start=2):
        assert text in problem.what and f"line {number}" in (problem.where or "")


def test_trl_keys_may_have_other_names(tmp_path: Path) -> None:
    for name in (*NAMES, *LR):
        write_png(tmp_path / f"{name}.png", pixels(name).read())
    row = {
        "pics": ["lr_a.png", "x.png", "y.png"],
        "win": "B",
        "rejected": "A",
        "who": "ann",
        "image": "-",
        "chosen": "",
    }
    row |= {
        "generators": ["gan", None],
        "photo": "house",
        "sample_id": "house@1",
        "aspect": "consistency",
        "weight": 2,
    }
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    options = ConvertOptions(columns={"images": "pics", "chosen": "win", "annotator": "who"}, source="human")
    (record,) = convert_preferences(tmp_path / "rows.json", "trl", options)
    assert (record.sample_id, record.photo, record.source, record.aspects) == (
        "house@1",
        "house",
        "human",
        ("consistency",),
    )
    (choice,) = record.choices
    assert (choice.annotator, choice.weight) == ("ann", 2.0)
    assert [candidate.generator for candidate in record.candidates] == ["", "gan"]
    with pytest.raises(ConfigError, match="trl has no key 'chose'"):
        convert_preferences(tmp_path / "rows.json", "trl", ConvertOptions(columns={"chose": "win"}))


# Pick-a-Pic


def pick(lr: str, first: str, second: str, label: float | None, user: int, split: str = "train") -> dict[str, Any]:
    row = {"lr_image": png(lr)["bytes"], "jpg_0": png(first)["bytes"], "jpg_1": png(second)["bytes"]}
    labels = {"label_0": label, "label_1": None if label is None else 1 - label, "has_label": label is not None}
    return row | labels | {"model_0": f"net_{first}", "model_1": f"net_{second}", "user_id": user, "caption": "a"}


def test_pickapic_rows_of_one_lr_image_become_one_group(tmp_path: Path) -> None:
    rows = [
        pick("lr_a", "x", "y", 1, 7),
        pick("lr_b", "x", "w", 0, 7),
        pick("lr_a", "z", "x", 0.5, 8),
        pick("lr_a", "y", "x", 0, 9),
        pick("lr_a", "y", "z", None, 9),
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "pick.parquet"))
    assert detect_format(tmp_path / "pick.parquet") == "pickapic"
    records = convert_preferences(tmp_path / "pick.parquet", "pickapic")
    meant = [
        {**MEANT[0], "pairs": {"overall": [("x", "y", 2.0, False), ("x", "z", 1.0, True)]}},
        MEANT[1],
    ]
    check_written(records, meant, tmp_path)
    assert {candidate.generator for candidate in records[0].candidates} == {"net_x", "net_y", "net_z"}
    assert [choice.annotator for choice in records[0].choices] == ["7", "8", "9"]


def test_pickapic_names_every_bad_row(tmp_path: Path) -> None:
    rows = [
        pick("lr_a", "x", "y", 0.25, 1),
        pick("lr_a", "x", "y", 1, 1) | {"lr_image": None},
        pick("lr_a", "x", "x", 1, 1),
        pick("lr_a", "x", "y", 1, 1) | {"jpg_1": None},
        pick("lr_a", "x", "y", 1, 1) | {"label_1": None},
    ]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "pick.parquet"))
    with pytest.raises(DataProblems) as caught:
        convert_preferences(tmp_path / "pick.parquet", "pickapic")
    assert [problem.what for problem in caught.value.problems] == [
        "the labels are 0.25 and 0.75",
        "there is no LR image in lr_image or lr",
        "the two images that are compared are the same",
        "there is no image in column jpg_1",
        "the labels are 1.0 and None",
    ]


# Label Studio


def task(number: int, lr: str, left: str, right: str, *answers: Any) -> dict[str, Any]:
    annotations = [
        {
            "completed_by": {"id": 3, "email": "ann@x.org"} if who == "ann" else who,
            "was_cancelled": False,
            "result": [{"type": kind, "from_name": tag, "to_name": "l,r", "value": value}],
        }
        for who, tag, kind, value in answers
    ]
    data = {
        "lr": f"/data/local-files/?d=imgs/{lr}.png",
        "left": f"/data/imgs/{left}.png",
        "right": f"imgs/{right}.png",
    }
    return {"id": number, "data": data, "annotations": annotations, "predictions": [{"result": "x"}]}


LEFT, RIGHT = {"selected": "left"}, {"selected": "right"}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in (*NAMES, *LR):
        write_png(tmp_path / f"imgs/{name}.png", pixels(name).read())
    return tmp_path


def test_label_studio_annotations_become_choices(images: Path) -> None:
    other = {"choices": ["blurry"]}
    tasks = [
        task(1, "lr_a", "x", "y", ("ann", "pw", "pairwise", LEFT), (5, "consistency", "pairwise", RIGHT)),
        task(
            2,
            "lr_a",
            "z",
            "x",
            (5, "pw", "choices", {"choices": ["Tie"]}),
            (5, "q", "choices", other),
        ),
        task(3, "lr_b", "x", "w", (5, "pw", "pairwise", RIGHT)),
        task(4, "lr_a", "y", "z"),
    ]
    tasks[0]["annotations"].append({"was_cancelled": True, "result": [{"type": "pairwise", "value": RIGHT}]})
    file = images / "export.json"
    file.write_text(json.dumps(tasks))
    assert detect_format(file) == "labelstudio"
    records = convert_preferences(file, "labelstudio")
    pairs = {"overall": [("x", "y", 1.0, False), ("z", "x", 1.0, True)], "consistency": [("y", "x", 1.0, False)]}
    found = meaning(records, NAMES)
    assert [sorted(p[:2]) for p in found[0]["pairs"].pop("overall")] == [["x", "y"], ["x", "z"]]
    assert found[0]["pairs"] == {"consistency": pairs["consistency"]}
    assert found[1] == {**MEANT[1], "source": "human"}
    assert [choice.annotator for choice in records[0].choices] == ["ann@x.org", "5", "5"]
    assert [choice.preferred for choice in records[0].choices] == ["first", "second", "tie"]


def test_label_studio_names_every_bad_task(images: Path) -> None:
    tasks = [
        task(1, "lr_a", "x", "y", ("ann", "pw", "pairwise", {"selected": "up"})),
        task(2, "lr_a", "x", "gone", ("ann", "pw", "pairwise", LEFT)),
        task(3, "lr_a", "x", "y", ("ann", "pw", "pairwise", LEFT)),
        {"id": 4, "text": "min"},
        task(5, "lr_a", "x", "y"),
    ]
    tasks[2]["data"]["left"] = "https://example.org/x.png"
    tasks[4]["data"] = {"image1": "imgs/x.png"}
    (images / "export.json").write_text(json.dumps(tasks))
    with pytest.raises(DataProblems) as caught:
        convert_preferences(images / "export.json", "labelstudio")
    texts = [f"{problem.where}: {problem.what}" for problem in caught.value.problems]
    wanted = (
        "neither left nor right",
        "no file imgs/gone.png",
        "on a server",
        "not a task",
        "has no 'lr'; there are: image1",
    )
    for number, (text, part) in enumerate(zip(texts, wanted, strict=True), start=1):
        assert f"task {number}" in text and part in text


# RefSR-18K style


def write_groups(folder: Path, lr: str = "lr") -> Path:
    for group, lr_image, names in (("g1", "lr_a", "xyz"), ("g2", "lr_b", "wx")):
        write_png(folder / group / f"{lr}.png", pixels(lr_image).read())
        for name in names:
            write_png(folder / group / f"{name}.png", pixels(name).read())
    return folder


RANKS = {"g1": {"x": 1, "y": 2, "z": 2}, "g2": {"w": 1, "x": 2}}
RANKED = [
    {**MEANT[0], "pairs": {"overall": [("x", "y", 1.0, False), ("x", "z", 1.0, False), ("y", "z", 1.0, True)]}},
    MEANT[1],
]
LONG = "group,candidate,rank\ng1,x,1\ng1,y.png,2\ng1,z,2\ng2,w,1\ng2,x,2\n"
WIDE = "group,x,y,z,w\ng1,1,2,2,\ng2,2,,,1\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ranks.csv", LONG),
        ("ranks.csv", WIDE),
        ("ranks.json", json.dumps(RANKS)),
        ("ranks.jsonl", "\n".join(json.dumps({"group": g, "ranks": r}) for g, r in RANKS.items())),
        ("ranks.json", json.dumps([{"group": g, **r} for g, r in RANKS.items()])),
    ],
    ids=["long", "wide", "mapping", "lines", "rows"],
)
def test_refsr_tables_of_all_forms_say_the_same(name: str, text: str, tmp_path: Path) -> None:
    write_groups(tmp_path / "d")
    (tmp_path / "d" / name).write_text(text)
    assert detect_format(tmp_path / "d") == "refsr"
    records = convert_preferences(tmp_path / "d", "refsr")
    assert [candidate.generator for candidate in records[0].candidates] == ["x", "y", "z"]
    check_written(records, RANKED, tmp_path)


def test_refsr_layout_can_be_told(tmp_path: Path) -> None:
    write_groups(tmp_path / "d", lr="LQ")
    write_png(tmp_path / "d/g1/GT.png", pixels("w").read())
    text = "scene,method,order,aspect,photo\ng1,x,1,overall,house\ng1,y,2,overall,\ng1,x,2,naturalness,\n"
    (tmp_path / "table.csv").write_text(text + "g1,y,1,naturalness,\ng2,w,1,,\ng2,x,2,,\n")
    options = ConvertOptions(
        columns={"group": "scene", "candidate": "method", "rank": "order"},
        lr_name="LQ",
        hr_name="GT",
        ranks_table=tmp_path / "table.csv",
    )
    first, second = convert_preferences(tmp_path / "d", "refsr", options)
    assert first.ranks == {"overall": (1, 2, None), "naturalness": (2, 1, None)} and first.photo == "house"
    assert first.hr_image is not None and second.hr_image is None and second.photo == "g2"


def test_refsr_names_everything_that_is_wrong(tmp_path: Path) -> None:
    write_groups(tmp_path)
    write_png(tmp_path / "g3/x.png", pixels("x").read())
    write_png(tmp_path / "g4/lr.png", pixels("lr_a").read())
    for name in "lr", "x", "y":
        write_png(tmp_path / f"g5/{name}.png", pixels("lr_a" if name == "lr" else name).read())
    (tmp_path / "ranks.csv").write_text(LONG + "g1,x,3\ng2,v,3\ng9,x,1\ng1,y,best\n,x,1\n")
    with pytest.raises(DataProblems) as caught:
        convert_preferences(tmp_path, "refsr")
    texts = "\n".join(problem.what for problem in caught.value.problems)
    for part in (
        "x of group 'g1' has a rank already",
        "the table ranks v, and there is no such image",
        "group 'g9' has no folder",
        "the rank of y is 'best', no whole number",
        "there is no group",
        "there is no LR image lr.*",
        "0 candidates",
        "the table of ranks has no such group",
    ):
        assert part in texts
    assert len(caught.value.problems) == 8


# Detection


def test_what_cannot_be_told_is_asked_for(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"a": [1]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ConfigError, match="no layout fits, columns: a"):
        detect_format(tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text("{broken")
    with pytest.raises(ConfigError, match="no layout fits"):
        detect_format(tmp_path / "b.json")
    with pytest.raises(DataError, match="nothing here"):
        detect_format(tmp_path / "gone")
