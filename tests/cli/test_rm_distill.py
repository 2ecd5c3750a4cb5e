from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tiny_judges import family_judge

from refreward_trl.cli import app
from refreward_trl.cli.rm_distill import choices_of
from refreward_trl.data.image_sources import ImageTensor
from refreward_trl.data.images import to_float
from refreward_trl.data.preferences import Candidate, PreferenceRecord, read_preferences, write_preferences
from refreward_trl.reward_model.distribution import Spread


def record(number: int) -> PreferenceRecord:
    generator = torch.Generator().manual_seed(number)
    images = [torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8) for side in (8, 32, 32, 32)]
    candidates = tuple(Candidate(ImageTensor(image)) for image in images[1:])
    ranks = {"overall": (2, 1, 0)}
    return PreferenceRecord(
        f"g{number}",
        f"p{number}",
        ImageTensor(images[0]),
        candidates,
        ranks=ranks,
        source="constructed",
        split="train",
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_preferences([record(number) for number in range(3)], tmp_path / "data")
    return tmp_path / "data"


def test_the_order_is_the_teachers_and_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = family_judge("qwen2_5_vl")
    teacher.save_pretrained(tmp_path / "teacher")
    assert app.main(["rm-distill", str(tmp_path / "teacher"), str(data), str(tmp_path / "out")]) == 0
    assert "no opinion of people" in capsys.readouterr().out
    labelled = read_preferences(tmp_path / "out", split="train")
    assert len(labelled) == 3
    for found, before in zip(labelled, read_preferences(data), strict=True):
        assert found.source == f"judge {tmp_path / 'teacher'}"
        assert not found.ranks
        group = before.load()
        lr_image = to_float(group.lr_image)[None].expand(3, -1, -1, -1)
        scores = teacher.rate(lr_image, torch.stack([to_float(image) for image in group.candidates]))
        pairs = {(pair.better, pair.worse): pair.weight for pair in found.pairs()}
        for first, second in itertools.combinations(range(3), 2):
            better, worse = (first, second) if scores[first] > scores[second] else (second, first)
            assert 0 < pairs[better, worse] <= 1


def test_a_student_learns_from_it(data: Path, tmp_path: Path) -> None:
    family_judge("qwen2_5_vl").save_pretrained(tmp_path / "teacher")
    assert app.main(["rm-distill", str(tmp_path / "teacher"), str(data), str(tmp_path / "out")]) == 0
    words = f"--output_dir {tmp_path / 'run'} --preferences {tmp_path / 'out'} --eval_dataset_split train --judge new"
    words += " --max_steps 2 --crop_size 32 --per_device_train_batch_size 1 --use_cpu true --save_strategy no"
    assert app.main(["rm", *words.split()]) == 0


def test_candidates_without_a_score_are_in_no_pair() -> None:
    nan = float("nan")
    choices = choices_of([Spread(4, 0.5), Spread(nan, nan), Spread(2, 0.5), Spread(2, 0.5)])
    assert [(choice.first, choice.second, choice.preferred) for choice in choices] == [
        (0, 2, "first"),
        (0, 3, "first"),
    ]


@pytest.mark.parametrize("words", [["--samples", "0"], ["--ask", "reason", "--temperature", "0"]])
def test_a_spread_needs_samples(words: list[str], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["rm-distill", "default", str(data), "out", *words]) == 2
    assert "needs samples" in capsys.readouterr().err
