"""The networks that can be judges: how each takes pixels and where it wants its images in the text.

A family builds the keyword arguments of its stock class from tensors, so that gradients reach the pixels. What it
builds equals what the stock processor of the family builds from the same pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from refreward_trl.errors import CheckpointError, DataError
from refreward_trl.reward_model.preprocess import normalize, patchify
from refreward_trl.reward_model.spec import JudgeSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"


class JudgeFamily(ABC):
    """How a family of stock classes sees images.

    A visual is a batch of still images `(b, 3, H, W)` or of clips `(b, t, 3, H, W)`, float pixels in [0, 1]. All rows
    of a batch show visuals of the same sizes.

    Args:
        config: Configuration of the network.
        tokenizer: Its tokenizer.
        spec: The judge's spec.

    Raises:
        CheckpointError: They do not belong together.
    """

    square = False
    """Whether every image must be a square of `spec.tile` pixels."""

    def __init__(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, spec: JudgeSpec) -> None:
        self.config: Any = config
        self.spec = spec
        self._check(spec)
        self.placeholder_id = single_token_id(tokenizer, self.placeholder)
        if self.placeholder_id != self._expected_placeholder_id:
            raise CheckpointError(
                f"{self.placeholder} has id {self.placeholder_id} in the tokenizer and "
                f"{self._expected_placeholder_id} in the model",
                where="judge tokenizer",
                fix="use the tokenizer saved with the model",
            )

    @property
    @abstractmethod
    def placeholder(self) -> str:
        """The token that the chat template writes for an image or clip."""

    @property
    @abstractmethod
    def patch_and_merge(self) -> tuple[int, int]:
        """Side of a vision patch in pixels, and patches per side that become one token."""

    @abstractmethod
    def visual_ids(self, height: int, width: int) -> list[int]:
        """Returns the token ids that stand in the text for one visual of this size."""

    @abstractmethod
    def pixel_inputs(self, visuals: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns pixels and what describes them, for rows that show one image of each visual, in this order."""

    def token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Returns what else the class wants to know about the tokens `(b, tokens)`."""
        return {}

    def positions(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor | None:
        """Returns rotary positions `(3, 1, tokens)` of a batch of one, or None where the class counts tokens."""
        return None

    @property
    def _expected_placeholder_id(self) -> int:
        return self.config.image_token_id

    def _check(self, spec: JudgeSpec) -> None:
        patch, merge = self.patch_and_merge
        if (patch, merge) != (spec.patch, spec.merge):
            raise CheckpointError(
                f"the spec says patch {spec.patch}, merge {spec.merge}; the model has patch {patch}, merge {merge}",
                where="judge_spec.json",
                fix="use the spec saved with the model",
            )
        if spec.layout == "clip" and self.placeholder != VIDEO_TOKEN:
            raise CheckpointError(
                f"a {self.config.model_type} network cannot read LR and SR as the frames of one clip",
                where="judge_spec.json",
                fix="use layout 'images'",
            )


class QwenFamily(JudgeFamily):
    """Qwen2.5-VL and Qwen3-VL: images of any size on the patch grid, packed into rows of patches."""

    @property
    def placeholder(self) -> str:
        # Qwen3-VL splits clips into single frames with time stamps: there LR and SR would not meet in a patch.
        clip = self.spec.layout == "clip" and self.config.model_type == "qwen2_5_vl"
        return VIDEO_TOKEN if clip else IMAGE_TOKEN

    @property
    def patch_and_merge(self) -> tuple[int, int]:
        vision = self.config.vision_config
        return vision.patch_size, vision.spatial_merge_size

    @property
    def _expected_placeholder_id(self) -> int:
        clip = self.placeholder == VIDEO_TOKEN
        return self.config.video_token_id if clip else self.config.image_token_id

    def visual_ids(self, height: int, width: int) -> list[int]:
        return [self.placeholder_id] * (height * width // self.spec.pixel_multiple**2)

    def pixel_inputs(self, visuals: Sequence[Tensor]) -> dict[str, Tensor]:
        patch, merge = self.spec.patch, self.spec.merge
        rows, grids = [], []
        for visual in visuals:
            frames = normalize(visual, self.spec)
            if frames.ndim == 4:  # a still image fills both frames of the temporal patch
                frames = frames[:, None].expand(-1, 2, -1, -1, -1)
            batch, height, width = len(frames), frames.shape[-2], frames.shape[-1]
            rows.append(patchify(frames, patch, merge).view(batch, -1, 3 * frames.shape[1] * patch**2))
            grid = torch.tensor([1, height // patch, width // patch], device=frames.device)
            grids.append(grid.expand(batch, -1))
        # The images of one row follow each other.
        pixels = torch.cat(rows, dim=1).flatten(0, 1)
        grid_thw = torch.stack(grids, dim=1).flatten(0, 1)
        if self.placeholder != VIDEO_TOKEN:
            return {"pixel_values": pixels, "image_grid_thw": grid_thw}
        # Without second_per_grid_ts, transformers 5.23 fills it with one entry per token of a row, and a batch with
        # more clips than tokens per row dies of StopIteration.
        seconds = torch.ones(len(grid_thw), device=pixels.device)
        return {"pixel_values_videos": pixels, "video_grid_thw": grid_thw, "second_per_grid_ts": seconds}

    def token_inputs(self, input_ids: Tensor) -> dict[str, Tensor]:
        kind = 2 if self.placeholder == VIDEO_TOKEN else 1  # 0 is text
        return {"mm_token_type_ids": (input_ids == self.placeholder_id).int() * kind}

    def positions(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        network: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
        return network.model.get_rope_index(**{name: inputs[name] for name in wanted if name in inputs})[0]


class Idefics3Family(JudgeFamily):
    """Idefics3 and SmolVLM: square images of one size, not split, as stacked pixels."""

    square = True

    def __init__(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, spec: JudgeSpec) -> None:
        super().__init__(config, tokenizer, spec)
        self._around = single_token_id(tokenizer, "<fake_token_around_image>")
        self._whole = single_token_id(tokenizer, "<global-img>")

    @property
    def placeholder(self) -> str:
        return "<image>"

    @property
    def patch_and_merge(self) -> tuple[int, int]:
        return self.config.vision_config.patch_size, self.config.scale_factor

    def visual_ids(self, height: int, width: int) -> list[int]:
        tokens = height * width // self.spec.pixel_multiple**2
        return [self._around, self._whole, *[self.placeholder_id] * tokens, self._around]

    def pixel_inputs(self, visuals: Sequence[Tensor]) -> dict[str, Tensor]:
        tile = self.spec.tile
        if wrong := [visual.shape for visual in visuals if visual.shape[-2:] != (tile, tile)]:
            raise DataError(
                f"an image of {wrong[0][-2]}x{wrong[0][-1]} pixels, this judge needs {tile}x{tile}",
                where="judge input",
                fix="pad or crop the image; `rate` does so",
            )
        pixels = normalize(torch.stack(list(visuals), dim=1), self.spec)
        # The stock class takes an image of zeros for padding and drops it; a plain grey one normalises to zeros.
        empty = (pixels == 0).flatten(2).all(dim=2)[..., None, None, None]
        return {"pixel_values": torch.where(empty, torch.full_like(pixels, 1e-6), pixels)}

    def _check(self, spec: JudgeSpec) -> None:
        super()._check(spec)
        if spec.lr_view != "upsampled":
            raise CheckpointError(
                f"a {self.config.model_type} network takes images of one size only",
                where="judge_spec.json",
                fix="use lr_view 'upsampled'",
            )


FAMILIES: dict[str, type[JudgeFamily]] = {
    "qwen2_5_vl": QwenFamily,
    "qwen3_vl": QwenFamily,
    "idefics3": Idefics3Family,
    "smolvlm": Idefics3Family,
}
"""Families by the `model_type` of their configuration."""


def judge_family(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, spec: JudgeSpec) -> JudgeFamily:
    """Returns the family of a network.

    Raises:
        CheckpointError: A class that cannot be a judge, or parts that do not belong together.
    """
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"a network of type {config.model_type!r} cannot be a judge",
            where="config.json",
            fix=f"use one of: {', '.join(FAMILIES)}",
        )
    return FAMILIES[config.model_type](config, tokenizer, spec)


def single_token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Returns the id of `token`, which must be exactly one known token.

    Raises:
        CheckpointError: The tokenizer splits the token or does not know it.
    """
    ids = tokenizer(token, add_special_tokens=False).input_ids
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise CheckpointError(
            f"{token!r} is not one token of the judge's tokenizer (it gives ids {ids})",
            where="judge tokenizer",
            fix="use the tokenizer saved with the judge, or rating tokens that it knows",
        )
    return ids[0]
