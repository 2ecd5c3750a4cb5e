from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from refreward_trl.cli import app
from refreward_trl.cli.data import ACTIONS
from refreward_trl.cli.data_validate import KINDS
from refreward_trl.data import preference_checks
from refreward_trl.data.image_sources import ImageTensor
from refreward_trl.data.preferences import Candidate, PreferenceRecord, read_preferences, write_preferences


def noise(number: int, side: int = 16) -> ImageTensor:
    generator = torch.Generator().manual_seed(number)
    return ImageTensor(torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator))


def records(photos: int = 6, crops: int = 2) -> list[PreferenceRecord]:
    return [
        PreferenceRecord(
            sample_id=f"p{photo}@{crop}",
            photo=f"p{photo}",
            lr_image=noise(photo * 10 + crop),
            candidates=tuple(Candidate(noise(1000 + photo * 100 + crop * 10 + k, 32), f"m{k}") for k in range(3)),
            ranks={"overall": (1, 2, 2)},
            source="human",
        )
        for photo in range(photos)
        for crop in range(crops)
    ]


@pytest.fixture(params=["imagefolder", "parquet"])
def prefs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A good dataset, in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_preferences(records(), "prefs", format=request.param)
    return Path("prefs")


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_explains_itself(action: str, capsys: Any) -> None:
    shown = shown_by(["data", action, "--help"], capsys)
    assert f"refreward data {action}" in shown.partition("example")[2]
    assert len(shown.splitlines()) < 60 and max(map(len, shown.splitlines())) < 120
    assert f"\n  {action} " in shown_by(["data", "--help"], capsys)


def shown_by(words: list[str], capsys: Any) -> str:
    try:
        assert app.main(words) == 0
    except SystemExit as stop:
        assert stop.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["validat", "x"], 2, "there is no action 'validat'; did you mean 'validate'?"),
        (["validate"], 2, "the following arguments are required: DATA"),
        (["validate", "gone"], 3, "gone: the dataset does not exist"),
        (["validate", "prefs", "--skip", "row"], 2, "invalid choice: 'row'"),
        (["stats", "prefs", "--split", "test"], 2, "prefs has no split 'test'"),
        (["split", "prefs", "out", "--fractions", "train"], 2, "'train' is no split and share"),
        (["split", "prefs", "out", "--fractions", "a=0.5", "a=0.5"], 2, "a split is named twice"),
        (["split", "prefs", "out", "--fractions", "a=0.5", "b=0.4"], 2, "a=0.5, b=0.4 are no shares of 1"),
    ],
)
def test_mistakes_are_answered(words: list[str], code: int, message: str, prefs: Path, capsys: Any) -> None:
    assert app.main(["data", *words]) == code
    assert message in capsys.readouterr().err


def test_what_may_be_skipped_is_known_to_the_checks() -> None:
    assert {"row", "image", *KINDS} == set(preference_checks.KINDS)


def test_a_good_dataset_is_ok(prefs: Path, capsys: Any) -> None:
    assert app.main(["data", "validate", "prefs"]) == 0
    assert capsys.readouterr().out == "prefs: ok, 12 groups, 48 images\n"
    assert app.main(["data", "validate", "prefs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 12, "problems": []}


def test_all_that_is_bad_is_listed_and_fails(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "prefs"
    write_preferences(records(photos=9), folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines[:15]):
        file = folder / line["candidates_file_names"][1]
        file.write_bytes(file.read_bytes()[:120])
        if number < 3:
            line["ranks"] = [1]
    lines[16]["lr_file_name"] = "gone.png"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert app.main(["data", "validate", str(folder)]) == 3
    shown = capsys.readouterr().err
    assert "16 of 18 entries cannot be used" in shown and "more" not in shown
    assert all(f"line {number}" in shown for number in [*range(1, 16), 17])
    assert app.main(["data", "validate", str(folder), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 18 and [problem["kind"] for problem in found["problems"]] == ["row"] * 4 + ["image"] * 12


def test_stats_as_text_and_json(prefs: Path, capsys: Any) -> None:
    assert app.main(["data", "stats", "prefs"]) == 0
    shown = capsys.readouterr().out
    assert "groups         12 of 6 photos" in shown and "24 ordered pairs and 12 ties in 12 groups" in shown
    assert "m0          24       0       0    100.0 %" in shown
    assert app.main(["data", "stats", "prefs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["aspects"]["overall"]["ties"] == 12


def test_a_split_is_by_photo_and_the_same_each_time(prefs: Path, capsys: Any) -> None:
    words = ["--fractions", "train=0.5", "val=0.5", "--seed", "3"]
    assert app.main(["data", "split", "prefs", "out", *words]) == 0
    assert "train: 6 groups of 3 photos" in capsys.readouterr().out
    found = {r.sample_id: r.split for r in read_preferences("out")}
    assert sorted(found) == [r.sample_id for r in records()]
    assert all(found[f"p{n}@0"] == found[f"p{n}@1"] for n in range(6))
    assert app.main(["data", "validate", "out"]) == 0
    if not (prefs / "metadata.jsonl").is_file():
        assert app.main(["data", "split", "prefs", *words]) == 2
        return
    rows = (prefs / "metadata.jsonl").read_text()
    (prefs / "metadata.jsonl").write_text(rows.replace('"source"', '"mine": [1], "source"'))
    assert app.main(["data", "split", "prefs", *words]) == 0
    assert {r.sample_id: r.split for r in read_preferences("prefs")} == found
    assert (prefs / "metadata.jsonl").read_text().count('"mine": [1]') == 12


def test_a_leak_is_found_and_mended(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "prefs"
    write_preferences(records(), folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        line["split"] = "val" if number in (1, 2) else "train"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert app.main(["data", "validate", str(folder)]) == 3
    assert "2 of 12 entries" in capsys.readouterr().err
    assert app.main(["data", "validate", str(folder), "--skip", "leak"]) == 0
    assert app.main(["data", "split", str(folder), "--fractions", "train=0.8", "val=0.2"]) == 0
    assert app.main(["data", "validate", str(folder)]) == 0


def test_convert_finds_the_layout_out_and_says_what_it_read(tmp_path: Path, capsys: Any) -> None:
    from refreward_trl.data.images import write_png

    for record in records(photos=2, crops=1):
        folder = tmp_path / "theirs" / record.sample_id
        write_png(folder / "LQ.png", record.lr_image.read())
        for candidate in record.candidates:
            write_png(folder / f"{candidate.generator}.png", candidate.image.read())
    rows = [f"p{photo}@0,m{k},{k + 1}" for photo in range(2) for k in range(3)]
    (tmp_path / "theirs/ranks.csv").write_text("\n".join(["id,candidate,rank", *rows]))
    words = ["data", "convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]
    assert app.main(words) == 3
    assert "--columns group=NAME" in capsys.readouterr().err and not (tmp_path / "ours").exists()
    words += ["--columns", "group=id", "--lr-name", "LQ", "--source", "human", "--format", "parquet"]
    assert app.main(words) == 0
    shown = capsys.readouterr().out
    assert "as refsr: 2 groups, 6 candidates" in shown and "not verified on the release" in shown
    assert [record.ranks for record in read_preferences(tmp_path / "ours")] == [{"overall": (1, 2, 3)}] * 2
    assert app.main(["data", "convert", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    assert "as native: 2 groups" in capsys.readouterr().out
    assert app.main(words) == 2
    assert "something is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--columns", "lr"], "'lr' is no KEY=NAME"),
        (["--from", "trl", "--columns", "lrr=x"], "trl has no key 'lrr'"),
        (["--from", "tlr"], "invalid choice: 'tlr'"),
        ([], "no layout fits"),
    ],
)
def test_convert_refuses_wrong_words(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.json").write_text("[]")
    assert app.main(["data", "convert", str(tmp_path / "a.json"), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
