"""Published generators under ZeRO by the packaged recipes: from an authors' format and back to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import published_models
import pytest
import torch
from launching import ended, furnish, needs_deepspeed, started
from tiny_judges import own_rewards

from refreward_trl import checkpointing
from refreward_trl.cli import app
from refreward_trl.cli.packaged import find_recipe, recipe_names
from refreward_trl.cli.recipe import read_recipe
from refreward_trl.generators import load_generator

PUBLISHED = [name for name in recipe_names() if "generator_family" in read_recipe(name).values]
JUDGED = ("osediff_sd21/refl_24gb", "osediff_sd21/refl_80gb", "osediff_sd21/refl_8gpu")
"""Recipes whose reward comes from a judge that the user trains first."""

SMALL = {
    "dataset": "photos",
    "eval_dataset": "photos",
    "degradation": "bicubic",
    "crop_size": "32",
    "max_eval_images": "1",
    "rewards": '[{"name": "psnr"}]',
    "heldout_rewards": "[]",
    "load_best_model_at_end": "false",
    "eval_strategy": "no",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "1",
    "save_steps": "1",
    "learning_rate": "1e-2",
    "output_dir": "run",
    "disable_tqdm": "true",
}


NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4))
"""


def words(method: str, steps: int, **own: str) -> list[str]:
    values = {**SMALL, **own, "max_steps": str(steps)}
    values |= {"num_generations": "2", "noise_cell": "4", "self_check": "true"} if method == "ddpo" else {}
    return [word for name, value in values.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_dry_run_finds_everything_without_a_network(name, tmp_path, monkeypatch, capsys):
    recipe = read_recipe(name)
    made = published_models.WRITERS[recipe.values["generator_family"]](tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--generator", str(made.path), "--base_model", str(made.base)]
    if name in JUDGED:
        flags += ["--rewards", own_rewards(recipe.values, tmp_path), "--crop_size", "64"]
        flags += ["--dataset", "default", "--eval_dataset", "default"]
    assert app.main([recipe.method, "--config", name, "--dry-run", *flags]) == 0
    shown = capsys.readouterr().out
    assert str(made.path) in shown and str(made.base) in shown and "licence" in shown
    assert not (tmp_path / "runs").exists()
    assert app.main([recipe.method, "--config", name, "--dry-run"]) == 5, "the checkpoint is not there"
    told = capsys.readouterr()
    assert "get it from" in told.err and "to be downloaded" in told.out and "train images" in told.out


def test_a_dry_run_says_which_judge_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = published_models.WRITERS["osediff"](tmp_path)
    words = ["refl", "--config", "osediff_sd21/refl_24gb", "--dry-run", "--generator", str(made.path)]
    words += ["--base_model", str(made.base), "--dataset", "default", "--eval_dataset", "default", "--crop_size", "64"]
    judge = tmp_path / "runs/qwen2_5_vl_3b/rm_lora/judge"
    assert app.main(words) == 5
    told = capsys.readouterr()
    assert "rewards      MISSING OR WRONG" in told.out and "no judge at 'runs/qwen2_5_vl_3b/rm_lora/judge'" in told.err
    judge.mkdir(parents=True)
    assert app.main(words) == 0
    assert "refreward x 1 (runs/qwen2_5_vl_3b/rm_lora/judge)" in capsys.readouterr().out
    hub = json.dumps([{"name": "refreward", "kwargs": {"source": "someone/judge"}}])
    assert app.main([*words, "--rewards", hub]) == 0
    assert "to be downloaded" in capsys.readouterr().out
    heldout = json.dumps([{"name": "heldout_judge", "kwargs": {"source": "gone"}}])
    assert app.main([*words, "--heldout_rewards", heldout]) == 5
    assert "no held-out judge at 'gone'" in capsys.readouterr().err


def train_and_resume(place: Path, name: str, stage: str, **own: str) -> None:
    """Trains for two steps and goes on to a third, on two processes under DeepSpeed."""
    method = read_recipe(name).method
    for steps in (2, 3):
        call = words(method, steps, **own)
        done = ended(started(place, f"{stage}.yaml", *call, method=method, recipe=str(find_recipe(name))))
        assert done.returncode == 0, done.stderr[-4000:]
    assert "resuming from run/checkpoint-2" in done.stderr + done.stdout
    assert json.loads((place / "run/summary.json").read_text())["steps"] == 3
    assert checkpointing.verify(place / "run/checkpoint-3")["world_size"] == 2
    assert any((place / "run/checkpoint-3").rglob("*optim_states.pt")), "DeepSpeed did not run"


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_a_network_of_ones_own_trains_and_resumes(stage, tmp_path, monkeypatch):
    place = furnish(tmp_path)
    (place / "my_network.py").write_text(NETWORK)
    train_and_resume(place, "module/refl", stage)
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "my_network", raising=False)
    aligned = load_generator("my_network:build", weights="run/generator")
    lr_image = torch.rand(1, 3, 12, 12)
    image = aligned.generate(lr_image)
    aligned.save_pretrained("again")
    assert torch.equal(load_generator("my_network:build", weights="again").generate(lr_image), image)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains_resumes_and_goes_back(name, stage, tmp_path):
    recipe = read_recipe(name)
    made = published_models.WRITERS[recipe.values["generator_family"]](tmp_path)
    place = furnish(tmp_path / "place")
    own = {"rewards": own_rewards(recipe.values, tmp_path)} if name in JUDGED else {}
    train_and_resume(place, name, stage, generator=str(made.path), base_model=str(made.base), **own)
    lr_image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    aligned = load_generator(place / "run/generator")
    expected = aligned.generate(lr_image)
    with aligned.reference():
        assert not torch.allclose(aligned.generate(lr_image), expected, atol=1e-4), "nothing was learned"
    file_format = "diffusers" if made.path.name == "naosd" else "published"
    target = tmp_path / "exported" / made.path.name
    target.parent.mkdir()
    assert app.main(["export", str(place / "run/generator"), str(target), "--format", file_format]) == 0
    options = {} if file_format == "diffusers" else {"base_model": str(made.base)}
    again = load_generator(target, **options)
    torch.testing.assert_close(again.generate(lr_image), expected, rtol=0, atol=1e-5)
