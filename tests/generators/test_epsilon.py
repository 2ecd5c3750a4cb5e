from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from diffusers import AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn

from refreward_trl.errors import ConfigError, DataError
from refreward_trl.generators.epsilon import EpsLatentConfig, EpsLatentGenerator
from refreward_trl.generators.tiny import build_tiny_generator
from refreward_trl.resampling import upscale


class ConstantPrediction(nn.Module):
    """Stands where a prepared denoiser would, records how it was called and predicts one number everywhere."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        self.calls.append((sample, timestep, encoder_hidden_states))
        return (torch.full_like(sample, self.value),)


def test_zero_prediction_gives_exactly_the_lr_latent(generator: EpsLatentGenerator, lr_image: Tensor) -> None:
    cond = generator.prepare(lr_image)
    z = generator.encode(cond)
    assert torch.equal(generator.predict(z, cond, model=ConstantPrediction(0.0)), z)


def test_model_is_called_once_with_the_stock_signature(make_generator, lr_image: Tensor) -> None:
    generator = make_generator(t_net=150, t_coeff=300)
    cond, prediction = generator.prepare(lr_image), ConstantPrediction(0.0)
    z = generator.encode(cond)
    generator.predict(z, cond, model=prediction)
    ((sample, timestep, prompt),) = prediction.calls
    alpha_bar = generator.config.scheduler().alphas_cumprod[300]
    torch.testing.assert_close(sample, z * alpha_bar.sqrt())
    assert timestep.tolist() == [150, 150]
    assert prompt.shape == (2, 1, 32)


@pytest.mark.parametrize("scaling", ["alpha", "none"])
@pytest.mark.parametrize("timestep", [1, 200, 999])
def test_x0_equals_the_schedulers_pred_original_sample(
    make_generator, lr_image: Tensor, scaling: str, timestep: int
) -> None:
    generator = make_generator(input_scaling=scaling, t_net=timestep, t_coeff=timestep)
    cond, prediction = generator.prepare(lr_image), ConstantPrediction(0.3)
    mean = generator.predict(generator.encode(cond), cond, model=prediction)
    z_in = prediction.calls[0][0]
    step = generator.config.scheduler().step(torch.full_like(z_in, 0.3), timestep, z_in)
    torch.testing.assert_close(mean, step.pred_original_sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", ["alpha", "none"])
def test_input_noise_is_that_of_a_noised_latent(make_generator, lr_image: Tensor, scaling: str) -> None:
    generator = make_generator(input_noise=1.0, input_scaling=scaling)
    cond, prediction = generator.prepare(lr_image), ConstantPrediction(0.0)
    z = generator.encode(cond)
    noise = torch.randn(z.shape)
    generator.predict(z, cond, noise, model=prediction)
    alpha_bar = generator.config.scheduler().alphas_cumprod[200]
    signal = alpha_bar.sqrt() if scaling == "alpha" else 1.0
    torch.testing.assert_close(prediction.calls[0][0], signal * z + (1 - alpha_bar).sqrt() * noise)


def test_deployed_input_noise_is_the_same_every_time_and_for_every_image(make_generator, lr_image: Tensor) -> None:
    generator = make_generator(input_noise=0.5)
    images = generator.generate(lr_image)
    assert torch.equal(generator.generate(lr_image), images)
    torch.testing.assert_close(generator.generate(lr_image[1:]), images[1:])
    assert not torch.equal(make_generator(input_noise=0.0).generate(lr_image), images)


def test_noise_for_a_generator_without_input_noise_is_refused(generator: EpsLatentGenerator, lr_image: Tensor) -> None:
    cond = generator.prepare(lr_image)
    z = generator.encode(cond)
    with pytest.raises(ConfigError, match="no input noise"):
        generator.predict(z, cond, torch.zeros_like(z))


@pytest.mark.parametrize("size", [(8, 8), (21, 32), (11, 32), (9, 7), (2, 1), (3, 40)])
def test_any_lr_size_gives_exactly_scale_times_it(make_generator, size: tuple[int, int]) -> None:
    generator = make_generator(color_fix="wavelet")
    image = generator.generate(torch.rand(1, 3, *size))
    assert image.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert image.isfinite().all()


def test_prepared_image_fits_network_and_begins_with_the_enlarged_lr(kl_generator: EpsLatentGenerator) -> None:
    lr_image = torch.rand(2, 3, 9, 7)
    cond = kl_generator.prepare(lr_image)
    assert kl_generator.size_multiple == 8
    assert cond.size == (36, 28)
    assert cond.upsampled.shape == (2, 3, 40, 32)
    assert torch.equal(cond.upsampled[..., :36, :28], upscale(lr_image, 4))
    assert cond.prompt_embeds.shape == (2, 2, 16)
    assert kl_generator.encode(cond).shape == (2, 4, 20, 16)


def test_generate_is_the_composition_of_its_parts(kl_generator: EpsLatentGenerator, lr_image: Tensor) -> None:
    cond = kl_generator.prepare(lr_image)
    mean = kl_generator.predict(kl_generator.encode(cond), cond)
    parts = kl_generator.postprocess(kl_generator.decode(mean, cond), cond)
    assert parts.max() > 1 or parts.min() < 0
    assert torch.equal(kl_generator.generate(lr_image), parts.clamp(0, 1))
    assert not kl_generator.generate(lr_image).requires_grad


def test_generate_ignores_dropout_and_restores_the_mode(kl_generator: EpsLatentGenerator, lr_image: Tensor) -> None:
    image = kl_generator.generate(lr_image)
    for module in kl_generator.denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    kl_generator.denoiser.train()
    assert torch.equal(kl_generator.generate(lr_image), image)
    assert kl_generator.denoiser.training


def test_decode_is_neither_clamped_nor_flat_outside_the_range(generator: EpsLatentGenerator, lr_image: Tensor) -> None:
    cond = generator.prepare(lr_image)
    z = (2 * generator.encode(cond)).requires_grad_()
    image = generator.decode(z, cond)
    outside = (image < 0) | (image > 1)
    assert outside.any()
    image[outside].sum().backward()
    assert z.grad.abs().max() > 0


@pytest.mark.parametrize("which", ["generator", "kl_generator"])
def test_checkpointed_decode_has_the_same_gradient(
    which: str, request: pytest.FixtureRequest, lr_image: Tensor
) -> None:
    generator: EpsLatentGenerator = request.getfixturevalue(which)
    cond = generator.prepare(lr_image)
    gradients = []
    for checkpoint in (False, True):
        z = generator.encode(cond).requires_grad_()
        image = generator.decode(z, cond, checkpoint=checkpoint)
        gradients.append(torch.autograd.grad(image.square().sum(), z)[0])
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("which", ["generator", "kl_generator"])
def test_checkpointed_decode_keeps_fewer_activations(
    which: str, request: pytest.FixtureRequest, lr_image: Tensor
) -> None:
    generator: EpsLatentGenerator = request.getfixturevalue(which)
    cond = generator.prepare(lr_image)
    sizes = []
    for checkpoint in (False, True):
        kept: list[int] = []
        z = generator.encode(cond).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            generator.decode(z, cond, checkpoint=checkpoint)
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 4


def test_checkpoints_of_a_decode_are_not_nested(
    kl_generator: EpsLatentGenerator, lr_image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nested one would be missing when the backward pass computes the block again: torch 2.11 then refuses it."""
    depth, depths, checkpoint = 0, [], torch.utils.checkpoint.checkpoint

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal depth
        depth += 1
        depths.append(depth)
        try:
            return checkpoint(*arguments, **keywords)
        finally:
            depth -= 1

    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", counted)
    cond = kl_generator.prepare(lr_image)
    kl_generator.decode(kl_generator.encode(cond).requires_grad_(), cond, checkpoint=True)
    assert len(depths) > 1
    assert set(depths) == {1}


def test_gradient_of_an_image_reaches_the_denoiser_and_nothing_else(
    kl_generator: EpsLatentGenerator, lr_image: Tensor
) -> None:
    cond = kl_generator.prepare(lr_image)
    image = kl_generator.decode(kl_generator.predict(kl_generator.encode(cond), cond), cond, checkpoint=True)
    kl_generator.postprocess(image, cond).mean().backward()
    assert all(p.grad is not None for p in kl_generator.trainable_parameters())
    assert all(p.grad is None and not p.requires_grad for p in kl_generator.vae.parameters())


def test_the_denoiser_holds_no_other_network(generator: EpsLatentGenerator) -> None:
    assert isinstance(generator.denoiser, UNet2DConditionModel)
    assert not any(isinstance(module, AutoencoderTiny) for module in generator.denoiser.modules())
    assert not isinstance(generator, nn.Module)
    assert not generator.vae.training


def test_latents_and_images_are_float32_when_networks_are_bfloat16(
    kl_generator: EpsLatentGenerator, lr_image: Tensor
) -> None:
    kl_generator.denoiser.bfloat16()
    kl_generator.vae.bfloat16()
    cond = kl_generator.prepare(lr_image)
    z = kl_generator.encode(cond)
    mean = kl_generator.predict(z, cond)
    assert {z.dtype, mean.dtype, kl_generator.decode(mean, cond).dtype} == {torch.float32}


def test_x0_is_computed_in_float32_under_autocast(generator: EpsLatentGenerator, lr_image: Tensor) -> None:
    cond = generator.prepare(lr_image)
    z = generator.encode(cond)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(generator.encode(cond), z)
        assert torch.equal(generator.predict(z, cond, model=ConstantPrediction(0.0)), z)


def test_latents_are_scaled_and_decoded_back(generator: EpsLatentGenerator) -> None:
    image = torch.rand(1, 3, 16, 16)
    raw = generator.vae.encode(image * 2 - 1).latents
    z = generator.encode_image(image)
    torch.testing.assert_close(z, (raw - 0.1) * 1.3)
    torch.testing.assert_close(generator.decode_latent(z), generator.vae.decode(raw).sample / 2 + 0.5)


def test_calibrated_latents_have_unit_standard_deviation(generator: EpsLatentGenerator) -> None:
    images = torch.rand(4, 3, 16, 16)
    generator.calibrate_latents(images)
    z = generator.encode_image(images)
    torch.testing.assert_close(z.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(), torch.tensor(1.0))


def test_condition_repeats_and_selects_groups(generator: EpsLatentGenerator, lr_image: Tensor) -> None:
    cond = generator.prepare(lr_image)
    repeated = cond.repeat(3)
    assert len(repeated) == 6
    assert torch.equal(repeated.lr_image[2], lr_image[0])
    assert torch.equal(repeated.select(slice(3, 6)).upsampled[2], cond.upsampled[1])
    z = generator.encode(cond)
    torch.testing.assert_close(
        generator.predict(z.repeat_interleave(3, 0), repeated), generator.predict(z, cond).repeat_interleave(3, 0)
    )


def test_tiny_generator_is_seeded_and_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (build_tiny_generator(vae_width=8, unet_channels=(8, 8), seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [g.denoiser.state_dict()["conv_in.weight"] for g in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.denoiser.state_dict()["conv_out.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("t_net", 1000),
        ("t_coeff", -1),
        ("input_scaling", "beta"),
        ("color_fix", "sepia"),
        ("beta_schedule", "cosine"),
        ("latent_scale", 0.0),
        ("latent_scale", math.nan),
        ("input_noise", -0.1),
        ("scale", 0),
    ],
)
def test_config_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field) as error:
        EpsLatentConfig(**{"latent_scale": 1.0, field: value})
    assert error.value.fix


def test_parts_that_do_not_fit_are_refused(generator: EpsLatentGenerator, kl_generator: EpsLatentGenerator) -> None:
    with pytest.raises(ConfigError, match="8 to 8 channels, latents have 4"):
        EpsLatentGenerator(generator.unet, kl_generator.vae, generator.config)
    with pytest.raises(ConfigError, match="the prompt has"):
        EpsLatentGenerator(generator.unet, generator.vae, generator.config, torch.zeros(1, 1, 7))


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(0, 3, 8, 8)])
def test_lr_images_of_a_wrong_shape_are_refused(generator: EpsLatentGenerator, image: Tensor) -> None:
    with pytest.raises(DataError, match="shape"):
        generator.prepare(image)


def test_integer_lr_images_are_refused(generator: EpsLatentGenerator) -> None:
    with pytest.raises(DataError, match="uint8"):
        generator.prepare(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
