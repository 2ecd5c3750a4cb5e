"""What every one-step SR generator offers: prepare, encode, predict, decode, and a reference to compare with.

A generator is a plain object that owns its networks, not an `nn.Module`. The module that a Trainer prepares is
`denoiser` alone, and the denoiser's `forward` is the prediction: DDP exposes only `forward`, and DeepSpeed partitions
every registered parameter, so a frozen VAE inside the prepared module would be wrapped, partitioned and saved with it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from refreward_trl.errors import ConfigError, DataError
from refreward_trl.generators.policies import GaussianLatentPolicy

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

POLICY_ADAPTER = "policy"
"""Name of the one LoRA adapter that alignment trains."""


@dataclass
class Condition:
    """Everything the prediction and the decode need besides the latent.

    Attributes:
        lr_image: `(b, 3, h, w)`, float32 in [0, 1].
        upsampled: `(b, 3, H', W')`, bicubic enlargement of `lr_image` in [0, 1], padded at the bottom and the right so
            that the latent fits the network.
        size: `(H, W)` of the SR image, before padding.
        prompt_embeds: `(b, tokens, dim)`; zero tokens where the network has no prompt.
        pooled_embeds: `(b, pooled_dim)` of networks that take one vector more of the prompt; else None.
    """

    lr_image: Float[Tensor, "b 3 h w"]
    upsampled: Float[Tensor, "b 3 H W"]
    size: tuple[int, int]
    prompt_embeds: Float[Tensor, "b tokens dim"]
    pooled_embeds: Float[Tensor, "b pooled_dim"] | None = None

    def __len__(self) -> int:
        return len(self.lr_image)

    def select(self, index: slice | Tensor) -> Condition:
        """Returns the condition of some of the samples, for micro-batches."""
        return self._mapped(lambda tensor: tensor[index])

    def repeat(self, count: int) -> Condition:
        """Returns the condition with each sample `count` times in a row: the order of the candidates of a group."""
        return self._mapped(lambda tensor: tensor.repeat_interleave(count, 0))

    def to(self, device: torch.device | str) -> Condition:
        """Returns the condition on `device`."""
        return self._mapped(lambda tensor: tensor.to(device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Condition:
        return replace(
            self,
            lr_image=change(self.lr_image),
            upsampled=change(self.upsampled),
            prompt_embeds=change(self.prompt_embeds),
            pooled_embeds=None if self.pooled_embeds is None else change(self.pooled_embeds),
        )


class Generator(ABC):
    """A network LR -> SR in one pass, split where alignment needs to reach in.

    `decode(predict(encode(prepare(lr_image))))` with `postprocess` behind it is the whole generator. Latents and
    images are float32 whatever the networks compute in.

    Attributes:
        scale: Enlargement factor; the SR image is exactly `scale` times the LR image.
        denoiser: The module that a Trainer prepares. Its parameters are trained; everything else is frozen.
    """

    scale: int
    denoiser: nn.Module
    _reference: nn.Module | None = None

    @property
    def size_multiple(self) -> int:
        """SR pixels to a multiple of which an image is padded, and on which tiles begin: its grid of latents."""
        return self.scale

    @property
    def color_fix(self) -> str:
        """Which of `COLOR_FIXES` `postprocess` applies; tiles are fixed by it as a whole."""
        return "none"

    @property
    def takes_noise(self) -> bool:
        """Whether `predict` takes input noise."""
        return False

    @property
    def takes_prompts(self) -> bool:
        """Whether `prepare` takes a text for each image."""
        return False

    @abstractmethod
    def prepare(self, lr_image: Float[Tensor, "b 3 h w"], prompts: Sequence[str] | None = None) -> Condition:
        """Enlarges and pads `lr_image` (float in [0, 1]) and gathers what conditions the prediction. No gradient.

        Args:
            lr_image: The LR images.
            prompts: One text per image, for generators with a text encoder; None takes the fixed prompt.
        """

    @abstractmethod
    def encode(self, cond: Condition) -> Tensor:
        """Returns the latent that the prediction starts from, `(b, c, h', w')` float32, without a graph."""

    @abstractmethod
    def predict(
        self, z: Tensor, cond: Condition, noise: Tensor | None = None, *, model: nn.Module | None = None
    ) -> Tensor:
        """Returns the predicted clean latent, float32: the mean of the policy.

        Args:
            z: What `encode` returned, `(b, c, h', w')`.
            cond: The condition of the same `b` samples.
            noise: Input noise in the shape of `z`, only for generators made with input noise.
            model: The prepared (wrapped) denoiser to call instead of `self.denoiser`. It is called exactly once.
        """

    @abstractmethod
    def decode(self, z: Tensor, cond: Condition, *, checkpoint: bool = False) -> Float[Tensor, "b 3 H W"]:
        """Returns the image of a latent, cropped to `cond.size`, not clamped, so that a reward keeps its gradient
        everywhere.

        Args:
            z: Latents, `(b, c, h', w')`.
            cond: The condition of the same `b` samples.
            checkpoint: Recompute the decoder in the backward pass instead of keeping its activations.
        """

    def postprocess(self, image: Float[Tensor, "b 3 H W"], cond: Condition) -> Float[Tensor, "b 3 H W"]:
        """Applies the differentiable colour fix of the deployed path, if the generator has one. Not clamped."""
        return image

    def correction(self, mean: Tensor, z: Tensor, cond: Condition) -> Tensor:
        """Returns what the prediction adds to the upsampled LR image, in the space of the policy: the direction of
        "residual" noise.

        Args:
            mean: What `predict` returned.
            z: What it started from.
            cond: Its condition.
        """
        return mean - z

    def policy(
        self,
        mean: Float[Tensor, "b c h w"],
        *,
        sigma: float,
        noise: str = "lowfreq",
        cell: int = 4,
        direction: Float[Tensor, "b c h w"] | None = None,
    ) -> GaussianLatentPolicy:
        """Returns the Gaussian policy around a predicted latent; see `GaussianLatentPolicy`."""
        return GaussianLatentPolicy(mean, sigma, noise=noise, cell=cell, direction=direction)

    @torch.no_grad()
    def generate(
        self,
        lr_image: Float[Tensor, "b 3 h w"],
        prompts: Sequence[str] | None = None,
        *,
        model: nn.Module | None = None,
    ) -> Float[Tensor, "b 3 H W"]:
        """Runs the deployed path: the policy mean, decoded, colour-fixed and clamped to [0, 1].

        The network runs in eval mode, so that dropout never reaches a deployed or evaluated image; its mode is
        restored.
        """
        network = self.denoiser if model is None else model
        cond = self.prepare(lr_image, prompts)
        with eval_mode(network):
            mean = self.predict(self.encode(cond), cond, model=model)
        return self.postprocess(self.decode(mean, cond), cond).clamp(0, 1)

    def add_policy_adapter(self, lora_config: LoraConfig) -> None:
        """Adds the LoRA adapter "policy" to the denoiser and freezes everything else.

        Raises:
            ConfigError: If there is a policy already, if no layer matches the target modules, or if the config would
                make a reference by switching the adapter off impossible.
        """
        if self.has_policy_adapter:
            raise ConfigError(
                "the generator has a policy adapter already",
                where="peft_config",
                fix="train on from it without a peft_config, or call merge_policy() to start a new adapter on top",
            )
        _check_lora_config(lora_config)
        try:
            self._inject_adapter(copy.deepcopy(lora_config))
        except ValueError as error:
            raise ConfigError(
                f"the LoRA adapter does not fit the denoiser: {error}",
                where="lora_target_modules",
                fix="name layers that exist in the denoiser, for example to_q, to_k, to_v, conv1, conv2",
            ) from error
        self._freeze_all_but_policy()

    @property
    def has_policy_adapter(self) -> bool:
        """Whether the denoiser carries the LoRA adapter "policy"."""
        return next(self._policy_layers(), None) is not None

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the denoiser is the frozen policy.

        With an adapter its scaling is 0 in every layer: exactly the base weights, in place, so it also holds for a DDP
        or DeepSpeed wrapper around the denoiser. (peft's `set_adapter` would flip `requires_grad` under the wrapper.)
        Without one, `self.denoiser` is the frozen copy made by `freeze_reference()`; a wrapper around the trained
        module is not reached, see `reference_mean`.
        """
        if self.has_policy_adapter:
            with _scaled_to_zero(list(self._policy_layers())):
                yield
            return
        trained = self.denoiser
        self.denoiser = self._frozen_copy()
        try:
            yield
        finally:
            self.denoiser = trained

    def freeze_reference(self) -> None:
        """Keeps a frozen copy of the denoiser as it is now, for full fine-tuning. Does nothing when there is an
        adapter.

        Call it before the denoiser is wrapped: a wrapped or partitioned module cannot be copied.
        """
        if not self.has_policy_adapter:
            self._reference = copy.deepcopy(self.denoiser).requires_grad_(False).eval()

    def reference_model(self) -> nn.Module | None:
        """Returns the frozen copy to pass as `model=`, or None with an adapter (then `reference()` is enough)."""
        return None if self.has_policy_adapter else self._reference

    @torch.no_grad()
    def reference_mean(
        self, z: Tensor, cond: Condition, noise: Tensor | None = None, *, model: nn.Module | None = None
    ) -> Tensor:
        """Returns what the frozen policy predicts, float32, no graph; the arguments are those of `predict`.

        With an adapter `model` (or the denoiser) runs once with the adapter off; otherwise the frozen copy runs and
        `model` is ignored.
        """
        if self.has_policy_adapter:
            with self.reference():
                return self.predict(z, cond, noise, model=model)
        return self.predict(z, cond, noise, model=self._frozen_copy())

    def check_dtype(self, dtype: torch.dtype) -> None:  # noqa: B027 (most families compute in any dtype)
        """Raises `ConfigError` if the denoiser cannot be computed in `dtype` without spoiling its output."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of the denoiser that training changes: the adapter's, or all of them."""
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next((parameter.device for parameter in self.denoiser.parameters()), torch.device("cpu"))

    def to(self, device: torch.device | str) -> Self:
        """Moves every network and stored tensor to `device`, in place, and returns the generator."""
        self.denoiser.to(device)
        if self._reference is not None:
            self._reference.to(device)
        return self

    @abstractmethod
    def save_pretrained(self, folder: str | PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes the generator to `folder`.

        Args:
            folder: Where to write; made if missing. Atomic replacement is the caller's business (stage, then rename).
            state_dict: Weights of the denoiser, keyed as `self.denoiser.state_dict()`, to write instead of its own
                (weights gathered by DeepSpeed, or an average). Keys that are absent come from the denoiser.
        """

    @classmethod
    @abstractmethod
    def from_pretrained(cls, folder: str | PathLike[str], **kwargs: Any) -> Self:
        """Reads what `save_pretrained` wrote. Raises `CheckpointError` for anything missing, corrupt or not
        fitting."""

    @abstractmethod
    def _inject_adapter(self, lora_config: LoraConfig) -> None:
        """Puts the LoRA layers named "policy" into the denoiser."""

    def _policy_layers(self) -> Iterator[LoraLayer]:
        from peft.tuners.lora import LoraLayer

        for module in self.denoiser.modules():
            if isinstance(module, LoraLayer) and POLICY_ADAPTER in module.scaling:
                yield module

    def _freeze_all_but_policy(self) -> None:
        self.denoiser.requires_grad_(False)
        for layer in self._policy_layers():
            for name, parameter in cast(nn.Module, layer).named_parameters():
                if POLICY_ADAPTER in name.split(".") and not name.startswith("base_layer."):
                    parameter.requires_grad_(True)

    def _frozen_copy(self) -> nn.Module:
        if self._reference is None:
            raise ConfigError(
                "there is no reference: the denoiser has no policy adapter and no frozen copy was made",
                where="reference",
                fix="train a LoRA adapter (use_peft), or call freeze_reference() before training",
            )
        return self._reference


def straight_through_clamp(x: Tensor) -> Tensor:
    """Clamps to [0, 1] in the forward pass and passes the gradient on unchanged.

    A plain clamp has no gradient at saturated pixels, so a reward could never bring them back. The forward value is
    exactly the clamped one; an infinite pixel becomes NaN.
    """
    return x.clamp(0, 1).detach() + (x - x.detach())


def pad_to_multiple(image: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c H W"]:
    """Pads at the bottom and the right until both sides are multiples of `multiple`.

    By reflection, which keeps the texture statistics that group norms see; by repetition where the image is too small
    to reflect.
    """
    height, width = image.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if not (bottom or right):
        return image
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(image, (0, right, 0, bottom), mode=mode)


def check_lr_image(lr_image: Tensor) -> None:
    """Raises `DataError` unless `lr_image` is a float batch `(b, 3, h, w)`."""
    if lr_image.ndim != 4 or lr_image.shape[1] != 3 or lr_image.numel() == 0:
        raise DataError(
            f"a batch of LR images must have the shape (b, 3, h, w), not {tuple(lr_image.shape)}",
            where="lr_image",
            fix="stack RGB images of one size; for images of different sizes call the generator once per image",
        )
    if not lr_image.is_floating_point():
        raise DataError(
            f"LR images must be floating point in [0, 1], not {lr_image.dtype}",
            where="lr_image",
            fix="convert with refreward_trl.data.images.to_float",
        )


def floating_dtype(module: nn.Module) -> torch.dtype:
    """Returns the dtype of the first floating point parameter, float32 for a module without any."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, `module` is in eval mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def _scaled_to_zero(layers: list[LoraLayer]) -> Iterator[None]:
    scalings = [layer.scaling[POLICY_ADAPTER] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[POLICY_ADAPTER] = 0.0
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling[POLICY_ADAPTER] = scaling


def _check_lora_config(config: LoraConfig) -> None:
    """Refuses options that change the network outside the scaled LoRA path: scaling 0 would no longer be the
    reference."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"the policy adapter must be a LoraConfig, not {type(config).__name__}",
            where="peft_config",
            fix="use peft.LoraConfig, or fine-tune all weights",
        )
    offending = {
        "use_dora": config.use_dora,
        "bias": config.bias != "none",
        "modules_to_save": bool(config.modules_to_save),
        "init_lora_weights": config.init_lora_weights not in (True, False, "gaussian"),
    }
    for option in (name for name, bad in offending.items() if bad):
        raise ConfigError(
            f"{option} changes the denoiser outside the LoRA path: without the adapter it is not the reference",
            where=f"peft_config.{option}",
            fix="leave it at its default, or fine-tune all weights with a frozen copy as reference",
        )
