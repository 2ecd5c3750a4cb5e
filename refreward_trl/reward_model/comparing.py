"""Asking a judge which of two candidates is better: both orders are asked, so the answer is antisymmetric."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refreward_trl.errors import CheckpointError
from refreward_trl.reward_model.families import single_token_id
from refreward_trl.reward_model.group_scoring import choose_with_shared_prefix
from refreward_trl.reward_model.judge import SPEC_FILE, MLLMJudge
from refreward_trl.reward_model.preprocess import check_same_size, split_tiles
from refreward_trl.reward_model.question import JudgePrompt, check_layout, shown_visuals
from refreward_trl.reward_model.spec import JudgeSpec
from refreward_trl.reward_model.vision_attention import batched_vision_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class CompareJudge(MLLMJudge):
    """A judge that sees an LR image and two candidates, and says which is better.

    See `MLLMJudge` for the arguments.

    Raises:
        CheckpointError: The spec has no `compare_prompt`, or the layout "clip".
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: JudgeSpec, **limits: Any
    ) -> None:
        super().__init__(model, tokenizer, spec, **limits)
        if not spec.compare_prompt:
            raise CheckpointError(
                f"the judge {spec.name!r} was not made to compare: it has no compare_prompt",
                where=SPEC_FILE,
                fix="ask it to rate, or give a spec with compare_prompt and choice_tokens",
            )
        check_layout(spec)
        self.prompt = JudgePrompt(tokenizer, self.family, spec.compare_prompt, visuals=3)
        self.choice_ids = torch.tensor([single_token_id(tokenizer, token) for token in spec.choice_tokens])

    def choice_logits(
        self,
        lr_image: Float[Tensor, "b 3 h w"],
        first: Float[Tensor, "b 3 H W"],
        second: Float[Tensor, "b 3 H W"],
        *,
        model: nn.Module | None = None,
    ) -> Float[Tensor, "b 2"]:
        """Returns the logits of the two choices, asked in this order only; one tile per row.

        Args:
            lr_image: float pixels in [0, 1].
            first, second: float pixels in [0, 1]; sides multiples of `spec.pixel_multiple`.
            model: The module to call instead of `self.model`.
        """
        visuals = shown_visuals(lr_image, [first, second], self.spec)
        return self.answer_logits(self.prompt, visuals, self.choice_ids, model=model)

    def compare(
        self,
        lr_image: Float[Tensor, "b 3 h w"],
        first: Float[Tensor, "b 3 H W"],
        second: Float[Tensor, "b 3 H W"],
    ) -> Float[Tensor, " b"]:
        """Returns the log odds that `first` is the better one, the mean over tiles and both orders.

        `compare(lr, a, b) == -compare(lr, b, a)` whatever the judge prefers by position. A graph reaches the pixels of
        a candidate that requires grad.

        Raises:
            DataError: Sizes that do not fit each other.
        """
        forward, backward = self.compare_orders(lr_image, first, second)
        return (forward - backward) / 2

    def compare_orders(
        self,
        lr_image: Float[Tensor, "b 3 h w"],
        first: Float[Tensor, "b 3 H W"],
        second: Float[Tensor, "b 3 H W"],
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Returns the log odds that the candidate shown first is the better one, mean over tiles: with `first` shown
        first, and with `second` shown first. A judge that does not mind the order gives one the negative of the other.

        See `compare` for the arguments, gradients and errors.
        """
        check_same_size(first, second)
        wants_graph = first.requires_grad or second.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and wants_graph), batched_vision_attention(self.model):
            lr_tiles, first_tiles, count = self._tiles(lr_image, first)
            second_tiles = self._tiles(lr_image, second)[1]
            visuals = shown_visuals(lr_tiles[:1].detach(), [first_tiles[:1].detach()] * 2, self.spec)
            rows = max(1, self.rows_per_forward(self.prompt, visuals) // 2)
            parts = zip(lr_tiles.split(rows), first_tiles.split(rows), second_tiles.split(rows), strict=True)
            odds = torch.cat([self._both_orders(*part) for part in parts], dim=1)
            forward, backward = odds.view(2, -1, count).mean(dim=2).to(first.device)
            return forward, backward

    def choose_group(
        self, lr_image: Float[Tensor, "3 h w"], candidates: Float[Tensor, "k 3 H W"]
    ) -> Float[Tensor, "k k"]:
        """Returns all answers about the K candidates of one LR image: entry (i, j) is the log odds that i is better,
        asked with i shown first and j second; 0 on the diagonal.

        As `compare_orders` of every pair, but the LR image runs once, and each candidate once as the first one. No
        graph.

        Raises:
            DataError: Sizes that do not fit each other.
        """
        count = len(candidates)
        with torch.no_grad():
            lr_tiles, tiles, per_image = self._tiles(lr_image.expand(count, -1, -1, -1), candidates)
            tiles = tiles.view(count, per_image, *tiles.shape[1:])
            with batched_vision_attention(self.model):
                return choose_with_shared_prefix(self, lr_tiles[:per_image], tiles).to(candidates.device)

    def win_rates(self, lr_image: Float[Tensor, "3 h w"], candidates: Float[Tensor, "k 3 H W"]) -> Float[Tensor, " k"]:
        """Returns for each candidate of one LR image its mean probability of being better than each of the others."""
        table = self.choose_group(lr_image, candidates)
        wins = ((table - table.T) / 2).sigmoid()
        return (wins.sum(dim=1) - 0.5) / max(1, len(candidates) - 1)

    def _both_orders(self, lr_image: Tensor, first: Tensor, second: Tensor) -> Float[Tensor, "2 b"]:
        logits = self.choice_logits(
            torch.cat([lr_image, lr_image]), torch.cat([first, second]), torch.cat([second, first])
        )
        return (logits[:, 0] - logits[:, 1]).view(2, -1)

    def _tiles(self, lr_image: Tensor, sr_image: Tensor) -> tuple[Tensor, Tensor, int]:
        device = self.device
        return split_tiles(lr_image.to(device), sr_image.to(device), self.spec, square=self.family.square)
