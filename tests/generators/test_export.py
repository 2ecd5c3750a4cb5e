from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import published_models as fixtures
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from refreward_trl.cli import app
from refreward_trl.errors import ConfigError
from refreward_trl.generators import load_generator
from refreward_trl.generators.export import export_generator
from refreward_trl.generators.latent import LatentGenerator
from refreward_trl.generators.module import ModuleGenerator
from refreward_trl.generators.published import load_published


@pytest.fixture
def aligned(tmp_path: Path, train_policy: Callable[[list[nn.Parameter]], None]) -> tuple[fixtures.Published, Path]:
    """A published checkpoint and the folder of what training made of it."""
    made = fixtures.write_osediff(tmp_path)
    generator = load_published(made.path, base_model=str(made.base))
    generator.add_policy_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    train_policy(generator.trainable_parameters())
    generator.save_pretrained(tmp_path / "aligned")
    return made, tmp_path / "aligned"


def test_the_command_writes_every_format(
    aligned: tuple[fixtures.Published, Path], tmp_path: Path, lr_image: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    made, folder = aligned
    expected = load_generator(folder).generate(lr_image)
    pickle, merged, lora = tmp_path / "new" / "osediff.pkl", tmp_path / "merged", tmp_path / "lora"
    for target, name in ((pickle, "published"), (merged, "diffusers"), (lora, "lora")):
        assert app.main(["export", str(folder), str(target), "--format", name]) == 0
        assert f"wrote {target}" in capsys.readouterr().out
        assert app.main(["export", str(folder), str(target), "--format", name]) == 2, "never overwrites"
    capsys.readouterr()
    again = load_published(pickle, base_model=str(made.base))
    torch.testing.assert_close(again.generate(lr_image), expected, rtol=0, atol=1e-5)

    reopened = load_generator(merged)
    assert not reopened.has_policy_adapter
    torch.testing.assert_close(reopened.generate(lr_image), expected, rtol=0, atol=1e-5)

    # Stock diffusers alone: the merged U-Net equals the base's under the adapter.
    generator = load_generator(folder)
    assert isinstance(generator, LatentGenerator)
    plain = UNet2DConditionModel.from_pretrained(folder / "unet")
    plain.load_lora_adapter(lora, prefix=None, use_safetensors=True)
    z, prompt = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 16)
    with torch.no_grad():
        stock = UNet2DConditionModel.from_pretrained(merged / "unet")(z, 999, encoder_hidden_states=prompt).sample
        torch.testing.assert_close(plain(z, 999, encoder_hidden_states=prompt).sample, stock, rtol=1e-4, atol=1e-5)


def test_a_merged_generator_does_not_go_back_into_a_low_rank_format(
    aligned: tuple[fixtures.Published, Path], tmp_path: Path
) -> None:
    generator = load_generator(aligned[1])
    export_generator(generator, tmp_path / "merged", "diffusers")
    with pytest.raises(ConfigError, match="the policy was merged"):
        export_generator(load_generator(tmp_path / "merged"), tmp_path / "x.pkl", "published")
    with pytest.raises(ConfigError, match="no trained adapter"):
        export_generator(load_generator(tmp_path / "merged"), tmp_path / "x", "lora")


def test_what_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no format of others"):
        export_generator(ModuleGenerator(nn.Conv2d(3, 3, 1)), tmp_path / "x", "diffusers")
    with pytest.raises(ConfigError, match="unknown format 'onnx'"):
        export_generator(load_generator("default"), tmp_path / "x", "onnx")
    with pytest.raises(ConfigError, match="not made of a published"):
        export_generator(load_generator("default"), tmp_path / "x.pkl", "published")
    assert not list(tmp_path.iterdir())
