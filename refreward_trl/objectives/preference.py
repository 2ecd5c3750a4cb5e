"""Ranking losses that teach a reward model the order of the candidates of one LR image.

Ranks: lower is better, equal ranks are a tie and teach nothing about each other, a negative rank means "ignore this
    candidate". Each
group counts the same however many pairs it has, and a group without a usable pair counts 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.types import LossOutput

_LEAST = 1e-7
"""Probabilities stay this far from 0 and 1, where a square root has no slope."""


def pairs_from_ranks(ranks: Int[Tensor, "g k"]) -> Int[Tensor, "p 2"]:
    """Returns every ordered pair (better, worse) as indices into the flattened score matrix.

    Args:
        ranks: `(groups, candidates)`, lower is better, ties give no pair, negative is ignored.
    """
    group, better, worse = _beats(ranks).nonzero(as_tuple=True)
    start = group * ranks.shape[1]
    return torch.stack([start + better, start + worse], dim=1)


def pairwise_loss(
    scores: Float[Tensor, "g k"],
    better: Int[Tensor, "p 2"],
    *,
    targets: Float[Tensor, " p"] | None = None,
    weights: Float[Tensor, " p"] | None = None,
    margins: Float[Tensor, " p"] | None = None,
    temperature: Float[Tensor, ""] | float = 1.0,
) -> LossOutput:
    """Returns the Bradley-Terry loss: cross entropy of `sigmoid((score of better - score of worse) / temperature)`.

    Averaged over the pairs of a group, then over groups.

    Args:
        scores: `(groups, candidates)` with their graph; pairs with a NaN score are left out.
        better: `(pairs, 2)`, indices (better, worse) into `scores.flatten()`; see `pairs_from_ranks`.
        targets: Probability that the first of each pair is the better one: 1 (the default), or 0.5 for a tie.
        weights: One per pair, for instance the share of raters who agree; not renormalised.
        margins: By how much, in units of the score, the better one has to lead; TRL's `margin`.
        temperature: Above 0; may be learnable (pass `log_temperature.exp()`).

    Returns:
        The loss with metrics `accuracy` (over ordered pairs; equal scores count one half), `margin` (in units of the
        score) and `mean_reward`.

    Raises:
        DataError: If a pair joins candidates of two groups.
    """
    pairs = _score_pairs(scores, better, targets)
    lead = pairs.difference if margins is None else pairs.difference - margins.detach()
    lead = lead / temperature
    loss = pairs.target * F.softplus(-lead) + (1 - pairs.target) * F.softplus(lead)
    return pairs.output(loss, weights)


def fidelity_loss(
    scores: Float[Tensor, "g k"],
    better: Int[Tensor, "p 2"],
    *,
    targets: Float[Tensor, " p"] | None = None,
    weights: Float[Tensor, " p"] | None = None,
    temperature: Float[Tensor, ""] | float = 1.0,
) -> LossOutput:
    """Returns Thurstone's model under the fidelity loss: `1 - sqrt(p g) - sqrt((1 - p)(1 - g))`.

    `p = Phi((score of better - score of worse) / (sqrt(2) temperature))` is the probability that the first one is
    better if every score has a normal error of standard deviation `temperature` (Thurstone's case V), `g` the target.
    Bounded, so that one mislabelled pair cannot rule a batch (Tsai et al., FRank, 2007; Zhang et al., UNIQUE, 2021).

    Args: As in `pairwise_loss`. Returns: As `pairwise_loss`. Raises: As `pairwise_loss`.
    """
    pairs = _score_pairs(scores, better, targets)
    likely = torch.special.ndtr(pairs.difference / (math.sqrt(2) * temperature)).clamp(_LEAST, 1 - _LEAST)
    # Not the root of the product: it has no slope where the target is 0 or 1.
    overlap = likely.sqrt() * pairs.target.sqrt() + (1 - likely).sqrt() * (1 - pairs.target).sqrt()
    return pairs.output(1 - overlap, weights)


def listwise_loss(
    scores: Float[Tensor, "g k"], ranks: Int[Tensor, "g k"], *, temperature: Float[Tensor, ""] | float = 1.0
) -> LossOutput:
    """Returns the Plackett-Luce loss: each candidate is chosen over all that rank below it.

    The likelihood of an order is the product, from the best down, of the softmax of a candidate among itself and those
    below it. Tied candidates do not compete with each other. Averaged over the choices of a group, then over groups,
    so with two candidates it is the pairwise loss.

    Args:
        scores: `(groups, candidates)` with their graph; candidates with a NaN score are left out.
        ranks: `(groups, candidates)`, lower is better, ties allowed, negative is ignored.
        temperature: As in `pairwise_loss`.

    Returns:
        The loss with the metrics of `pairwise_loss`, over all pairs that the ranks order.
    """
    scores = scores.float()
    scored = scores.isfinite()
    beats = _beats(ranks.masked_fill(~scored, -1))
    logits = scores.masked_fill(~scored, 0.0) / temperature
    rivals = beats | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    chosen_among = logits[:, None, :].expand_as(rivals).masked_fill(~rivals, -torch.inf).logsumexp(-1)
    is_choice = beats.any(-1)
    per_choice = (chosen_among - logits).masked_fill(~is_choice, 0.0)
    loss = (per_choice.sum(1) / is_choice.sum(1).clamp(min=1)).mean()
    margins = (scores[:, :, None] - scores[:, None, :])[beats]
    return LossOutput(loss=loss, metrics=_metrics(scores.flatten(), margins))


def centering_penalty(scores: Float[Tensor, "g k"]) -> Float[Tensor, ""]:
    """Returns the mean squared group mean, which keeps scores around 0: a ranking loss alone leaves their level
    free."""
    scores = scores.float()
    scored = scores.isfinite()
    mean = scores.masked_fill(~scored, 0.0).sum(1) / scored.sum(1).clamp(min=1)
    return mean.square().mean()


def _beats(ranks: Tensor) -> Bool[Tensor, "g k k"]:
    ranked = ranks >= 0
    lower = ranks[:, :, None] < ranks[:, None, :]
    return lower & ranked[:, :, None] & ranked[:, None, :]


@dataclass(frozen=True)
class _Pairs:
    """Pairs of candidates with their scores.

    Attributes:
        scores: All scores `(g k,)`.
        groups: Number of groups.
        group: Group of each pair `(p,)`.
        difference: Score of the first less that of the second `(p,)`; 0 where one of them is NaN.
        usable: Whether both have a score `(p,)`.
        target: Probability that the first is better `(p,)`.
    """

    scores: Tensor
    groups: int
    group: Tensor
    difference: Tensor
    usable: Tensor
    target: Tensor

    def output(self, loss: Tensor, weights: Tensor | None) -> LossOutput:
        """Averages a loss per pair over the pairs of each group, then over groups."""
        loss = loss.masked_fill(~self.usable, 0.0)
        if weights is not None:
            loss = loss * weights.detach().float()
        total = self.scores.new_zeros(self.groups).index_add(0, self.group, loss)
        count = self.scores.new_zeros(self.groups).index_add(0, self.group, self.usable.float())
        ordered = self.usable & (self.target == 1)
        return LossOutput(
            loss=(total / count.clamp(min=1)).mean(), metrics=_metrics(self.scores, self.difference[ordered])
        )


def _score_pairs(scores: Tensor, better: Tensor, targets: Tensor | None) -> _Pairs:
    groups, candidates = scores.shape
    group = better[:, 0] // candidates
    if (group != better[:, 1] // candidates).any():
        raise DataError(
            "a preference pair joins candidates of two LR images",
            where="better",
            fix="index pairs within one row of the score matrix, as pairs_from_ranks does",
        )
    flat = scores.float().flatten()
    difference = flat[better[:, 0]] - flat[better[:, 1]]
    usable = difference.isfinite()
    target = torch.ones_like(difference) if targets is None else targets.detach().to(difference)
    return _Pairs(flat, groups, group, difference.masked_fill(~usable, 0.0), usable, target)


def _metrics(scores: Tensor, margins: Tensor) -> dict[str, Tensor | float]:
    scores, margins = scores.detach(), margins.detach()
    return {
        "accuracy": ((margins > 0).float() + 0.5 * (margins == 0).float()).mean(),
        "margin": margins.mean(),
        "mean_reward": scores[scores.isfinite()].mean(),
    }
