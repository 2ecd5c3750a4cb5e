from __future__ import annotations

import json
from pathlib import Path

import published_models
import pytest
import torch
from tiny_judges import byte_tokenizer, family_network, family_spec, own_rewards

from refreward_trl.cli import app
from refreward_trl.cli.building import LORA_TARGETS, build_arguments, build_lora, launch_settings
from refreward_trl.cli.packaged import recipe_names
from refreward_trl.cli.recipe import read_recipe
from refreward_trl.data.image_sources import ImageTensor
from refreward_trl.data.images import to_uint8, write_png
from refreward_trl.data.preferences import Candidate, PreferenceRecord, write_preferences
from refreward_trl.reward_model.scoring import RateJudge
from refreward_trl.trainers.arguments import GeneratorArguments

REWARDS_FILE = """
def contrast(*, completions, lr_image, **columns):
    return completions.flatten(1).std(1)

def contrast_without_graph(*, completions, lr_image, **columns):
    return [float(image.std()) for image in completions]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with three photos of 96 px, an untrained generator and teacher, and a user's file of rewards."""
    from refreward_trl.generators.tiny import build_tiny_generator
    from refreward_trl.reward_model.conv import ConvJudge

    folder = tmp_path_factory.mktemp("place")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b", "c"):
        photo = torch.rand(3, 12, 12, generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
        write_png(folder / "photos" / f"{name}.png", to_uint8(photo))
    build_tiny_generator(vae_width=8, unet_channels=(8, 16)).save_pretrained(folder / "generator")
    ConvJudge(widths=(8, 16), hidden=8).save_pretrained(folder / "teacher")
    (folder / "my_cli_rewards.py").write_text(REWARDS_FILE)
    return folder


@pytest.fixture
def run(place, monkeypatch):
    """Runs a training command for two steps in `place` and returns its exit code."""
    monkeypatch.chdir(place)
    common = {
        "dataset": "photos",
        "eval_dataset": "photos",
        "degradation": "bicubic",
        "crop_size": "32",
        "max_steps": "2",
        "per_device_train_batch_size": "2",
        "max_eval_images": "2",
        "disable_tqdm": "true",
        "save_strategy": "no",
        "eval_strategy": "no",
        "use_cpu": "true",
    }

    def call(method: str, output: str, *words: str, recipe: str | None = None) -> int:
        flags = [word for name, value in common.items() for word in (f"--{name}", value)]
        config = [] if recipe is None else ["--config", recipe]
        return app.main([method, *config, *flags, "--output_dir", output, *words])

    return call


def summary(place: Path, output: str) -> dict:
    return json.loads((place / output / "summary.json").read_text())


def reward(name: str) -> str:
    return json.dumps([{"name": f"my_cli_rewards.{name}", "weight": 2.0}])


@pytest.mark.parametrize(("method", "name"), [("refl", "contrast"), ("ddpo", "contrast_without_graph")])
def test_a_five_line_file_drives_a_training(place, run, method, name):
    (place / "mine.yaml").write_text(
        f"method: {method}\ngenerator: generator\nlearning_rate: 1e-2\nrewards:\n- {{name: my_cli_rewards.{name}}}\n"
        "heldout_rewards:\n- name: lr_consistency\n"
    )
    own = ["--num_generations", "2"] if method == "ddpo" else []
    assert run(method, f"runs/{method}", *own, recipe="mine.yaml") == 0
    found = summary(place, f"runs/{method}")
    assert found["method"] == method and found["steps"] == 2 and found["images"] == 4
    assert found["gain"] == pytest.approx(found["reward_after"] - found["reward_before"], abs=1e-6)
    assert found["gain"] != 0
    assert found["heldout_before"] == pytest.approx(found["lr_psnr_before"], abs=0.1)
    assert found["control_gain"] is None and found["gain_minus_control_ci95"] is None
    assert found["recipe"]["rewards"] == [{"name": f"my_cli_rewards.{name}"}]
    assert {"torch", "transformers"} <= set(found["versions"])
    assert (place / f"runs/{method}/generator/policy/pytorch_lora_weights.safetensors").is_file()


def test_the_summary_compares_with_a_control_run(place, run):
    words = ["--generator", "generator", "--rewards", reward("contrast"), "--learning_rate", "1e-2"]
    assert run("refl", "runs/control", *words, "--reward_weight", "0") == 0
    assert run("refl", "runs/treated", *words, "--control", "runs/control") == 0
    control, treated = summary(place, "runs/control"), summary(place, "runs/treated")
    assert treated["control_gain"] == pytest.approx(control["gain"], abs=1e-6)
    low, high = treated["gain_minus_control_ci95"]
    assert low <= treated["gain"] - control["gain"] <= high


def test_full_finetuning_needs_no_adapter(place, run):
    assert run("finetune", "runs/full", "--generator", "generator", "--use_peft", "false") == 0
    found = summary(place, "runs/full")
    assert set(found["generator"]) >= {"hr_psnr", "gradient_energy", "vae_ceiling_psnr"}
    assert found["bicubic"]["hr_psnr"] > 0
    assert not (place / "runs/full/generator/policy").exists()


def test_a_judge_is_trained_and_measured(place, run):
    words = ["--judge", "conv", "--max_groups", "2", "--eval_groups", "1", "--test_pairs", "2", "--crop_size", "32"]
    assert run("rm", "runs/rm", *words, "--degradation", "seesr") == 0
    assert summary(place, "runs/rm")["judge"]["pairs"] == 20
    assert any((place / "runs/rm/judge").iterdir())


BEST = ["--eval_strategy", "steps", "--save_strategy", "steps", "--load_best_model_at_end", "true"]


@pytest.mark.parametrize(
    ("method", "words", "code", "message"),
    [
        ("refl", ["--rewards", reward("contrast_without_graph")], 4, "not differentiable"),
        ("refl", ["--rewards", reward("brightness")], 2, "has no 'brightness'"),
        ("refl", ["--rewards", reward("contrast"), "--control", "nowhere"], 2, "no figures of a control run"),
        ("refl", ["--rewards", reward("contrast"), "--scale", "2"], 2, "the generator enlarges 4 times"),
        ("refl", ["--rewards", reward("contrast"), "--dataset", "nowhere"], 3, "nowhere"),
        ("refl", ["--rewards", reward("contrast"), "--generator", "nowhere"], 5, "nowhere"),
        ("ddpo", ["--rewards", reward("contrast"), "--sigma", "0"], 2, "deterministic policy"),
        ("finetune", ["--eval_steps", "2", "--save_steps", "3", *BEST], 2, "multiple of the evaluation steps"),
        ("finetune", ["--report_to", "comet_ml"], 2, "comet_ml is not installed"),
        ("finetune", ["--lora_target_modules", '["no_such_layer"]'], 2, "lora_target_modules"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(place, run, capsys, method, words, code, message):
    generator = [] if "--generator" in words else ["--generator", "generator"]
    assert run(method, "runs/refused", *generator, *words) == code
    shown = capsys.readouterr().err
    assert message in shown.partition("error: ")[2]
    assert not (place / "runs/refused/summary.json").exists()
    assert not (place / "runs/refused/generator").exists()


def test_lora_trains_attention_and_convolutions_unless_told_otherwise(place):
    from refreward_trl.generators import load_generator

    generator = load_generator(str(place / "generator"))
    arguments = build_arguments(GeneratorArguments, {"lora_r": 4, "seed": 1})
    config = build_lora(arguments, generator)
    assert config is not None and config.r == 4 and set(config.target_modules or ()) == set(LORA_TARGETS)
    assert build_lora(GeneratorArguments(use_peft=False), generator) is None
    generator.add_policy_adapter(config)
    assert build_lora(arguments, generator) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"WORLD_SIZE": "1"}, {}),
        ({"WORLD_SIZE": "2"}, {"ddp_backend": "gloo", "use_cpu": True}),
        ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}, {"ddp_backend": "gloo"}),
    ],
)
def test_several_cpu_processes_talk_over_gloo(environment, expected, monkeypatch):
    if torch.cuda.is_available():
        expected = {}
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch_settings() == expected


NETWORK_FILE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 48, 3, padding=1), nn.PixelShuffle(4))
"""


def own_generator(values: dict, folder: Path, monkeypatch) -> list[str]:
    """Returns the flags that put a generator of a few thousand parameters in the place of a recipe's own."""
    source, family = values.get("generator", "default"), values.get("generator_family")
    if family is not None:
        made = published_models.WRITERS[family](folder)
        return ["--generator", str(made.path), "--base_model", str(made.base)]
    if ":" in source:
        (folder / "my_network.py").write_text(NETWORK_FILE)
        monkeypatch.syspath_prepend(folder)
        return []
    return [] if source in ("default", "new") else ["--generator", "generator"]


def own_judge(values: dict, folder: Path) -> list[str]:
    """Returns the flags that put a tiny multimodal LLM and tiny preferences in the place of a recipe's own."""
    words = []
    if "preferences" in values:
        records = [preference(number, split) for number in range(4) for split in ("train", "val")]
        write_preferences(records, folder / "p")
        words = ["--preferences", str(folder / "p")]
    if values.get("judge", "new") in ("new", "conv", "default"):
        return words
    # 4-bit weights on a CPU need widths in multiples of 64.
    tokenizer = byte_tokenizer("qwen2_5_vl")
    network = family_network("qwen2_5_vl", tokenizer, width=64)
    RateJudge(network, tokenizer, family_spec("qwen2_5_vl")).save_pretrained(folder / "mllm")
    words += ["--judge", str(folder / "mllm"), "--judge_dtype", "float32", "--bf16", "false"]
    return [*words, "--gradient_checkpointing", "false"]


def preference(number: int, split: str) -> PreferenceRecord:
    generator = torch.Generator().manual_seed(number)
    lr_image = torch.randint(256, (3, 8, 8), generator=generator, dtype=torch.uint8)
    candidates = tuple(
        Candidate(ImageTensor(torch.randint(256, (3, 32, 32), generator=generator, dtype=torch.uint8)))
        for _ in range(4)
    )
    name = f"{split}{number}"
    return PreferenceRecord(
        name,
        name,
        ImageTensor(lr_image),
        candidates,
        ranks={"overall": (0, 1, 2, 3)},
        source="constructed",
        split=split,
    )


REASONING = {
    "per_device_train_batch_size": "8",
    "mates": "2",
    "max_groups": "8",
    "eval_groups": "1",
    "eval_samples": "1",
    "crop_size": "32",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipe_names() if read_recipe(name).method != "data build"])
def test_every_packaged_recipe_runs_two_steps(place, run, name, tmp_path, monkeypatch):
    recipe = read_recipe(name)
    words = [
        "--crop_size",
        "64",
        "--warmup_steps",
        "0",
        "--eval_steps",
        "1",
        "--save_steps",
        "1",
        "--logging_steps",
        "1",
    ]
    words += ["--save_strategy", "steps"] if recipe.values.get("load_best_model_at_end") else []
    words += own_generator(recipe.values, tmp_path, monkeypatch)
    words += own_judge(recipe.values, tmp_path)
    words += ["--rewards", own_rewards(recipe.values, tmp_path)] if recipe.values.get("rewards") else []
    if recipe.method in ("rm-sft", "rm-grpo"):  # TRL evaluates during training only with a dataset for it
        words += [word for key, value in REASONING.items() for word in (f"--{key}", value)]
        words += ["--num_generations", "2", "--max_completion_length", "4"] if recipe.method == "rm-grpo" else []
    elif recipe.values.get("quantization") != "4bit":  # which a CPU cannot train on after an evaluation
        words += ["--eval_strategy", "steps"]
    if recipe.method == "rm":
        words += ["--max_groups", "4", "--eval_groups", "1", "--test_pairs", "2"]
    if teachers := recipe.values.get("teachers"):
        words += ["--teachers", json.dumps(["teacher"] * len(teachers))]
    if recipe.method == "ddpo":
        words += ["--num_generations", "2"]
    output = f"runs/{name}"
    assert run(recipe.method, output, *words, recipe=name) == 0
    found = summary(place, output)
    assert found["method"] == recipe.method and found["steps"] == 2
