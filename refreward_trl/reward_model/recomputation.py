"""A gradient of a judge in little memory: the backward pass computes its blocks again, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from refreward_trl.reward_model.vision_attention import batched_vision_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def recomputed_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a forward of a frozen network keeps the inputs of its blocks alone, vision tower included.

    The gradient is the same to the bit, for one more forward pass. Forwards inside must not use a key/value cache,
    which a second computation would fill twice.

    transformers checkpoints blocks in train mode only. Here the blocks alone are told that they are, and only for this
    forward: what is in them, dropout above all, stays in eval mode.

    Args:
        model: The network of a judge, in eval mode.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), batched_vision_attention(model)  # of the forward, which stands in it; of the second one

    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    switches = {"training": True, "gradient_checkpointing": True, "_gradient_checkpointing_func": again}
    before = [{name: block.__dict__[name] for name in switches if name in block.__dict__} for block in blocks]
    for block in blocks:
        block.__dict__.update(switches)
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            for name in switches:
                block.__dict__.pop(name)
            block.__dict__.update(own)
