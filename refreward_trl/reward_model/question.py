"""A judge's question as tokens, and the whole input of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from refreward_trl.errors import CheckpointError
from refreward_trl.resampling import upscale
from refreward_trl.reward_model.chat_template import render_question
from refreward_trl.reward_model.families import JudgeFamily
from refreward_trl.reward_model.preprocess import image_scale
from refreward_trl.reward_model.spec import JudgeSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class JudgePrompt:
    """Token ids of a question, with room for the vision tokens.

    The text is rendered once by the tokenizer's own chat template, images first and in order, with one placeholder per
    image or clip; each is then replaced by as many tokens as the pixel grid needs.

    Args:
        tokenizer: The judge's tokenizer, with a chat template.
        family: The judge's family.
        text: The question.
        visuals: How many images or clips it is about.

    Raises:
        CheckpointError: No chat template, one that cannot be used, or one that does not write the placeholders.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: JudgeFamily, text: str, *, visuals: int) -> None:
        if tokenizer.chat_template is None:
            raise CheckpointError("the judge's tokenizer has no chat template", fix="save chat_template.jinja with it")
        self.family = family
        kind = "video" if family.spec.layout == "clip" else "image"
        content = [*({"type": kind} for _ in range(visuals)), {"type": "text", "text": text}]
        rendered = render_question(tokenizer, [{"role": "user", "content": content}])
        self.ends_open = rendered[-1:].isspace()
        self._ids: list[int] = tokenizer(rendered, add_special_tokens=False).input_ids
        if self._ids.count(family.placeholder_id) != visuals:
            raise CheckpointError(
                f"the chat template gave {self._ids.count(family.placeholder_id)} {family.placeholder} tokens"
                f" for a question about {visuals} {kind}s",
                fix="use the chat template that the judge was trained with",
            )

    def input_ids(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Returns the ids of one row that shows visuals of these (height, width)."""
        row: list[int] = []
        visuals = iter(sizes)
        for token in self._ids:
            row.extend(self.family.visual_ids(*next(visuals)) if token == self.family.placeholder_id else [token])
        return row

    def shared_length(self, *sizes: tuple[int, int]) -> int:
        """Returns how many tokens come before the visual that follows visuals of these sizes.

        After the LR image's alone, all candidates share them; after the first candidate's too, all that are compared
        with it do.
        """
        places = [index for index, token in enumerate(self._ids) if token == self.family.placeholder_id]
        return places[len(sizes)] + sum(len(self.family.visual_ids(*size)) - 1 for size in sizes)

    def token_inputs(self, visuals: Sequence[Tensor]) -> dict[str, Tensor]:
        """Returns what a forward pass over visuals, as `JudgeFamily` describes them, wants to know of its tokens."""
        ids = torch.tensor(self.input_ids(sizes_of(visuals)), device=visuals[0].device).expand(len(visuals[0]), -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.family.token_inputs(ids)


def check_layout(spec: JudgeSpec) -> None:
    """Raises `CheckpointError` for a judge that cannot be shown two candidates: a patch of a clip spans two frames."""
    if spec.layout == "clip":
        raise CheckpointError(
            f"the judge {spec.name!r} sees LR and SR image as a clip, with no place for a second candidate",
            where="judge_spec.json",
            fix="ask it to rate, or use a judge with layout 'images'",
        )


def sizes_of(visuals: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Returns (height, width) of each visual."""
    return [(visual.shape[-2], visual.shape[-1]) for visual in visuals]


def shown_visuals(
    lr_image: Float[Tensor, "b 3 h w"], sr_images: Sequence[Float[Tensor, "b 3 H W"]], spec: JudgeSpec
) -> list[Tensor]:
    """Returns what a judge is shown: the LR image, enlarged or as it is, and the candidates; or one clip.

    Raises:
        DataError: Sizes that do not fit each other.
    """
    for sr_image in sr_images:
        scale = image_scale(lr_image, sr_image)
    shown = upscale(lr_image, scale) if scale > 1 and spec.lr_view == "upsampled" else lr_image
    if spec.layout == "clip":
        return [torch.stack([shown, *sr_images], dim=1)]
    return [shown, *sr_images]
