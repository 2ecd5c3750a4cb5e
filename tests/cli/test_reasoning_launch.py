"""Judges that reason on two processes, as users start them: by DDP and under ZeRO, saved whole, gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import ended, furnish, needs_deepspeed, started
from tiny_judges import family_judge

from refreward_trl.cli.packaged import find_recipe
from refreward_trl.reward_model.loading import load_judge, load_judge_as
from refreward_trl.reward_model.reasoning import ReasonJudge

pytestmark = [pytest.mark.slow, needs_deepspeed]

COMMON = {
    "dataset": "photos",
    "dataset_split": "train",
    "eval_dataset": "photos",
    "degradation": "bicubic",
    "crop_size": "32",
    "max_groups": "8",
    "eval_groups": "1",
    "eval_samples": "1",
    "mates": "2",
    "per_device_train_batch_size": "4",
    "learning_rate": "1e-2",
    "output_dir": "run",
    "disable_tqdm": "true",
}


def launch(place: Path, method: str, recipe: str, launch_file: str, **own: str) -> str:
    values = COMMON | own
    words = [word for name, value in values.items() for word in (f"--{name}", value)]
    done = ended(started(place, launch_file, *words, method=method, recipe=str(find_recipe(recipe))))
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def answer(judge: ReasonJudge) -> str:
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(1, 3, side, side, generator=generator) for side in (8, 32))
    return judge.reason(*images)[0].answers[0]


@pytest.mark.parametrize("launch_file", ["ddp_cpu.yaml", "zero2.yaml", "zero3.yaml"])
def test_a_start_and_grpo_on_two_processes(launch_file: str, tmp_path: Path) -> None:
    place = furnish(tmp_path)
    launch(place, "rm-sft", "tiny/rm_sft", launch_file, max_steps="2", output_dir="start", preferences="null")
    start = load_judge_as(ReasonJudge, place / "start/judge")
    grpo = {"judge": "start/judge", "num_generations": "2", "max_completion_length": "14", "save_strategy": "steps"}
    grpo["preferences"] = "null"
    launch(place, "rm-grpo", "tiny/rm_grpo_pointwise", launch_file, max_steps="2", save_steps="2", **grpo)
    first = {name: weight.clone() for name, weight in load_judge(place / "run/judge").model.state_dict().items()}
    # The same command goes on from the checkpoint; TRL draws the answers anew, so this is no repetition bit by bit.
    launch(place, "rm-grpo", "tiny/rm_grpo_pointwise", launch_file, max_steps="3", save_steps="2", **grpo)
    found = json.loads((place / "run/summary.json").read_text())
    assert found["steps"] == 3
    assert {"before", "after", "gain"} <= found["judge"].keys()
    judge = load_judge_as(ReasonJudge, place / "run/judge")
    assert isinstance(answer(judge), str)
    assert first.keys() == start.model.state_dict().keys()
    if launch_file != "ddp_cpu.yaml":
        assert any((place / "run/checkpoint-2").rglob("*optim_states.pt")), "DeepSpeed did not run"


@pytest.mark.parametrize("launch_file", ["ddp_cpu.yaml", "zero2.yaml", "zero3.yaml"])
def test_a_rating_judge_with_an_adapter_on_two_processes(launch_file: str, tmp_path: Path) -> None:
    place = furnish(tmp_path)
    base = family_judge("qwen2_5_vl", sharpness=2.0)
    base.save_pretrained(place / "base")
    own = {"judge": "base", "use_peft": "true", "max_steps": "2", "test_pairs": "0", "save_steps": "2"}
    settings = {name: value for name, value in COMMON.items() if name not in ("eval_samples", "mates")}
    words = [word for name, value in (settings | own).items() for word in (f"--{name}", value)]
    words += ["--teachers", "null", "--teacher_weights", "null", "--eval_strategy", "no"]
    done = ended(started(place, launch_file, *words, method="rm", recipe=str(find_recipe("tiny/rm"))))
    assert done.returncode == 0, done.stderr[-4000:]
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(2, 3, side, side, generator=generator) for side in (8, 32)]
    merged, adapted = load_judge(place / "run/judge"), load_judge(place / "run/judge/adapter")
    torch.testing.assert_close(merged.rate(*images), adapted.rate(*images), rtol=0, atol=1e-5)
    assert (merged.rate(*images) - base.rate(*images)).abs().max() > 1e-4
