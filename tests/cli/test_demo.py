"""The whole demo with an untrained generator and untrained judges: every part is real, only small."""

from __future__ import annotations

import json
import subprocess
import sys
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch

from refreward_trl.cli.demo import DemoSettings, main, run_demo
from refreward_trl.data.images import write_png
from refreward_trl.errors import ConfigError, SetupError
from refreward_trl.generators.tiny import build_tiny_generator
from refreward_trl.resampling import upscale
from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.tiny import build_tiny_judge

JUDGE_KEYS = {
    "pairs",
    "accuracy",
    "accuracy_ci95",
    "accuracy_lr_shuffled",
    "projected_accuracy",
    "unseen_accuracy",
    "by_kind",
    "baselines",
    "projected_baselines",
}
RUN_KEYS = {
    "steps",
    "images",
    "reward_before",
    "reward_after",
    "gain",
    "control_gain",
    "gain_minus_control_ci95",
    "heldout_before",
    "heldout_after",
    "lr_psnr_before",
    "lr_psnr_after",
    "hr_psnr_before",
    "hr_psnr_after",
    "seconds",
}

RECIPE = """
method: {method}
output_dir: {root}/unused
generator: {root}/generator
lora_r: 2
lora_target_modules: [conv1, conv2]
dataset: {root}/photos
eval_dataset: {root}/photos
test_dataset: {root}/photos
degradation: bicubic
crop_size: 32
rewards:
  - name: refreward
    kwargs: {{source: {root}/judge}}
heldout_rewards:
  - name: heldout_judge
    kwargs: {{source: {root}/heldout}}
learning_rate: 1.0e-2
per_device_train_batch_size: 2
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> DemoSettings:
    root = tmp_path_factory.mktemp("demo")
    random = torch.Generator().manual_seed(0)
    for index in range(3):
        coarse = torch.rand((1, 3, 12, 14), generator=random)
        grain = 0.1 * torch.randn((1, 3, 48, 56), generator=random)
        write_png(root / "photos" / f"photo{index}.png", (upscale(coarse, 4) + grain).clamp(0, 1)[0])
    build_tiny_generator(vae_width=8, unet_channels=(8, 16)).save_pretrained(root / "generator")
    spec = JudgeSpec(tile=32)
    build_tiny_judge(vision_dim=16, vision_depth=1, vision_heads=1, text_dim=32, text_layers=1, text_heads=1, spec=spec
    ).save_pretrained(root / "judge")  # fmt: skip
    ConvJudge(widths=(8, 8), hidden=8).save_pretrained(root / "heldout")
    for method in ("refl", "ddpo"):
        (root / f"{method}.yaml").write_text(RECIPE.format(method=method, root=root))
    return DemoSettings(
        output_dir=root / "out",
        pairs=4,
        photos=2,
        steps_refl=2,
        steps_ddpo=2,
        steps_hacking=2,
        refl_recipe=str(root / "refl.yaml"),
        ddpo_recipe=str(root / "ddpo.yaml"),
        crop_size=32,
        evaluations=2,
        eval_photos=1,
    )


@pytest.fixture(scope="module")
def summary(settings: DemoSettings) -> dict[str, Any]:
    return run_demo(settings)


def test_summary_has_all_keys_and_is_what_the_file_says(settings: DemoSettings, summary: dict[str, Any]) -> None:
    written = json.loads((settings.output_dir / "summary.json").read_text())
    assert set(written) == {"judge", "generator", "bicubic", "refl", "ddpo", "seconds", "seed", "versions"}
    assert set(written["judge"]) == JUDGE_KEYS
    assert set(written["generator"]) == {"hr_psnr", "gradient_energy", "vae_ceiling_psnr"}
    assert {"hr_psnr", "gradient_energy"} <= set(written["bicubic"])
    for method in ("refl", "ddpo"):
        assert set(written[method]) == RUN_KEYS
        assert written[method]["steps"] == 2
        assert written[method]["images"] == 4
        assert written[method]["gain"] == pytest.approx(
            written[method]["reward_after"] - written[method]["reward_before"], abs=1e-6
        )
        assert written[method] == json.loads(json.dumps(summary[method]))
    assert written["judge"]["pairs"] == 4 * 10
    assert set(written["judge"]["baselines"]) == set(written["judge"]["projected_baselines"])
    assert {"torch", "transformers"} <= set(written["versions"])
    assert written["seconds"] > written["refl"]["seconds"] > 0


def test_runs_and_controls_differ_and_start_alike(settings: DemoSettings, summary: dict[str, Any]) -> None:
    runs = json.loads((settings.output_dir / "figures.json").read_text())["runs"]
    assert list(runs) == ["generator", "ReFL", "ReFL, control", "DDPO", "DDPO, control", "ReFL, no anchor"]
    rewards = {name: [photo["reward/refreward"] for photo in run["photos"]] for name, run in runs.items()}
    assert len({tuple(values) for values in rewards.values()}) >= 5
    # The control starts on its own anchor: with no reward to climb it stays.
    assert rewards["ReFL, control"] == pytest.approx(rewards["generator"], abs=1e-3)
    assert summary["refl"]["reward_before"] == summary["ddpo"]["reward_before"]
    assert "--reward_weight 0" in runs["ReFL, control"]["command"]
    assert "--shuffle_advantages true" in runs["DDPO, control"]["command"]
    assert all(isfinite(value) for values in rewards.values() for value in values)


def test_report_shows_every_run_and_holds_its_pictures(settings: DemoSettings, summary: dict[str, Any]) -> None:
    text = (settings.output_dir / "report.html").read_text()
    for phrase in (
        "ReFL, control",
        "DDPO, control",
        "ReFL, no anchor",
        "VAE ceiling",
        "What reward hacking looks like",
    ):
        assert phrase in text
    assert text.count("data:image/webp;base64,") >= 12
    assert "reward and guards" in text
    assert "Nobody was asked" in text


def test_aligned_generators_are_kept(settings: DemoSettings, summary: dict[str, Any]) -> None:
    from refreward_trl.generators import load_generator

    for folder in ("refl", "ddpo"):
        assert load_generator(settings.output_dir / folder / "generator").has_policy_adapter
        assert (settings.output_dir / folder / "metrics.jsonl").stat().st_size > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "1"], "--pairs is 1"),
        (["--steps-refl", "0"], "--steps-refl is 0"),
        (["--step-refl", "3"], "did you mean '--steps-refl'"),
        (["--pairs", "many"], "many"),
    ],
)
def test_mistakes_are_named_before_anything_runs(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        main(["--output-dir", str(tmp_path / "out"), *words])
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="file"):
        main(["--output-dir", str(tmp_path / "file" / "out")])


def test_help_loads_no_torch() -> None:
    program = (
        "import sys\nfrom refreward_trl.cli import demo, demo_runs\n"
        "try:\n    demo.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "refreward demo --output-dir runs/demo" in done.stdout
