from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError, ConfigError, SetupError
from refreward_trl.generators import load_generator
from refreward_trl.generators.module import ModuleGenerator

TrainPolicy = Callable[[list[nn.Parameter]], None]

USER_NETWORK = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))

network = build()
number = 3

def declared():
    from refreward_trl import ModuleGenerator
    return ModuleGenerator(build(), 2, policy_space="pixel")
"""


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2))


def test_generates_what_the_network_does_clamped(lr_image: Tensor) -> None:
    module = network()
    assert torch.equal(ModuleGenerator(module, 2).generate(lr_image), module(lr_image).clamp(0, 1))


def test_gradient_reaches_the_network_unclamped(lr_image: Tensor) -> None:
    generator = ModuleGenerator(network(), 2)
    cond = generator.prepare(lr_image)
    image = generator.decode(generator.predict(generator.encode(cond), cond), cond, checkpoint=True)
    assert image.min() < 0
    generator.postprocess(image, cond).sum().backward()
    assert all(parameter.grad is not None for parameter in generator.trainable_parameters())


def test_a_policy_around_it_is_refused(lr_image: Tensor) -> None:
    generator = ModuleGenerator(network(), 2)
    with pytest.raises(ConfigError, match="does not say where its policy lies"):
        generator.policy(generator.generate(lr_image), sigma=0.1)


class Latent(nn.Module):
    """Half of a network: returns features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, lr_image: Tensor) -> Tensor:
        return self.conv(lr_image)


def test_a_declared_policy_lies_on_the_pixels_or_on_the_latent(lr_image: Tensor) -> None:
    pixel = ModuleGenerator(network(), 2, policy_space="pixel")
    latent = ModuleGenerator(Latent(), 2, policy_space="latent", decoder=nn.PixelShuffle(2))
    for generator, shape in ((pixel, (2, 3, 16, 16)), (latent, (2, 12, 8, 8))):
        cond = generator.prepare(lr_image)
        z = generator.encode(cond)
        mean = generator.predict(z, cond)
        assert mean.shape == shape
        direction = generator.correction(mean, z, cond)
        policy = generator.policy(mean, sigma=0.1, noise="residual", cell=4, direction=direction)
        sample = policy.sample([torch.Generator().manual_seed(i) for i in range(4)])
        assert generator.decode(sample, cond.repeat(2)).shape == (4, 3, 16, 16)
        policy.log_prob(sample).sum().backward()
        assert all(parameter.grad is not None for parameter in generator.trainable_parameters())
    cond = pixel.prepare(lr_image)
    mean = pixel.predict(lr_image, cond)
    assert torch.equal(pixel.correction(mean, lr_image, cond), mean - cond.upsampled)


def test_contradictory_declarations_are_refused() -> None:
    with pytest.raises(ConfigError, match="no decoder"):
        ModuleGenerator(Latent(), 2, policy_space="latent")
    with pytest.raises(ConfigError, match="a decoder"):
        ModuleGenerator(network(), 2, policy_space="pixel", decoder=nn.Identity())
    with pytest.raises(ConfigError, match="unknown policy_space 'pixels'"):
        ModuleGenerator(network(), 2, policy_space="pixels")


def test_a_frozen_decoder_is_neither_trained_nor_part_of_the_denoiser() -> None:
    decoder = nn.Conv2d(12, 12, 1)
    generator = ModuleGenerator(Latent(), 2, policy_space="latent", decoder=nn.Sequential(decoder, nn.PixelShuffle(2)))
    assert not decoder.weight.requires_grad
    assert all(parameter is not decoder.weight for parameter in generator.trainable_parameters())


def test_spandrel_is_asked_for_by_name_and_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(SetupError, match="pip install spandrel"):
        load_generator("spandrel:RealESRGAN_x4plus.pth")


def test_a_network_of_another_scale_is_refused(lr_image: Tensor) -> None:
    with pytest.raises(ConfigError, match="enlarge 4 times"):
        ModuleGenerator(network(), 4).generate(lr_image)


def test_saved_weights_load_into_the_users_network(tmp_path: Path, lr_image: Tensor) -> None:
    generator = ModuleGenerator(network(), 2)
    generator.save_pretrained(tmp_path)
    loaded = ModuleGenerator.from_pretrained(tmp_path, module=network(1))
    assert loaded.scale == 2
    assert torch.equal(loaded.generate(lr_image), generator.generate(lr_image))


def test_saved_lora_policy_loads_here_and_in_stock_peft(
    tmp_path: Path, lr_image: Tensor, train_policy: TrainPolicy
) -> None:
    generator = ModuleGenerator(network(), 2)
    base = generator.generate(lr_image)
    generator.add_policy_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["0"]))
    train_policy(generator.trainable_parameters())
    image = generator.generate(lr_image)
    assert not torch.equal(image, base)
    generator.save_pretrained(tmp_path)
    loaded = ModuleGenerator.from_pretrained(tmp_path, module=network(1))
    assert torch.equal(loaded.generate(lr_image), image)
    assert len(loaded.trainable_parameters()) == 2
    with loaded.reference():
        assert torch.equal(loaded.generate(lr_image), base)
    stock = PeftModel.from_pretrained(network(), tmp_path / "policy").eval()
    assert torch.equal(stock(lr_image).clamp(0, 1), image)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    ModuleGenerator(network(), 2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="do not fit the Conv2d"):
        ModuleGenerator.from_pretrained(tmp_path, module=nn.Conv2d(3, 3, 1))


def test_loads_a_network_by_name_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lr_image: Tensor
) -> None:
    (tmp_path / "my_networks.py").write_text(USER_NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    generator = load_generator("my_networks:network", scale=2)
    assert generator.generate(lr_image).shape == F.interpolate(lr_image, scale_factor=2).shape
    generator.save_pretrained(tmp_path / "saved")
    loaded = load_generator("my_networks:build", weights=tmp_path / "saved", color_fix=None)
    assert torch.equal(loaded.generate(lr_image), generator.generate(lr_image))
    with pytest.raises(ConfigError, match=r"package\.module:attribute"):
        load_generator(tmp_path / "saved")
    declared = load_generator("my_networks:declared", weights=tmp_path / "saved")
    assert isinstance(declared, ModuleGenerator) and declared.policy_space == "pixel"
    assert torch.equal(declared.generate(lr_image), generator.generate(lr_image))
    with pytest.raises(ConfigError, match="enlarges 2 times, not 4"):
        load_generator("my_networks:declared", scale=4)
    for name, message in (("my_networks:number", "int"), ("my_networks:gone", "gone"), ("not_there:x", "not_there")):
        with pytest.raises(ConfigError, match=message):
            load_generator(name)
