"""Published checkpoints: what is read computes what stock networks with the authors' adapters compute."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import published_models as fixtures
import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError, ConfigError, RefRewardError, SetupError
from refreward_trl.generators import load_generator
from refreward_trl.generators.latent import LatentGenerator
from refreward_trl.generators.published import load_published, write_published
from refreward_trl.resampling import upscale

TrainPolicy = Callable[[list[nn.Parameter]], None]
FAMILIES = ("osediff", "pisa_sr", "hypir", "tsd_sr", "naosd")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fixtures.Published]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in fixtures.WRITERS.items()}


def load(made: fixtures.Published, **options: Any) -> LatentGenerator:
    if made.path.is_dir() and (made.path / "unet").is_dir():
        options = {"family": "naosd", **options}
    return load_published(made.path, base_model=str(made.base), **options)


@pytest.fixture
def lr_image() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def expected_latent(family: str, made: fixtures.Published, lr_image: Tensor) -> Tensor:
    """The families' formulas, written down again with stock networks."""
    x = upscale(lr_image, 4) * 2 - 1
    alpha_bar = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    z = made.vae.encode(x).latent_dist.mode() * made.vae.config.scaling_factor
    if family == "tsd_sr":
        prompt = torch.load(made.path / "prompt_embeds.pt").expand(len(z), -1, -1)
        pooled = torch.load(made.path / "pool_embeds.pt").expand(len(z), -1)
        return z - made.denoiser(z, prompt, pooled, torch.full((len(z),), 1000.0), return_dict=False)[0]
    prompt = fixtures.null_prompt(made.base).expand(len(z), -1, -1)

    def unet(latent: Tensor, t: int) -> Tensor:
        return made.denoiser(latent, t, encoder_hidden_states=prompt).sample

    if family == "pisa_sr":
        return z - unet(z, 1)
    t = {"osediff": 999, "hypir": 200}[family]
    return (z - (1 - alpha_bar[t]).sqrt() * unet(z, t)) / alpha_bar[t].sqrt()


@pytest.mark.parametrize("family", ["osediff", "pisa_sr", "hypir", "tsd_sr"])
def test_a_checkpoint_computes_what_its_authors_adapters_compute(
    family: str, written: dict[str, fixtures.Published], lr_image: Tensor
) -> None:
    made = written[family]
    generator = load(made)
    cond = generator.prepare(lr_image)
    with torch.no_grad():
        mean = generator.predict(generator.encode(cond), cond)
        expected = expected_latent(family, made, lr_image)
    # At t = 999 the closed form multiplies the rounding of the merge by 14.6.
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=2e-4 if family == "osediff" else 2e-5)
    assert generator.origin is not None and generator.origin.family == family


def test_every_adapter_of_a_checkpoint_matters(written: dict[str, fixtures.Published], lr_image: Tensor) -> None:
    """Else the comparison above would not notice one that is left out."""
    made = written["osediff"]
    whole = load(made).generate(lr_image)
    content = torch.load(made.path)
    for part in ("encoder", "decoder", "others"):
        changed = {
            name: weight * (0 if f"lora_B.default_{part}." in name else 1)
            for name, weight in content["state_dict_unet"].items()
        }
        path = made.path.with_name(f"without_{part}.pkl")
        torch.save({**content, "state_dict_unet": changed}, path)
        assert not torch.allclose(load(replace(made, path=path)).generate(lr_image), whole, atol=1e-3)


def test_gdpo_training_files_adapt_the_decoder_of_the_vae_too(tmp_path: Path, lr_image: Tensor) -> None:
    made = fixtures.write_osediff(tmp_path, vae_parts=("encoder", "decoder"))
    generator = load(made, family="naosd", color_fix="none")
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = made.vae.decode(z / made.vae.config.scaling_factor).sample / 2 + 0.5
        torch.testing.assert_close(generator.decode_latent(z), expected, rtol=1e-4, atol=1e-4)
    assert generator.takes_noise


def test_naosd_adds_noise_at_one_timestep_and_removes_it_at_another(
    written: dict[str, fixtures.Published], lr_image: Tensor
) -> None:
    made = written["naosd"]
    generator = load(made, prompt="")
    cond = generator.prepare(lr_image)
    z = generator.encode(cond)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    alpha_bar = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    z_in = alpha_bar[250].sqrt() * z + (1 - alpha_bar[250]).sqrt() * noise
    with torch.no_grad():
        eps = made.denoiser(z_in, 100, encoder_hidden_states=cond.prompt_embeds).sample
        expected = (z_in - (1 - alpha_bar[100]).sqrt() * eps) / alpha_bar[100].sqrt()
        torch.testing.assert_close(generator.predict(z, cond, noise), expected, rtol=1e-5, atol=1e-5)
        # The figures of generators.md: signal gain 0.87, residual noise 0.26.
        silent = (generator.predict(z, cond, noise) - generator.predict(z, cond, 0 * noise)).std()
    assert math.isclose(alpha_bar[250].sqrt() / alpha_bar[100].sqrt(), 0.87, abs_tol=0.01)
    assert silent > 0


def test_strengths_mix_the_two_levels_of_pisa(written: dict[str, fixtures.Published], lr_image: Tensor) -> None:
    made = written["pisa_sr"]
    generator = load(made, pixel_strength=0.8, semantic_strength=0.3)
    cond = generator.prepare(lr_image)
    z, prompt = generator.encode(cond), cond.prompt_embeds
    with torch.no_grad():
        full = made.denoiser(z, 1, encoder_hidden_states=prompt).sample
        made.denoiser.set_adapter([f"default_{part}_pix" for part in fixtures.PARTS])
        pixel = made.denoiser(z, 1, encoder_hidden_states=prompt).sample
        made.denoiser.set_adapter([f"default_{part}_{level}" for level in ("pix", "sem") for part in fixtures.PARTS])
        expected = z - (0.8 * pixel + 0.3 * (full - pixel))
        torch.testing.assert_close(generator.predict(z, cond), expected, rtol=1e-4, atol=2e-5)


def assert_reloaded(again: Any, generator: Any, lr_image: Tensor) -> None:
    """Weights to the bit; images nearly, because matrix products of some CPUs round by where their buffers lie."""
    for part in ("denoiser", "vae", "pixel_denoiser"):
        if getattr(generator, part, None) is not None:
            weights, expected = (getattr(each, part).state_dict() for each in (again, generator))
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
    torch.testing.assert_close(again.generate(lr_image), generator.generate(lr_image), rtol=0, atol=1e-4)


def test_strengths_survive_saving(written: dict[str, fixtures.Published], lr_image: Tensor, tmp_path: Path) -> None:
    generator = load(written["pisa_sr"], pixel_strength=0.8, semantic_strength=0.3)
    generator.save_pretrained(tmp_path)
    assert_reloaded(load_generator(tmp_path), generator, lr_image)
    with pytest.raises(ConfigError, match="semantic adapters"):
        plain = tmp_path / "plain"
        load(written["pisa_sr"]).save_pretrained(plain)
        try:
            load_generator(plain, pixel_strength=0.5)
        except CheckpointError as error:
            raise ConfigError(error.what) from error


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_changes_nothing(
    family: str, written: dict[str, fixtures.Published], lr_image: Tensor, tmp_path: Path, train_policy: TrainPolicy
) -> None:
    generator = load(written[family])
    generator.add_policy_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    train_policy(generator.trainable_parameters())
    generator.save_pretrained(tmp_path)
    again = load_generator(tmp_path)
    assert isinstance(again, LatentGenerator)
    assert_reloaded(again, generator, lr_image)
    assert again.config == generator.config
    assert again.origin is not None and again.origin.family == family
    with again.reference(), generator.reference():
        assert_reloaded(again, generator, lr_image)


@pytest.mark.parametrize("family", ["osediff", "pisa_sr", "hypir", "tsd_sr"])
def test_a_checkpoint_goes_back_exactly_as_it_came(
    family: str, written: dict[str, fixtures.Published], tmp_path: Path
) -> None:
    made = written[family]
    target = tmp_path / made.path.name
    write_published(load(made), target)
    if made.path.is_dir():
        for name in ("transformer.safetensors", "vae.safetensors"):
            assert_same(load_file(target / name), load_file(made.path / name))
        for name in ("prompt_embeds.pt", "pool_embeds.pt"):
            assert torch.equal(torch.load(target / name), torch.load(made.path / name))
    else:
        assert_same(torch.load(target), torch.load(made.path))


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_same(one[name], two[name])
    else:
        assert one == two


@pytest.mark.parametrize("family", ["osediff", "pisa_sr", "hypir", "tsd_sr"])
def test_a_policy_goes_back_in_the_authors_format(
    family: str, written: dict[str, fixtures.Published], lr_image: Tensor, tmp_path: Path, train_policy: TrainPolicy
) -> None:
    made = written[family]
    generator = load(made)
    before = generator.generate(lr_image)
    # Not all of the checkpoint's layers; a scale that is not the format's.
    generator.add_policy_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v", "proj_out"]))
    train_policy(generator.trainable_parameters())
    target = tmp_path / made.path.name
    write_published(generator, target)
    again = load(replace(made, path=target))
    torch.testing.assert_close(again.generate(lr_image), generator.generate(lr_image), rtol=0, atol=1e-5)
    assert not torch.allclose(again.generate(lr_image), before, atol=1e-3)


def test_layers_that_only_the_policy_changes_join_the_lists(
    written: dict[str, fixtures.Published], lr_image: Tensor, tmp_path: Path, train_policy: TrainPolicy
) -> None:
    generator = load(written["osediff"])
    generator.add_policy_adapter(LoraConfig(r=2, target_modules=["time_emb_proj", "conv_in", "conv_out"]))
    train_policy(generator.trainable_parameters())
    target = tmp_path / "osediff.pkl"
    write_published(generator, target)
    content = torch.load(target)
    assert content["rank_unet"] == 6
    assert "down_blocks.0.resnets.0.time_emb_proj" in content["unet_lora_encoder_modules"]
    assert "up_blocks.0.resnets.0.time_emb_proj" in content["unet_lora_decoder_modules"]
    assert "mid_block.resnets.0.time_emb_proj" in content["unet_lora_others_modules"]
    again = load(replace(written["osediff"], path=target))
    torch.testing.assert_close(again.generate(lr_image), generator.generate(lr_image), rtol=0, atol=1e-5)


def test_formats_with_fixed_layers_refuse_others(
    written: dict[str, fixtures.Published], tmp_path: Path, train_policy: TrainPolicy
) -> None:
    generator = load(written["hypir"])
    generator.add_policy_adapter(LoraConfig(r=2, target_modules=["time_emb_proj"]))
    with pytest.raises(ConfigError, match="time_emb_proj, which the format has no place for"):
        write_published(generator, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_weights_that_a_low_rank_format_cannot_hold_are_refused(
    written: dict[str, fixtures.Published], tmp_path: Path
) -> None:
    generator = load(written["osediff"])
    with torch.no_grad():
        next(generator.denoiser.parameters()).add_(0.1)
    with pytest.raises(ConfigError, match="low-rank format osediff"):
        write_published(generator, tmp_path / "osediff.pkl")
    with pytest.raises(ConfigError, match="not made of a published"):
        write_published(load(written["naosd"]), tmp_path / "x.pkl")


# What is refused


def changed(made: fixtures.Published, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> fixtures.Published:
    content = torch.load(made.path)
    result = change(content)
    path = tmp_path / made.path.name
    torch.save(content if result is None else result, path)
    return replace(made, path=path)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("osediff", lambda c: c["state_dict_unet"].pop("conv_in.base_layer.weight"), r"missing .*conv_in\.base_layer"),
        ("osediff", lambda c: c["state_dict_unet"].pop("conv_in.lora_A.default_encoder.weight"), "lora_A is missing"),
        ("osediff", lambda c: c["state_dict_unet"].update(extra=torch.zeros(1)), "unexpected .*extra"),
        ("osediff", lambda c: c.pop("unet_lora_others_modules"), "unet_lora_others_modules is missing"),
        ("osediff", lambda c: c["unet_lora_decoder_modules"].append("up_blocks.9.conv"), r"missing .*up_blocks\.9"),
        ("osediff", lambda c: c["unet_lora_decoder_modules"].pop(), "unexpected"),
        ("osediff", lambda c: c.update(rank_unet=5), "rank 4, the file says 5"),
        ("osediff", lambda c: c.update(rank_unet="4"), "not a rank"),
        ("osediff", lambda c: c.update(state_dict_vae=3), "state_dict_vae is missing, or no state dict"),
        ("pisa_sr", lambda c: c["state_dict_unet"].update(extra=torch.zeros(1)), "unexpected .*extra"),
        ("pisa_sr", lambda c: c.pop("lora_rank_unet_sem"), "lora_rank_unet_sem"),
        ("hypir", lambda c: c.update({"a.b.lora_A.default.weight": torch.zeros(2, 2)}), r"a\.b\.lora_B is missing"),
        ("hypir", lambda c: {"one": 1}, "no known format"),
        ("hypir", lambda c: [1], "holds a list"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(
    family: str,
    change: Callable[[dict[str, Any]], Any],
    message: str,
    written: dict[str, fixtures.Published],
    tmp_path: Path,
) -> None:
    def apply(content: dict[str, Any]) -> Any:
        result = change(content)
        return result if result in ([1], {"one": 1}) else None

    made = changed(written[family], tmp_path, apply)
    with pytest.raises(CheckpointError, match=message) as error:
        load(made)
    assert str(made.path) in str(error.value)


def test_a_missing_tensor_of_tsd_is_refused_by_name(written: dict[str, fixtures.Published], tmp_path: Path) -> None:
    made = fixtures.write_tsd_sr(tmp_path)
    state = load_file(made.path / "vae.safetensors")
    name = next(key for key in state if key.endswith("lora_B.weight"))
    del state[name]
    save_file(state, made.path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="lora_B is missing"):
        load(made)
    (made.path / "pool_embeds.pt").unlink()
    with pytest.raises(CheckpointError, match="pool_embeds"):
        load(made)


@dataclass
class Evil:
    canary: Path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


def test_a_pickle_with_code_is_never_run(written: dict[str, fixtures.Published], tmp_path: Path) -> None:
    path, evil = tmp_path / "osediff.pkl", Evil(tmp_path / "was_here")
    torch.save({"rank_unet": 4, "unet_lora_encoder_modules": evil}, path)
    with pytest.raises(CheckpointError, match=r"more than tensors.*mkdir"):
        load(replace(written["osediff"], path=path))
    path.write_bytes(pickle.dumps(evil))
    with pytest.raises(CheckpointError):
        load(replace(written["osediff"], path=path))
    assert not evil.canary.exists()
    pickle.loads(path.read_bytes())
    assert evil.canary.exists(), "a reader that runs code would have been seen"


@pytest.mark.parametrize("kept", [0, 0.3, 0.99])
def test_a_truncated_file_is_refused_by_name(
    kept: float, written: dict[str, fixtures.Published], tmp_path: Path
) -> None:
    data = written["osediff"].path.read_bytes()
    path = tmp_path / "osediff.pkl"
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        load(replace(written["osediff"], path=path))
    assert error.value.where == str(path)


def test_a_base_that_predicts_v_is_refused(written: dict[str, fixtures.Published], tmp_path: Path) -> None:
    base = fixtures.write_sd21_base(tmp_path / "base", prediction="v_prediction")
    with pytest.raises(CheckpointError, match="predicts v_prediction"):
        load(replace(written["osediff"], base=base))


def test_a_base_of_another_width_is_refused(written: dict[str, fixtures.Published], tmp_path: Path) -> None:
    base = fixtures.write_sd21_base(tmp_path / "base", width=24)
    with pytest.raises(CheckpointError, match=r"another base model: .* \(\d+, 24\) .* \(\d+, 16\)"):
        load(replace(written["osediff"], base=base))


def test_a_base_of_another_kind_is_refused(written: dict[str, fixtures.Published]) -> None:
    with pytest.raises(CheckpointError, match="FlowMatchEulerDiscreteScheduler"):
        load(replace(written["osediff"], base=written["tsd_sr"].base))


def test_a_base_that_is_gone_names_all_that_was_tried(
    written: dict[str, fixtures.Published], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SetupError) as error:
        load_published(written["osediff"].path)
    for name in ("Manojb/", "sd2-community/", "stabilityai/", "base_model", "OpenRAIL"):
        assert name in str(error.value)
    with pytest.raises(SetupError, match="no/such-model"):
        load_published(written["osediff"].path, base_model="no/such-model")


def test_the_family_must_fit_the_format(written: dict[str, fixtures.Published]) -> None:
    with pytest.raises(ConfigError, match="format of osediff, not of hypir"):
        load(written["osediff"], family="hypir")
    with pytest.raises(ConfigError, match="does not say which family"):
        load_published(written["naosd"].path, base_model=str(written["naosd"].base))
    with pytest.raises(ConfigError, match="no family 'osedif'"):
        load(written["naosd"], family="osedif")


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_refused_only_where_it_spoils_the_latent(
    family: str, written: dict[str, fixtures.Published]
) -> None:
    if family == "osediff":
        with pytest.raises(ConfigError, match=r"999 .*14\.6: bfloat16"):
            load(written[family], dtype=torch.bfloat16)
        return
    generator = load(written[family], dtype=torch.bfloat16)
    assert generator.generate(torch.rand(1, 3, 8, 8)).isfinite().all()


def test_prompts_reach_the_network_and_are_embedded_once(
    written: dict[str, fixtures.Published], lr_image: Tensor, tmp_path: Path
) -> None:
    generator = load(written["osediff"], prompt="a cat")
    encoder = generator.prompt_encoder
    assert encoder is not None and encoder._networks is None, "the text encoder is let go after the fixed prompt"
    fixed = generator.generate(lr_image)
    assert encoder._networks is None
    assert torch.equal(generator.generate(lr_image, ["a cat", "a cat"]), fixed)
    assert encoder._networks is None, "a cached prompt does not load the text encoder"
    mixed = generator.generate(lr_image, ["a cat", "dog"])
    assert torch.equal(mixed[0], fixed[0]) and not torch.equal(mixed[1], fixed[1])
    generator.save_pretrained(tmp_path)
    assert torch.equal(load_generator(tmp_path).generate(lr_image, ["a cat", "dog"]), mixed)


def test_embeddings_from_a_file_need_no_text_encoder(
    written: dict[str, fixtures.Published], lr_image: Tensor, tmp_path: Path
) -> None:
    embeds = fixtures.null_prompt(written["osediff"].base)
    save_file({"prompt_embeds": embeds}, tmp_path / "prompt.safetensors")
    torch.save(embeds[0], tmp_path / "prompt.pt")
    base = fixtures.write_sd21_base(tmp_path / "base")
    for part in ("text_encoder", "tokenizer"):
        (base / part).rename(tmp_path / part)
    made = replace(written["osediff"], base=base)
    expected = load(written["osediff"], prompt="").generate(lr_image)
    for name in ("prompt.safetensors", "prompt.pt"):
        assert torch.equal(load(made, prompt_embeds=tmp_path / name).generate(lr_image), expected)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load(made)


def test_a_saved_generator_refuses_options_of_published_ones(
    written: dict[str, fixtures.Published], tmp_path: Path
) -> None:
    load(written["osediff"]).save_pretrained(tmp_path)
    with pytest.raises(RefRewardError, match="family is 'naosd'"):
        load_generator(tmp_path, family="naosd")
