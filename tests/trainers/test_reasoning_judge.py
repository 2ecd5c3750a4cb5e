"""Judges that reason, trained by TRL: whole groups in every batch, both styles, saved as judges."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_judges import family_judge
from transformers import AutoModelForImageTextToText

from refreward_trl.data.preference_records import PreferenceGroup
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.reward_model.answers import has_format, parse_choice, parse_rating
from refreward_trl.reward_model.loading import load_judge_as
from refreward_trl.reward_model.reasoning import ReasonJudge
from refreward_trl.trainers.judge_grpo import JudgeGRPOConfig, JudgeGRPOTrainer
from refreward_trl.trainers.judge_sft import JudgeSFTConfig, JudgeSFTTrainer
from refreward_trl.trainers.reasoning_judge import NEW_REASONING_SPEC, ReasoningArguments, open_reasoning_judge
from refreward_trl.trainers.reasoning_rows import ReasoningRows, known_truths, rationale


@cache
def group(number: int) -> PreferenceGroup:
    """Four candidates, the darker the worse, but for the last two, which are tied."""
    generator = torch.Generator().manual_seed(number)
    lr_image = torch.randint(100, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)
    image = lr_image.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    candidates = torch.stack([(image * (1 - 0.25 * min(rank, 2))).byte() for rank in range(4)])
    pairs = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3))
    return PreferenceGroup(f"s{number}", f"p{number % 3}", lr_image, candidates, pairs, ("",) * 4, ties=((2, 3),))


def rows(style: Any, *, count: int = 6, mates: int = 3, spec: Any = NEW_REASONING_SPEC) -> ReasoningRows:
    return ReasoningRows(group, count, spec=spec, style=style, mates=mates)


def common(folder: Path, style: str) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "style": style,
        "mates": 3,
        "max_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 3e-3,
    }


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge that has seen a few answers."""
    folder = tmp_path_factory.mktemp("start")
    settings = common(folder, "pointwise") | {"max_steps": 60, "per_device_train_batch_size": 6}
    trainer = JudgeSFTTrainer(JudgeSFTConfig(**settings), lambda spec: rows("pointwise", spec=spec, count=20))
    trainer.train()
    trainer.save_judge(folder / "judge")
    return folder / "judge"


def test_pointwise_rows_of_a_group_are_neighbours_and_know_its_labels() -> None:
    asked = rows("pointwise", count=20)
    for number in range(20):
        block = [asked[3 * number + place] for place in range(3)]
        assert len({row["group"] for row in block}) == 1
        assert [row["candidate"] for row in block] == [0, 1, 2]
        truths = json.loads(block[0]["truths"])
        assert truths
        brightness = [sum(row["images"][1].convert("L").getdata()) for row in block]
        for first, second, truth in truths:
            if truth == 0.5:
                assert brightness[first] == brightness[second]
            else:
                assert (brightness[first] > brightness[second]) == (truth == 1)


def test_pairwise_rows_ask_in_both_orders() -> None:
    asked = rows("pairwise", count=20)
    firsts = []
    for number in range(20):
        one, other = asked[2 * number], asked[2 * number + 1]
        assert one["shown"] == other["shown"][::-1]
        assert one["truth"] == 1 - other["truth"]
        assert one["group"] == other["group"]
        brightness = [sum(image.convert("L").getdata()) for image in one["images"][1:]]
        expected = 0.5 if brightness[0] == brightness[1] else float(brightness[0] > brightness[1])
        assert one["truth"] == expected
        firsts.append(one["truth"])
    assert 0 in firsts
    assert 1 in firsts  # neither order comes first always


def test_rows_are_pure_functions_of_their_number() -> None:
    asked, again = rows("pointwise"), rows("pointwise")
    assert [asked[index]["truths"] for index in range(len(asked))] == [
        again[index]["truths"] for index in reversed(range(len(again)))
    ][::-1]


def test_constructed_answers_can_be_read_and_are_right() -> None:
    spec = NEW_REASONING_SPEC
    for index in range(18):
        row = rows("pointwise")[index]
        text = rationale(row, spec)
        assert has_format(text)
        assert 1 <= parse_rating(text, 1, 5) <= 5
    for index in range(12):
        row = rows("pairwise")[index]
        choice = parse_choice(rationale(row, spec), spec.choice_tokens)
        assert choice == ("A" if row["truth"] >= 0.5 else "B")


def test_ties_are_known_as_such() -> None:
    assert known_truths(group(0))[2, 3] == 0.5
    assert known_truths(group(0))[0, 1] == 1.0


def test_groups_that_are_too_small_are_refused() -> None:
    with pytest.raises(DataError, match="4 candidates and 6 comparisons, 5 candidates"):
        rows("pointwise", mates=5)[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"per_device_train_batch_size": 8}, "no whole groups of 3 questions with 4 answers"),
        ({"shuffle_dataset": True}, "tear groups apart"),
        ({"mates": 1}, "mates"),
        ({"style": "listwise"}, "style"),
    ],
)
def test_batches_that_would_part_a_group_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    settings = common(tmp_path, "pointwise") | {"num_generations": 4, "per_device_train_batch_size": 12}
    with pytest.raises((ConfigError, ValueError), match=says):
        JudgeGRPOConfig(**settings | changes)


@pytest.mark.parametrize("style", ["pointwise", "pairwise"])
@pytest.mark.parametrize("use_peft", [False, True])
def test_grpo_trains_and_saves_a_judge(style: str, use_peft: bool, start: Path, tmp_path: Path) -> None:
    settings = common(tmp_path, style) | {
        "judge": str(start),
        "num_generations": 4,
        "per_device_train_batch_size": 24,
        "max_completion_length": 14,
        "use_peft": use_peft,
        "temperature": 1.5,
    }
    trainer = JudgeGRPOTrainer(JudgeGRPOConfig(**settings), lambda spec: rows(style, spec=spec))
    trainer.train()
    line = next(line for line in trainer.state.log_history if "reward" in line)
    name = "ranking" if style == "pointwise" else "correct"
    assert {f"rewards/{name}/mean", "rewards/format/mean", "unreadable_answers"} <= line.keys()
    trainer.save_judge(tmp_path / "judge")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "judge")
    judge = load_judge_as(ReasonJudge, tmp_path / "judge")
    assert judge.spec == NEW_REASONING_SPEC
    assert judge.reason(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 32, 32))[0].answers


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_frozen_vision_tower_stays(use_peft: bool, tmp_path: Path) -> None:
    settings = common(tmp_path, "pointwise") | {"freeze_vision": True, "use_peft": use_peft, "max_grad_norm": 0.0}
    if use_peft:
        settings["lora_target_modules"] = ["qkv", "q_proj"]  # the first is in the vision tower alone
    trainer = JudgeSFTTrainer(JudgeSFTConfig(**settings), lambda spec: rows("pointwise", spec=spec))
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved
    assert not any("visual" in name for name in moved)


def test_a_start_teaches_the_form_of_an_answer(start: Path) -> None:
    judge = load_judge_as(ReasonJudge, start)
    (answer,) = judge.reason(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 32, 32))
    assert has_format(answer.answers[0])


def test_an_untrained_judge_is_no_start_for_grpo() -> None:
    with pytest.raises(ConfigError, match="rm-sft"):
        open_reasoning_judge(ReasoningArguments(), seed=0, may_be_new=False)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_every_family_takes_a_step_of_grpo(family: str, tmp_path: Path) -> None:
    family_judge(family).save_pretrained(tmp_path / "judge")
    settings = common(tmp_path, "pairwise") | {
        "judge": str(tmp_path / "judge"),
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 3,
        "max_steps": 1,
    }
    trainer = JudgeGRPOTrainer(JudgeGRPOConfig(**settings), lambda spec: rows("pairwise", spec=spec))
    trainer.train()
    assert trainer.state.global_step == 1


def test_images_that_do_not_fit_the_judge_are_refused(tmp_path: Path) -> None:
    family_judge("qwen2_5_vl", tile=16).save_pretrained(tmp_path / "judge")
    settings = common(tmp_path, "pairwise") | {
        "judge": str(tmp_path / "judge"),
        "num_generations": 2,
        "per_device_train_batch_size": 4,
    }
    with pytest.raises(ConfigError, match="images of 32x32 pixels do not fit the judge"):
        JudgeGRPOTrainer(JudgeGRPOConfig(**settings), lambda spec: rows("pairwise", spec=spec))
