from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from refreward_trl.cli import app
from refreward_trl.cli.score import match_files, means
from refreward_trl.data.images import to_uint8, write_png
from refreward_trl.errors import DataError
from refreward_trl.resampling import downscale

PHOTOS = ("a", "b")


@pytest.fixture
def folders(tmp_path) -> Path:
    """`hr/`, `lr/` (reduced) and `sr/` (the HR image of a, noise for b), 4x, 32 px."""
    generator = torch.Generator().manual_seed(0)
    for name in PHOTOS:
        hr_image = torch.rand(3, 8, 8, generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
        sr_image = hr_image if name == "a" else torch.rand(3, 32, 32, generator=generator)
        write_png(tmp_path / "hr" / f"{name}.png", to_uint8(hr_image))
        write_png(tmp_path / "sr" / f"{name}.png", to_uint8(sr_image))
        write_png(tmp_path / "lr" / f"{name}.png", to_uint8(downscale(hr_image[None], 4)[0].clamp(0, 1)))
    return tmp_path


def score(capsys, *words: str) -> dict:
    assert app.main(["score", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_two_folders_are_scored_in_order_of_their_names(folders, capsys):
    words = [
        str(folders / "lr"),
        str(folders / "sr"),
        "--hr",
        str(folders / "hr"),
        "--reward",
        "lr_consistency",
        "ssim",
    ]
    read = score(capsys, *words)
    assert read["rewards"] == ["lr_consistency", "ssim"]
    assert [row["name"] for row in read["images"]] == ["a.png", "b.png"]
    good, bad = read["images"]
    assert good["lr_consistency"] > bad["lr_consistency"]
    assert good["ssim"] == pytest.approx(1.0, abs=1e-4) and bad["ssim"] < 0.5
    assert read["mean"]["ssim"] == pytest.approx((good["ssim"] + bad["ssim"]) / 2)


def test_two_files_give_the_same_score_as_their_folder(folders, capsys):
    both = score(capsys, str(folders / "lr"), str(folders / "sr"), "--reward", "lr_consistency")
    one = score(capsys, str(folders / "lr/b.png"), str(folders / "sr/b.png"), "--reward", "lr_consistency")
    assert one["images"] == both["images"][1:]


def test_the_table_ends_with_the_mean(folders, capsys):
    assert app.main(["score", str(folders / "lr"), str(folders / "sr"), "--reward", "lr_consistency"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", "a.png", "b.png", "mean"]


def test_a_users_reward_is_found_in_the_current_folder(folders, capsys, monkeypatch):
    (folders / "my_score_rewards.py").write_text(
        "def half(*, completions, **columns):\n    return [0.5 if i.mean() > 2 else None for i in completions]\n"
    )
    monkeypatch.chdir(folders)
    read = score(capsys, "lr/a.png", "sr/a.png", "--reward", "my_score_rewards.half")
    assert read["images"] == [{"name": "a.png", "my_score_rewards.half": None}]


def test_partners_may_differ_in_their_ending(folders):
    (folders / "sr/a.png").rename(folders / "sr/a.PNG")
    assert [triple.name for triple in match_files(folders / "lr", folders / "sr")] == ["a.PNG", "b.png"]


def test_what_does_not_match_is_named(folders):
    (folders / "lr/b.png").unlink()
    with pytest.raises(DataError, match="no image of this name in") as found:
        match_files(folders / "lr", folders / "sr")
    assert str(folders / "sr/b.png") in str(found.value)
    (folders / "sr/a.png").unlink()
    (folders / "sr/b.png").unlink()
    with pytest.raises(DataError, match="no image"):
        match_files(folders / "lr", folders / "sr")
    with pytest.raises(DataError, match="one is a folder and another a file"):
        match_files(folders / "lr", folders / "hr/a.png")


def test_means_leave_out_what_was_not_scored():
    rows = [{"name": "a", "x": 1.0}, {"name": "b", "x": float("nan")}]
    assert means(rows, ["x"]) == {"x": 1.0}


def test_explain_draws_a_picture_per_image(folders, capsys):
    out = folders / "why"
    words = [str(folders / "lr"), str(folders / "sr"), "--reward", "lr_consistency", "--explain", str(out)]
    plain = score(capsys, *words[:4])
    assert score(capsys, *words) == plain
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png"]


def test_a_judge_of_ones_own_is_asked(folders, capsys):
    from tiny_judges import family_judge

    judge = family_judge("idefics3")
    judge.save_pretrained(folders / "judge")
    capsys.readouterr()
    read = score(capsys, str(folders / "lr"), str(folders / "sr"), "--judge", str(folders / "judge"))
    assert read["images"][0]["refreward"] != read["images"][1]["refreward"]
    assert app.main(["score", str(folders / "lr"), str(folders / "sr"), "--reward", "ssim", "--judge", "x"]) == 2
    assert "no reward asks it" in capsys.readouterr().err
