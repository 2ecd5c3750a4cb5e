"""What only published generators need of trainers: prompts of photos, and no bfloat16 where it spoils the latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import published_models
import pytest
import torch
from peft import LoraConfig

from refreward_trl.cli import app
from refreward_trl.data.images import to_uint8, write_png
from refreward_trl.errors import ConfigError
from refreward_trl.generators.published import load_published
from refreward_trl.trainers.ddpo_config import SRDDPOConfig
from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer


def rows() -> list[dict[str, Any]]:
    source = torch.Generator().manual_seed(0)
    return [
        {
            "sample_id": name,
            "prompt": prompt,
            "lr_image": to_uint8(torch.rand(3, 8, 8, generator=source)),
            "hr_image": to_uint8(torch.rand(3, 32, 32, generator=source)),
        }
        for name, prompt in (("a", "cat"), ("b", "dog"))
    ]


@pytest.mark.parametrize("method", ["refl", "ddpo"])
def test_the_prompt_of_each_photo_conditions_its_images(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = published_models.write_osediff(tmp_path)
    generator = load_published(made.path, base_model=str(made.base))
    seen: list[tuple[str, ...] | None] = []
    prepare = type(generator).prepare

    def watched(self: Any, lr_image: Any, prompts: Any = None) -> Any:
        seen.append(None if prompts is None else tuple(prompts))
        return prepare(self, lr_image, prompts)

    monkeypatch.setattr(type(generator), "prepare", watched)
    common: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "disable_tqdm": True,
    }
    trainer_class: Any = SRReFLTrainer if method == "refl" else SRDDPOTrainer
    config: Any = SRReFLConfig(**common) if method == "refl" else SRDDPOConfig(**common, num_generations=2)
    trainer = trainer_class(
        generator,
        reward_funcs="psnr",
        args=config,
        train_dataset=rows(),
        eval_dataset=rows(),
        peft_config=LoraConfig(r=2, target_modules=["to_k", "to_v"]),
    )
    trainer.train()
    assert set(seen) <= {("cat", "dog"), ("dog", "cat"), ("cat",), ("dog",)} and len(set(seen)) >= 3


def test_bfloat16_is_refused_before_anything_starts(tmp_path: Path) -> None:
    made = published_models.write_osediff(tmp_path)
    generator = load_published(made.path, base_model=str(made.base))
    with pytest.raises(ConfigError, match=r"14\.6"):
        SRReFLTrainer(
            generator,
            reward_funcs="psnr",
            args=SRReFLConfig(output_dir=str(tmp_path / "run"), bf16=True, use_cpu=True),
            train_dataset=rows(),
        )
    assert not (tmp_path / "run").exists()


def test_prompts_for_a_generator_that_reads_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_png(tmp_path / "photos" / "a.png", to_uint8(torch.rand(3, 64, 64)))
    (tmp_path / "photos" / "a.txt").write_text("cat")
    monkeypatch.chdir(tmp_path)
    words = ["--dataset", "photos", "--eval_dataset", "photos", "--output_dir", "run", "--prompts", "sidecar"]
    assert app.main(["refl", "--config", "tiny/refl", *words]) == 2
    assert "the generator reads no prompts" in capsys.readouterr().err
