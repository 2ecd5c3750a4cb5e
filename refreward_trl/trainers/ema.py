"""An exponential moving average of the trained weights, which is what is evaluated and saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from refreward_trl.errors import CheckpointError
from refreward_trl.trainers.sharding import whole


class WeightAverage:
    """Float32 shadow of the trainable parameters of a module: `shadow = decay * shadow + (1 - decay) * weights`.

    Every rank keeps the whole shadow, also where ZeRO-3 shards the weights: adapters are small.

    Args:
        module: The bare (unwrapped) module; the shadow starts as a copy of its trainable parameters.
        decay: Between 0 and 1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._shadow = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes up the current weights; call it after each optimizer step, on all ranks."""
        with whole(self._parameters.values()):
            for name, parameter in self._parameters.items():
                self._shadow[name].lerp_(parameter.detach().float().to(self._shadow[name].device), 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights; its own come back whatever happens."""
        with whole(self._parameters.values()):
            own = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._copy_to_module(self._shadow)
            yield
        finally:
            self._copy_to_module(own)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the shadow by parameter name, on the CPU."""
        return {name: tensor.cpu().contiguous() for name, tensor in self._shadow.items()}

    def load_state_dict(self, state: Mapping[str, Tensor], where: str) -> None:
        """Restores the shadow.

        Raises:
            CheckpointError: If names or shapes are not those of the module's trainable parameters.
        """
        for name in sorted(self._shadow.keys() ^ state.keys()):
            raise CheckpointError(
                f"the weight average and the model disagree about {name}",
                where=where,
                fix="resume with the same adapter settings as the run that wrote the checkpoint",
            )
        for name, tensor in state.items():
            if tensor.shape != self._shadow[name].shape:
                raise CheckpointError(
                    f"{name} has shape {tuple(tensor.shape)}, the model's {tuple(self._shadow[name].shape)}",
                    where=where,
                )
            self._shadow[name].copy_(tensor)

    @torch.no_grad()
    def _copy_to_module(self, weights: Mapping[str, Tensor]) -> None:
        with whole(self._parameters.values(), write=True):
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])


class WeightAverageCallback(TrainerCallback):
    """Updates a `WeightAverage` after every optimizer step."""

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update()
