from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from refreward_trl.cli import app, doctor
from refreward_trl.cli.building import LORA_TARGETS
from refreward_trl.data.images import write_png
from refreward_trl.generators import load_generator
from refreward_trl.generators.tiny import build_tiny_generator


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """A run whose largest image is 64 pixels, with a reward that has no network."""
    write_png(tmp_path / "photos" / "one.png", torch.zeros(3, 64, 64, dtype=torch.uint8))
    photos = [
        word
        for name in ("dataset", "eval_dataset", "test_dataset")
        for word in (f"--{name}", str(tmp_path / "photos"))
    ]
    return [*photos, "--crop_size", "64", "--per_device_train_batch_size", "2"]


@pytest.fixture
def plain(small: list[str]) -> list[str]:
    return ["--rewards", '[{"name": "lr_consistency"}]', "--heldout_rewards", "[]", *small]


@pytest.fixture
def generator_folder(tmp_path: Path) -> Path:
    build_tiny_generator(vae_width=8, unet_channels=(8, 16)).save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


def ask(capsys, *words: str) -> tuple[int, dict]:
    code = app.main(["doctor", "--json", "--quick", *words])
    return code, json.loads(capsys.readouterr().out)


def test_it_counts_the_weights_and_the_checkpoint_of_the_real_network(capsys, tmp_path, small):
    _, report = ask(capsys, "--config", "tiny/refl", *small, "--output_dir", str(tmp_path))
    from peft import LoraConfig

    generator = load_generator("default")
    generator.add_policy_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=list(LORA_TARGETS)))
    trained = sum(parameter.numel() for parameter in generator.trainable_parameters())
    assert report["trained_weights"] == trained
    assert report["parts"]["optimizer"] == 8 * trained
    assert report["checkpoint_bytes"] == pytest.approx(3 * 4 * trained, rel=0.05)
    weights = sum(p.numel() for network in (generator.denoiser, generator.vae) for p in network.parameters())
    assert report["generator_bytes"] == pytest.approx(4 * weights, rel=0.01)
    assert report["step_seconds"] > 0


def test_more_images_take_more_and_all_of_the_peak_is_named(capsys, plain):
    peaks = []
    for batch in ("16", "32"):
        words = [*plain, "--per_device_train_batch_size", batch, "--device", "cuda"]
        _, report = ask(capsys, "--config", "tiny/refl", *words)
        assert report["phases"]["update"] > 100e6
        assert sum(report["parts"].values()) == report["peak_bytes"]
        peaks.append(report["phases"]["update"])
    assert 1.8 < peaks[1] / peaks[0] < 2.05


def test_too_little_memory_ends_with_6_and_says_what_would_help(capsys, generator_folder, plain):
    words = [
        "--config",
        "tiny/refl",
        "--generator",
        str(generator_folder),
        *plain,
        "--per_device_train_batch_size",
        "8",
    ]
    assert app.main(["doctor", *words, "--device", "cuda", "--memory", "1MB"]) == doctor.DOES_NOT_FIT
    text = capsys.readouterr().out
    assert "does NOT fit into 1 MB (what you gave)" in text
    assert "per_device_train_batch_size: 4, gradient_accumulation_steps: 2" in text
    assert "activation_checkpointing: true" in text


def test_enough_memory_ends_with_0(capsys, generator_folder, plain):
    code, report = ask(
        capsys, "--config", "tiny/refl", "--generator", str(generator_folder), *plain, "--memory", "9GB"
    )
    assert code == 0 and report["fits"] and report["room_bytes"] == 9_000_000_000


def test_zero_divides_what_it_divides(capsys, generator_folder, small):
    words = ["--config", "tiny/finetune", "--generator", str(generator_folder), *small, "--device", "cuda"]
    parts = {}
    for stage in ("0", "1", "3"):
        _, report = ask(capsys, *words, "--processes", "4", "--zero", stage)
        parts[stage] = report["parts"]
    assert parts["1"]["optimizer"] == parts["0"]["optimizer"] // 4
    assert parts["1"]["trained weights"] == parts["0"]["trained weights"]
    assert parts["3"]["trained weights"] == parts["0"]["trained weights"] // 4


@pytest.mark.parametrize("family", ["osediff", "tsd_sr"])
def test_a_published_checkpoint_needs_only_the_configurations_of_its_base(capsys, tmp_path, family, plain):
    from published_models import write_sd3_base, write_sd21_base

    base = (write_sd3_base if family == "tsd_sr" else write_sd21_base)(tmp_path / "base")
    for path in base.rglob("*.safetensors"):
        path.unlink()
    words = ["--generator", f"{family}.pkl", "--generator_family", family, "--base_model", str(base)]
    targets = '["to_q", "to_k"]'
    code, report = ask(capsys, "--config", "tiny/refl", *words, "--lora_target_modules", targets, *plain)
    assert code == 0 and report["trained_weights"] > 0


def test_a_saved_policy_is_there_again(capsys, tmp_path, plain):
    from peft import LoraConfig

    generator = build_tiny_generator(vae_width=8, unet_channels=(8, 16))
    generator.add_policy_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=["conv1", "to_q"]))
    generator.save_pretrained(tmp_path / "aligned")
    trained = sum(parameter.numel() for parameter in generator.trainable_parameters())
    _, report = ask(capsys, "--config", "tiny/refl", "--generator", str(tmp_path / "aligned"), *plain)
    assert report["trained_weights"] == trained


def test_a_reward_of_the_user_is_named_as_not_counted(capsys, generator_folder, tmp_path, monkeypatch, small):
    (tmp_path / "mine_doctor.py").write_text("def own(*, completions, **columns):\n    raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewards = '[{"name": "mine_doctor.own"}]'
    words = [
        "--config",
        "tiny/refl",
        "--generator",
        str(generator_folder),
        "--rewards",
        rewards,
        "--heldout_rewards",
        "[]",
        *small,
    ]
    _, report = ask(capsys, *words)
    assert any("'own': what it takes is not counted" in remark for remark in report["remarks"])


def test_a_judge_is_counted_wherever_it_lies(capsys, generator_folder, tmp_path, small):
    from peft import LoraConfig, get_peft_model
    from tiny_judges import family_judge

    judge = family_judge("qwen3_vl")
    weights = sum(parameter.numel() for parameter in judge.model.parameters())
    judge.save_pretrained(tmp_path / "whole")
    judge.model.save_pretrained(tmp_path / "base")  # as stock transformers do: without a spec
    judge.tokenizer.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(judge.model, LoraConfig(target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "judge_spec.json").write_text(judge.spec.to_json())
    words = ["--config", "tiny/refl", "--generator", str(generator_folder), "--heldout_rewards", "[]", *small]
    counted = {}
    capsys.readouterr()  # a library prints while it saves
    for name in ("whole", "adapter"):
        for file in (tmp_path / name).glob("model*.safetensors"):
            file.unlink()
        rewards = [{"name": "refreward", "kwargs": {"source": str(tmp_path / name), "dtype": "bfloat16"}}]
        code, report = ask(capsys, *words, "--rewards", json.dumps(rewards))
        assert code == 0 and not report["remarks"]
        counted[name] = report["parts"]["judges"]
    assert counted["whole"] == counted["adapter"] == pytest.approx(2 * weights, rel=0.01)


def test_of_a_judge_that_shapes_do_not_describe_the_weights_are_counted(capsys, generator_folder, tmp_path, small):
    from tiny_judges import family_judge

    judge = family_judge("smolvlm")
    judge.save_pretrained(tmp_path / "judge")
    rewards = [{"name": "refreward", "kwargs": {"source": str(tmp_path / "judge")}}]
    words = ["--config", "tiny/refl", "--generator", str(generator_folder), "--heldout_rewards", "[]", *small]
    capsys.readouterr()
    code, report = ask(capsys, *words, "--rewards", json.dumps(rewards))
    weights = sum(parameter.numel() for parameter in judge.model.parameters())
    assert code == 0 and report["parts"]["judges"] == pytest.approx(4 * weights, rel=0.01)
    assert any("shapes do not tell what a smolvlm computes" in remark for remark in report["remarks"])


def test_quantized_weights_are_said_to_be_counted_whole(capsys, generator_folder, small):
    rewards = json.dumps([{"name": "refreward", "kwargs": {"quantization": "4bit"}}])
    words = ["--config", "tiny/refl", "--generator", str(generator_folder), "--heldout_rewards", "[]", *small]
    code, report = ask(capsys, *words, "--rewards", rewards)
    assert code == 0 and any("not quantized to 4bit" in remark for remark in report["remarks"])


@pytest.mark.parametrize(
    ("kwargs", "offered"),
    [({}, ["true", "blocks"]), ({"checkpoint": True}, ["blocks"]), ({"checkpoint": "blocks"}, [])],
)
def test_what_a_judge_has_not_used_yet_is_offered(kwargs, offered):
    from refreward_trl.cli.doctor_plan import knobs
    from refreward_trl.cli.recipe import Recipe
    from refreward_trl.trainers.memory_estimate import Sharding

    rewards = ["psnr", {"name": "refreward", "weight": 2.0, "kwargs": {"batch_size": 1, **kwargs}}]
    recipe = Recipe("refl", "a recipe", {"rewards": rewards})
    found = [knob for knob in knobs(recipe, Sharding(), cpu=True) if "rewards" in knob.values]
    assert [knob.text.partition("checkpoint: ")[2] for knob in found] == [f"{name}}}" for name in offered]
    for knob in found:
        first, second = knob.values["rewards"]
        assert first == {"name": "psnr"} and second["weight"] == 2.0 and second["kwargs"]["batch_size"] == 1
    assert rewards[1]["kwargs"] == {"batch_size": 1, **kwargs}, "the recipe itself is left alone"


def test_a_missing_judge_is_named(capsys, generator_folder, small):
    rewards = json.dumps([{"name": "refreward", "kwargs": {"source": "runs/not/here"}}])
    words = ["--config", "tiny/refl", "--generator", str(generator_folder), *small, "--rewards", rewards]
    assert app.main(["doctor", *words]) == 5
    assert "no judge at 'runs/not/here'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("1.5 gib", 3 * 2**29), ("800", 800), ("16G", 16 * 10**9)]
)
def test_sizes(text, size):
    assert doctor.read_size(text) == size


@pytest.mark.parametrize("words", [["--memory", "much"], ["--memory", "0GB"], ["--processes", "0"]])
def test_mistakes_are_named(words, capsys):
    assert app.main(["doctor", "--config", "tiny/refl", *words]) == 2
    assert words[0] in capsys.readouterr().err


def test_a_reward_model_cannot_be_rehearsed(capsys):
    assert app.main(["doctor", "--config", "tiny/teacher_rm"]) == 2
    assert "cannot be rehearsed" in capsys.readouterr().err


def test_nothing_is_written(capsys, generator_folder, tmp_path, plain):
    target = tmp_path / "run"
    ask(capsys, "--config", "tiny/ddpo", "--generator", str(generator_folder), *plain, "--output_dir", str(target))
    assert not target.exists()


def test_networks_are_shapes_alone(generator_folder):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    from refreward_trl.cli.weightless import generator_without_content
    from refreward_trl.trainers.arguments import GeneratorArguments

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    generator = generator_without_content(GeneratorArguments(str(generator_folder)), scale=4, mode=mode)
    assert all(isinstance(parameter.data, FakeTensor) for parameter in generator.denoiser.parameters())
    real = load_generator(generator_folder)
    shapes = [tuple(parameter.shape) for parameter in real.denoiser.parameters()]
    assert [tuple(parameter.shape) for parameter in generator.denoiser.parameters()] == shapes
    assert torch.get_default_device().type == "cpu"


def test_images_that_are_elsewhere_leave_the_update_predicted(capsys, generator_folder, plain):
    words = ["--config", "tiny/refl", "--generator", str(generator_folder), *plain, "--dataset", "not/here"]
    code, report = ask(capsys, *words)
    assert code == 0 and set(report["phases"]) == {"update"}
    assert any("not/here" in remark or "looked at" in remark for remark in report["remarks"])


def test_recomputing_spares_what_it_should(capsys, generator_folder, plain):
    words = ["--config", "tiny/refl", "--generator", str(generator_folder), *plain, "--device", "cuda"]
    words += ["--per_device_train_batch_size", "16"]
    sizes = {}
    for checkpointing in ("false", "true"):
        flags = ["--checkpoint_decode", checkpointing, "--activation_checkpointing", checkpointing]
        sizes[checkpointing] = ask(capsys, *words, *flags)[1]["phases"]["update"]
    assert sizes["true"] < 0.85 * sizes["false"]
