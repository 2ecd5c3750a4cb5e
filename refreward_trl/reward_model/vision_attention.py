"""Vision attention over all images of a batch in one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers hands the packed sequence of all images to an attention function whose name contains "flash", and loops
# over images in Python for every other one.
_BATCHED_ATTENTION = "refreward_batched_flash"


def _batched_packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads s d"],
    key: Float[Tensor, "1 heads s d"],
    value: Float[Tensor, "1 heads s d"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 s heads d"], None]:
    """Full attention inside each segment of a packed sequence: one call when all segments have the same length."""
    count = len(cu_seq_lens_q) - 1
    if count * max_length_q != query.shape[2]:
        lengths = (cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist()
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
        outputs = [F.scaled_dot_product_attention(q, k, v, scale=scaling) for q, k, v in parts]
        return torch.cat(outputs, dim=2).transpose(1, 2), None
    q, k, v = (tensor[0].unflatten(1, (count, max_length_q)).transpose(0, 1) for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(q, k, v, scale=scaling)
    return output.transpose(1, 2).flatten(0, 1)[None], None


AttentionInterface.register(_BATCHED_ATTENTION, _batched_packed_attention)


@contextmanager
def batched_vision_attention(model: PreTrainedModel | None) -> Iterator[None]:
    """Inside, the vision tower attends to all images of a batch in one call instead of one call per image.

    The maths is that of the stock path. It applies to models whose vision tower runs on `"sdpa"`; others (for example
    with a real flash-attention kernel) are left as they are.

    Args:
        model: A model of a Qwen-VL family; None and other families, whose images are stacked anyway, do nothing.
    """
    if model is None or not _packs_images(model.config):
        yield
        return
    model.set_attn_implementation({"vision_config": _BATCHED_ATTENTION})
    try:
        yield
    finally:
        model.set_attn_implementation({"vision_config": "sdpa"})


def _packs_images(config: Any) -> bool:
    return config.model_type in ("qwen2_5_vl", "qwen3_vl") and config.vision_config._attn_implementation == "sdpa"
