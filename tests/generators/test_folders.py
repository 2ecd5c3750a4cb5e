from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError, ConfigError
from refreward_trl.generators import load_generator
from refreward_trl.generators.epsilon import EpsLatentGenerator
from refreward_trl.generators.tiny import build_tiny_generator
from refreward_trl.resampling import upscale

TrainPolicy = Callable[[list[nn.Parameter]], None]


@pytest.fixture
def aligned(generator: EpsLatentGenerator, lora_config: LoraConfig, train_policy: TrainPolicy) -> EpsLatentGenerator:
    generator.add_policy_adapter(lora_config)
    train_policy(generator.trainable_parameters())
    return generator


def weights_of(generator: EpsLatentGenerator) -> dict[str, Tensor]:
    return {**generator.denoiser.state_dict(), **{f"vae.{k}": v for k, v in generator.vae.state_dict().items()}}


def same_weights(first: EpsLatentGenerator, second: EpsLatentGenerator) -> bool:
    one, two = weights_of(first), weights_of(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("which", ["generator", "kl_generator", "aligned"])
def test_saving_and_loading_is_bit_exact(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, lr_image: Tensor
) -> None:
    generator: EpsLatentGenerator = request.getfixturevalue(which)
    generator.save_pretrained(tmp_path / "a")
    loaded = load_generator(str(tmp_path / "a"))
    assert isinstance(loaded, EpsLatentGenerator)
    assert loaded.config == generator.config
    assert same_weights(loaded, generator)
    assert torch.equal(loaded.generate(lr_image), generator.generate(lr_image))
    assert len(loaded.trainable_parameters()) == len(generator.trainable_parameters())
    loaded.save_pretrained(tmp_path / "b")
    assert same_weights(load_generator(tmp_path / "b"), generator)
    first, second = files(tmp_path / "a"), files(tmp_path / "b")
    assert first.keys() == second.keys()
    # The adapter's file has two metadata entries, which safetensors writes in random order.
    assert {n for n in first if first[n] != second[n]} <= {"policy/pytorch_lora_weights.safetensors"}
    assert str(tmp_path).encode() not in b"".join(second.values())


def test_a_loaded_policy_can_be_trained_on_and_switched_off(
    aligned: EpsLatentGenerator, tmp_path: Path, lr_image: Tensor
) -> None:
    aligned.save_pretrained(tmp_path)
    loaded = load_generator(tmp_path)
    with aligned.reference(), loaded.reference():
        assert torch.equal(loaded.generate(lr_image), aligned.generate(lr_image))
    assert not torch.equal(aligned.generate(lr_image), load_generator(tmp_path, t_net=3).generate(lr_image))


def test_a_policy_saved_for_inference_trains_again_after_loading(
    generator: EpsLatentGenerator, tmp_path: Path, lora_config: LoraConfig
) -> None:
    lora_config.inference_mode = True
    generator.add_policy_adapter(lora_config)
    generator.save_pretrained(tmp_path)
    assert len(load_generator(tmp_path).trainable_parameters()) == len(generator.trainable_parameters()) > 0


def test_the_folder_opens_with_stock_calls_alone(
    aligned: EpsLatentGenerator, tmp_path: Path, lr_image: Tensor
) -> None:
    aligned.save_pretrained(tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    unet.load_lora_adapter(tmp_path / "policy", prefix=None, use_safetensors=True)
    vae = AutoencoderTiny.from_pretrained(tmp_path / "vae")
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "scheduler")
    numbers = json.loads((tmp_path / "generator_config.json").read_text())
    prompt = load_file(tmp_path / "prompt_embeds.safetensors")["prompt_embeds"]
    assert numbers["format_version"] == 1

    with torch.no_grad():
        raw = vae.encode(upscale(lr_image, numbers["scale"]) * 2 - 1).latents
        z = (raw - numbers["latent_shift"]) * numbers["latent_scale"]
        alpha_bar = scheduler.alphas_cumprod[numbers["t_coeff"]]
        z_in = alpha_bar.sqrt() * z
        eps = unet(z_in, numbers["t_net"], encoder_hidden_states=prompt.expand(len(z), -1, -1)).sample
        x0 = (z_in - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        image = vae.decode(x0 / numbers["latent_scale"] + numbers["latent_shift"]).sample / 2 + 0.5
    torch.testing.assert_close(image.clamp(0, 1), aligned.generate(lr_image), rtol=1e-5, atol=1e-5)
    with aligned.reference():
        assert not torch.allclose(image.clamp(0, 1), aligned.generate(lr_image), atol=1e-3)


def test_kl_vae_opens_with_stock_calls(kl_generator: EpsLatentGenerator, tmp_path: Path) -> None:
    kl_generator.save_pretrained(tmp_path)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    stock = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert torch.equal(stock.encode(image).latent_dist.mode(), kl_generator.vae.encode(image).latent_dist.mode())


def test_given_weights_are_saved_instead_of_the_denoisers(
    aligned: EpsLatentGenerator, tmp_path: Path, train_policy: TrainPolicy, lr_image: Tensor
) -> None:
    before = {name: weight.clone() for name, weight in aligned.denoiser.state_dict().items()}
    expected = aligned.generate(lr_image)
    train_policy(aligned.trainable_parameters())
    aligned.save_pretrained(tmp_path / "whole", state_dict=before)
    aligned.save_pretrained(
        tmp_path / "adapter", state_dict={name: weight for name, weight in before.items() if ".lora_" in name}
    )
    assert not torch.equal(aligned.generate(lr_image), expected)
    for folder in ("whole", "adapter"):
        assert torch.equal(load_generator(tmp_path / folder).generate(lr_image), expected)


def test_given_weights_of_another_network_are_refused(generator: EpsLatentGenerator, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"module\.conv_in") as error:
        generator.save_pretrained(tmp_path, state_dict={"module.conv_in.weight": torch.zeros(1)})
    assert error.value.where == "state_dict"


def test_saving_does_not_disturb_the_generator(aligned: EpsLatentGenerator, tmp_path: Path, lr_image: Tensor) -> None:
    image, trainable = aligned.generate(lr_image), aligned.trainable_parameters()
    aligned.denoiser.train()
    aligned.save_pretrained(tmp_path)
    assert torch.equal(aligned.generate(lr_image), image)
    assert all(one is two for one, two in zip(trainable, aligned.trainable_parameters(), strict=True))
    assert aligned.denoiser.training


def test_a_merged_policy_leaves_no_old_adapter_in_the_folder(
    aligned: EpsLatentGenerator, tmp_path: Path, lr_image: Tensor
) -> None:
    aligned.save_pretrained(tmp_path)
    aligned.merge_policy()
    aligned.save_pretrained(tmp_path)
    assert torch.equal(load_generator(tmp_path).generate(lr_image), aligned.generate(lr_image))


def test_overrides_replace_saved_settings_and_none_keeps_them(generator: EpsLatentGenerator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    assert load_generator(tmp_path, color_fix="adain", scale=None).config.color_fix == "adain"
    with pytest.raises(ConfigError, match="did you mean color_fix"):
        load_generator(tmp_path, colour_fix="adain")
    with pytest.raises(ConfigError, match="color_fix"):
        load_generator(tmp_path, color_fix="sepia")


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = build_tiny_generator(vae_width=8, unet_channels=(8, 16))
    generator.add_policy_adapter(LoraConfig(r=2, target_modules=["conv_in", "to_q"]))
    folder = tmp_path_factory.mktemp("generator")
    generator.save_pretrained(folder)
    return folder


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def edit_json(name: str, **values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return edit


def edit_weights(name: str, change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        weights = load_file(folder / name)
        change(weights)
        save_file(weights, folder / name)

    return edit


UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
POLICY = "policy/pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("damage", "where", "message"),
    [
        (remove("generator_config.json"), "generator_config.json", "missing"),
        (lambda folder: (folder / "generator_config.json").write_text("{"), "generator_config.json", "Expecting"),
        (lambda folder: (folder / "generator_config.json").write_text("[]"), "generator_config.json", "JSON object"),
        (edit_json("generator_config.json", format_version=2), "generator_config.json", "format_version is 2"),
        (edit_json("generator_config.json", **{"class": "FlowGenerator"}), "", "FlowGenerator"),
        (edit_json("generator_config.json", **{"class": None}), "generator_config.json", "names no class"),
        (edit_json("generator_config.json", t_net=5000), "generator_config.json", "t_net is 5000"),
        (edit_json("generator_config.json", latent_scale="big"), "generator_config.json", "latent_scale"),
        (edit_json("generator_config.json", unheard_of=1), "generator_config.json", "unheard_of"),
        (remove("unet/config.json"), "unet/config.json", "missing"),
        (remove(UNET), "unet", "no safetensors"),
        (truncate(UNET), UNET, "cannot be used"),
        (edit_weights(UNET, lambda w: w.pop("conv_in.bias")), "unet", r"missing keys: conv_in\.bias"),
        (edit_weights(UNET, lambda w: w.update(more=torch.zeros(1))), "unet", "unexpected keys: more"),
        (edit_json("unet/config.json", in_channels=4), "unet", "conv_in"),
        (truncate(VAE), VAE, "cannot be used"),
        (remove("vae/config.json"), "vae/config.json", "missing"),
        (edit_json("vae/config.json", _class_name="VQModel"), "vae/config.json", "VQModel"),
        (remove("scheduler/scheduler_config.json"), "scheduler_config.json", "missing"),
        (remove("prompt_embeds.safetensors"), "prompt_embeds.safetensors", "missing"),
        (truncate("prompt_embeds.safetensors"), "prompt_embeds.safetensors", "cannot be used"),
        (
            edit_weights("prompt_embeds.safetensors", lambda w: w.update(prompt_embeds=torch.zeros(1, 1, 5))),
            "",
            "do not fit each other: the prompt",
        ),
        (edit_weights("prompt_embeds.safetensors", lambda w: w.update(x=w.pop("prompt_embeds"))), "", "no tensor"),
        (remove(POLICY), POLICY, "missing"),
        (truncate(POLICY), POLICY, "cannot be used"),
        (edit_weights(POLICY, lambda w: w.pop("conv_in.lora_B.weight")), "policy", r"conv_in\.lora_B"),
        (
            edit_weights(POLICY, lambda w: w.update({"conv_in.lora_A.weight": torch.zeros(2, 5, 3, 3)})),
            "policy",
            "does not fit",
        ),
    ],
)
def test_damaged_folders_are_refused_by_name(
    saved_folder: Path, tmp_path: Path, damage: Callable[[Path], None], where: str, message: str
) -> None:
    folder = shutil.copytree(saved_folder, tmp_path / "copy")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load_generator(folder)
    assert error.value.where is not None
    assert where in error.value.where
    assert error.value.fix


def test_parts_of_different_generators_are_refused(
    generator: EpsLatentGenerator, kl_generator: EpsLatentGenerator, tmp_path: Path
) -> None:
    generator.save_pretrained(tmp_path)
    kl_generator.vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(CheckpointError, match="latents have 4"):
        load_generator(tmp_path)


def test_sources_that_are_nothing_are_refused() -> None:
    with pytest.raises(CheckpointError, match="no such generator"):
        load_generator("no_such_folder")
