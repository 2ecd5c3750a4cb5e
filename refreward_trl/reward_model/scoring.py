"""Asking a judge for ratings: expected rating at the answer position, differentiable in the SR pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface

from refreward_trl.errors import CheckpointError
from refreward_trl.reward_model.preprocess import JudgePrompt, expected_rating, image_scale, judge_inputs, tile_starts
from refreward_trl.reward_model.spec import JudgeSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPEC_FILE = "judge_spec.json"

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
        model: A model of the Qwen2.5-VL family; None does nothing.
    """
    if model is None or model.config.vision_config._attn_implementation != "sdpa":
        yield
        return
    model.set_attn_implementation({"vision_config": _BATCHED_ATTENTION})
    try:
        yield
    finally:
        model.set_attn_implementation({"vision_config": "sdpa"})


class RateJudge:
    """A judge that rates SR images against their LR images.

    A plain class and not a module on purpose: a trainer that owns it must not register the judge's weights.

    Args:
        model: Network of the Qwen2.5-VL family, for example `Qwen2_5_VLForConditionalGeneration`.
        tokenizer: Its tokenizer, with a chat template.
        spec: The question it was trained with.
        batch_size: Tiles per forward of `rate`.

    Raises:
        CheckpointError: Model, tokenizer and spec do not belong together.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: JudgeSpec, *, batch_size: int = 32
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.spec = spec
        self.batch_size = batch_size
        self.prompt = JudgePrompt(tokenizer, spec)
        _check_parts(model, self.prompt, spec)
        self._rating_ids = torch.tensor(self.prompt.rating_ids)
        self._positions: dict[tuple[int, int], Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the judge computes."""
        return self.model.device

    def to(self, device: torch.device | str) -> RateJudge:
        """Moves the judge; returns itself."""
        self.model.to(device)  # pyright: ignore[reportArgumentType]  (transformers' decorated signature)
        return self

    def rating_logits(
        self,
        lr_image: Float[Tensor, "b 3 h w"],
        sr_image: Float[Tensor, "b 3 H W"],
        *,
        model: nn.Module | None = None,
    ) -> Float[Tensor, "b r"]:
        """Returns the logits of the rating tokens at the answer position, one forward for the whole batch.

        Args:
            lr_image: float pixels in [0, 1].
            sr_image: float pixels in [0, 1]; sides multiples of `spec.pixel_multiple`.
            model: The module to call instead of `self.model`, for example the one a trainer prepared.

        Raises:
            DataError: Sizes that do not fit each other or the patch grid.
        """
        inputs = judge_inputs(lr_image, sr_image, self.spec, self.prompt)
        inputs["position_ids"] = self._position_ids(inputs, sr_image.shape[-2], sr_image.shape[-1])
        module = self.model if model is None else model
        output = module(**inputs, logits_to_keep=1, use_cache=False)
        return output.logits[:, -1, self._rating_ids.to(output.logits.device)].float()

    def expected_rating(
        self,
        lr_image: Float[Tensor, "b 3 h w"],
        sr_image: Float[Tensor, "b 3 H W"],
        *,
        model: nn.Module | None = None,
    ) -> Float[Tensor, " b"]:
        """Returns `spec`'s expected rating of one tile per row; see `rating_logits` for the arguments."""
        return expected_rating(self.rating_logits(lr_image, sr_image, model=model), self.spec)

    def rate(self, lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
        """Rates whole images: the mean rating of tiles that cover them.

        Args:
            lr_image: float pixels in [0, 1].
            sr_image: float pixels in [0, 1], a whole multiple of the LR size. When it requires grad (and gradients are
                enabled) the result has a graph to it; otherwise no graph is built.

        Returns:
            One rating per image within `spec.rating_range`.

        Raises:
            DataError: Sizes that do not fit each other.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and sr_image.requires_grad):
            lr_tiles, sr_tiles, count = split_tiles(lr_image.to(self.device), sr_image.to(self.device), self.spec)
            with batched_vision_attention(self.model):
                ratings = [
                    self.expected_rating(lr_part, sr_part)
                    for lr_part, sr_part in zip(
                        lr_tiles.split(self.batch_size), sr_tiles.split(self.batch_size), strict=True
                    )
                ]
            return torch.cat(ratings).view(-1, count).mean(dim=1).to(sr_image.device)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes a folder that `AutoModelForImageTextToText` and `AutoTokenizer` open, plus `judge_spec.json`.

        Args:
            folder: Where to; made if needed.
            dtype: Precision of the stored weights, for example `torch.float16`; None keeps that of the model.
            state_dict: Weights to write in the place of the model's own, for example gathered from several ranks.
        """
        folder = Path(folder)
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        if dtype is not None:
            state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        # In the config the hash ties the weights to their question, whatever happens to the JSON beside them.
        self.model.config.judge_spec_hash = self.spec.hash
        self.model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
        (folder / SPEC_FILE).write_text(self.spec.to_json() + "\n")

    def _position_ids(self, inputs: dict[str, Tensor], height: int, width: int) -> Tensor:
        """Rotary positions `(3, b, tokens)`: the same for every row, so they are computed for one row and kept."""
        if (height, width) not in self._positions:
            images = 2 if self.spec.layout == "images" else 1
            row = {name: inputs[name][:1] for name in ("input_ids", "mm_token_type_ids")}
            row |= {name: value[:images] for name, value in inputs.items() if name.endswith("_thw")}
            row |= {name: value[:1] for name, value in inputs.items() if name == "second_per_grid_ts"}
            positions, _ = self.model.model.get_rope_index(**row)
            self._positions[height, width] = positions.cpu()
        ids = inputs["input_ids"]
        return self._positions[height, width].to(ids.device).expand(-1, len(ids), -1)


def split_tiles(
    lr_image: Float[Tensor, "b 3 h w"], sr_image: Float[Tensor, "b 3 H W"], spec: JudgeSpec
) -> tuple[Float[Tensor, "n 3 th tw"], Float[Tensor, "n 3 tH tW"], int]:
    """Cuts aligned LR and SR tiles on a regular grid that covers the image, row by row, image after image.

    A side shorter than `spec.tile` is used whole, replicate-padded to the next multiple of the patch grid if need be.
    Tile corners lie on LR pixels.

    Returns:
        LR tiles, SR tiles and the number of tiles per image.

    Raises:
        DataError: The SR size is not a whole multiple of the LR size.
    """
    scale = image_scale(lr_image, sr_image)
    step = math.lcm(spec.pixel_multiple, scale)
    tile = max(spec.tile // step, 1) * step
    sides = [min(tile, math.ceil(side / step) * step) for side in sr_image.shape[-2:]]
    pad = [max(0, side - size) for side, size in zip(sides, sr_image.shape[-2:], strict=True)]
    if any(pad):
        sr_image = F.pad(sr_image, (0, pad[1], 0, pad[0]), mode="replicate")
        lr_image = F.pad(lr_image, (0, pad[1] // scale, 0, pad[0] // scale), mode="replicate")
    corners = [
        (top, left)
        for top in tile_starts(sr_image.shape[-2], sides[0])
        for left in tile_starts(sr_image.shape[-1], sides[1])
    ]
    sr_tiles = [sr_image[..., top : top + sides[0], left : left + sides[1]] for top, left in corners]
    lr_tiles = [
        lr_image[..., top : top + sides[0] // scale, left : left + sides[1] // scale]
        for top, left in ((top // scale, left // scale) for top, left in corners)
    ]
    return torch.stack(lr_tiles, dim=1).flatten(0, 1), torch.stack(sr_tiles, dim=1).flatten(0, 1), len(corners)


def _check_parts(model: PreTrainedModel, prompt: JudgePrompt, spec: JudgeSpec) -> None:
    vision = model.config.vision_config
    if (vision.patch_size, vision.spatial_merge_size) != (spec.patch, spec.merge):
        raise CheckpointError(
            f"the spec says patch {spec.patch}, merge {spec.merge}; "
            f"the model has patch {vision.patch_size}, merge {vision.spatial_merge_size}",
            where=SPEC_FILE,
            fix="use the spec saved with the model",
        )
    expected = model.config.video_token_id if spec.layout == "clip" else model.config.image_token_id
    if prompt.placeholder_id != expected:
        raise CheckpointError(
            f"{prompt.placeholder} has id {prompt.placeholder_id} in the tokenizer and {expected} in the model",
            where="judge tokenizer",
            fix="use the tokenizer saved with the model",
        )
