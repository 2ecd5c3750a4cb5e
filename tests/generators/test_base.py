from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoHaConfig, LoraConfig
from torch import Tensor, nn

from refreward_trl.errors import ConfigError
from refreward_trl.generators.base import pad_to_multiple, straight_through_clamp
from refreward_trl.generators.epsilon import EpsLatentGenerator

TrainPolicy = Callable[[list[nn.Parameter]], None]


class Wrapped(nn.Module):
    """Delegates as DDP does: the trained module is one of its submodules."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


def predicted(generator: EpsLatentGenerator, lr_image: Tensor, model: nn.Module | None = None) -> Tensor:
    cond = generator.prepare(lr_image)
    return generator.predict(generator.encode(cond), cond, model=model)


def test_straight_through_clamp_clamps_exactly_and_passes_the_gradient_on() -> None:
    x = torch.tensor([-3.7, -0.0, 0.3, 1.0, 1.7, 1e6], requires_grad=True)
    weight = torch.arange(1.0, 7.0)
    clamped = straight_through_clamp(x)
    (weight * clamped).sum().backward()
    assert torch.equal(clamped, x.clamp(0, 1))
    assert torch.equal(x.grad, weight)
    assert straight_through_clamp(torch.tensor([float("nan")])).isnan()


@pytest.mark.parametrize(("size", "padded"), [((8, 8), (8, 8)), ((9, 7), (12, 8)), ((1, 1), (4, 4))])
def test_padding_reaches_the_multiple_and_keeps_the_image(size: tuple[int, int], padded: tuple[int, int]) -> None:
    image = torch.rand(1, 3, *size)
    result = pad_to_multiple(image, 4)
    assert result.shape[-2:] == padded
    assert torch.equal(result[..., : size[0], : size[1]], image)
    assert result.min() >= image.min()
    assert result.max() <= image.max()


def test_a_new_adapter_changes_nothing_and_is_all_that_trains(
    generator: EpsLatentGenerator, lr_image: Tensor, lora_config: LoraConfig
) -> None:
    before = predicted(generator, lr_image)
    generator.add_policy_adapter(lora_config)
    assert torch.equal(predicted(generator, lr_image), before)
    names = {name for name, parameter in generator.denoiser.named_parameters() if parameter.requires_grad}
    assert names
    assert all(".lora_" in name and ".policy." in name for name in names)
    assert len(generator.trainable_parameters()) == len(names)
    assert lora_config.base_model_name_or_path is None


def test_reference_is_exactly_the_base_and_is_restored(
    generator: EpsLatentGenerator, lr_image: Tensor, lora_config: LoraConfig, train_policy: TrainPolicy
) -> None:
    base = predicted(generator, lr_image)
    generator.add_policy_adapter(lora_config)
    train_policy(generator.trainable_parameters())
    trainable = [name for name, p in generator.denoiser.named_parameters() if p.requires_grad]
    policy = predicted(generator, lr_image)
    assert not torch.allclose(policy, base, atol=1e-3)
    with generator.reference():
        assert torch.equal(predicted(generator, lr_image), base)
        with generator.reference():
            assert torch.equal(predicted(generator, lr_image), base)
        assert torch.equal(predicted(generator, lr_image), base)
        assert [name for name, p in generator.denoiser.named_parameters() if p.requires_grad] == trainable
    assert torch.equal(predicted(generator, lr_image), policy)


def test_reference_is_left_when_something_fails_inside(
    generator: EpsLatentGenerator, lr_image: Tensor, lora_config: LoraConfig, train_policy: TrainPolicy
) -> None:
    generator.add_policy_adapter(lora_config)
    train_policy(generator.trainable_parameters())
    policy = predicted(generator, lr_image)
    with pytest.raises(RuntimeError, match="inside"), generator.reference():
        raise RuntimeError("inside")
    assert torch.equal(predicted(generator, lr_image), policy)


def test_reference_reaches_through_a_wrapper(
    generator: EpsLatentGenerator, lr_image: Tensor, lora_config: LoraConfig, train_policy: TrainPolicy
) -> None:
    base = predicted(generator, lr_image)
    generator.add_policy_adapter(lora_config)
    train_policy(generator.trainable_parameters())
    wrapped = Wrapped(generator.denoiser)
    cond = generator.prepare(lr_image)
    reference_mean = generator.reference_mean(generator.encode(cond), cond, model=wrapped)
    assert torch.equal(reference_mean, base)
    assert not reference_mean.requires_grad
    assert not torch.equal(predicted(generator, lr_image, wrapped), base)


def test_full_fine_tuning_keeps_a_frozen_copy(
    generator: EpsLatentGenerator, lr_image: Tensor, train_policy: TrainPolicy
) -> None:
    base = predicted(generator, lr_image)
    generator.freeze_reference()
    train_policy(generator.trainable_parameters())
    policy = predicted(generator, lr_image)
    assert not torch.allclose(policy, base, atol=1e-3)
    cond = generator.prepare(lr_image)
    wrapped = Wrapped(generator.denoiser)
    assert torch.equal(generator.reference_mean(generator.encode(cond), cond, model=wrapped), base)
    assert torch.equal(predicted(generator, lr_image, generator.reference_model()), base)
    assert not any(parameter.requires_grad for parameter in generator.reference_model().parameters())
    with generator.reference():
        assert torch.equal(predicted(generator, lr_image), base)
    assert torch.equal(predicted(generator, lr_image), policy)


def test_an_adapter_needs_no_copy(generator: EpsLatentGenerator, lora_config: LoraConfig) -> None:
    generator.add_policy_adapter(lora_config)
    generator.freeze_reference()
    assert generator.reference_model() is None


def test_without_adapter_or_copy_there_is_no_reference(generator: EpsLatentGenerator, lr_image: Tensor) -> None:
    cond = generator.prepare(lr_image)
    with pytest.raises(ConfigError, match="no reference"):
        generator.reference_mean(generator.encode(cond), cond)
    with pytest.raises(ConfigError, match="no reference"), generator.reference():
        pass


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["conv_in"]}, {"init_lora_weights": "pissa"}],
)
def test_adapters_that_leave_no_reference_are_refused_by_name(
    generator: EpsLatentGenerator, options: dict[str, object]
) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        generator.add_policy_adapter(LoraConfig(target_modules=["to_q"], **options))
    assert not generator.has_policy_adapter


def test_adapters_that_do_not_fit_are_refused(generator: EpsLatentGenerator, lora_config: LoraConfig) -> None:
    with pytest.raises(ConfigError, match="nonsense") as error:
        generator.add_policy_adapter(LoraConfig(target_modules=["nonsense"]))
    assert error.value.where == "lora_target_modules"
    with pytest.raises(ConfigError, match="LoHaConfig"):
        generator.add_policy_adapter(LoHaConfig(target_modules=["to_q"]))
    generator.add_policy_adapter(lora_config)
    with pytest.raises(ConfigError, match="already"):
        generator.add_policy_adapter(lora_config)


def test_merged_policy_gives_the_same_image_without_an_adapter(
    generator: EpsLatentGenerator, lr_image: Tensor, lora_config: LoraConfig, train_policy: TrainPolicy
) -> None:
    generator.add_policy_adapter(lora_config)
    train_policy(generator.trainable_parameters())
    policy = predicted(generator, lr_image)
    generator.merge_policy()
    assert not generator.has_policy_adapter
    assert not any("lora" in name for name in generator.denoiser.state_dict())
    torch.testing.assert_close(predicted(generator, lr_image), policy, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="no policy adapter"):
        generator.merge_policy()
    generator.add_policy_adapter(lora_config)
