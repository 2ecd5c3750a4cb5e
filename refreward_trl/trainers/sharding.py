"""Weights that DeepSpeed ZeRO-3 has split over the ranks: whole for a moment, or looked at piece by piece.

Between two forward passes a rank holds no weights but its own shards, so that reading or writing a parameter as usual
would see an empty tensor. Everything here works on ordinary parameters too, and then does nothing special.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def keep_new_networks_whole() -> None:
    """Stops transformers from sharding what is built or loaded from now on.

    As soon as it knows of ZeRO-3 it shards every network of its own classes: a judge or a teacher too, whose weights
    nobody would ever gather. Only what a Trainer prepares is to be sharded, and DeepSpeed does that by itself.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def is_sharded(parameter: Tensor) -> bool:
    """Whether ZeRO-3 manages the parameter."""
    return hasattr(parameter, "ds_status")


@contextmanager
def whole(parameters: Iterable[nn.Parameter], *, write: bool = False) -> Iterator[None]:
    """Inside, the parameters are whole on every rank; a collective call.

    Args:
        parameters: Sharded or not.
        write: Keep what rank 0 writes to them inside. All ranks must write the same.
    """
    sharded = [parameter for parameter in parameters if is_sharded(parameter)]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


def own_shards(module: nn.Module) -> dict[str, Tensor]:
    """Returns this rank's pieces of the trained parameters by name; empty where nothing is sharded."""
    shards: dict[str, Any] = {
        name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    return {name: parameter.ds_tensor for name, parameter in shards.items() if is_sharded(parameter)}
