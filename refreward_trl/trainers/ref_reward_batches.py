"""Preference groups on their way to the judge: collation, ranks, and flips and turns that depend on nothing global."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.randomness import stateless_seed

MISSING = -1
"""Fills up the pairs of a group that has fewer than others, and marks a candidate without a rank."""

_COLUMNS = ("sample_id", "lr_image", "candidates", "better_worse", "kinds")
_PER_PAIR = {"weights": "better_worse", "margins": "better_worse", "tie_weights": "ties"}
"""Optional columns with one number per row of another one, and which."""


class GroupBatch(TypedDict):
    """Stacked preference groups.

    `lr_image` uint8 `(g, 3, h, w)`, `candidates` uint8 `(g, K, 3, H, W)`, `present` bool `(g, K)`: whether the
    candidate is one of the group's, or fills up a group that has fewer than others; `better_worse` int64 `(g, P, 2)`
    and `ties` int64 `(g, T, 2)`, padded with `MISSING`; `weights` and `margins` float `(g, P)`, `tie_weights` float
    `(g, T)`; `kinds` one list of names per group.
    """

    sample_id: list[str]
    lr_image: Tensor
    candidates: Tensor
    present: Tensor
    better_worse: Tensor
    weights: Tensor
    margins: Tensor
    ties: Tensor
    tie_weights: Tensor
    kinds: list[list[str]]


class LabelledPairs(NamedTuple):
    """Pairs of candidates of a batch as indices into flattened scores, each with target, weight and margin."""

    pairs: Int[Tensor, "p 2"]
    targets: Float[Tensor, " p"]
    weights: Float[Tensor, " p"]
    margins: Float[Tensor, " p"]


def collate_groups(rows: Sequence[Mapping[str, Any]]) -> GroupBatch:
    """Stacks preference groups of one image size; a group with fewer candidates than others is filled up.

    The columns `ties`, `weights`, `margins` and `tie_weights` may be missing: no ties, weights 1, margins 0.

    Raises:
        DataError: A missing column, sizes that differ, or a pair that does not name two candidates; names the sample.
    """
    for row in rows:
        _check_row(row, rows[0])
    counts = [len(row["candidates"]) for row in rows]
    most = max(counts)
    return GroupBatch(
        sample_id=[row["sample_id"] for row in rows],
        lr_image=torch.stack([row["lr_image"] for row in rows]),
        candidates=torch.stack([_filled_up(row["candidates"], most) for row in rows]),
        present=torch.arange(most) < torch.tensor(counts)[:, None],
        better_worse=_padded([_indices(row, "better_worse") for row in rows], MISSING),
        weights=_padded([_numbers(row, "weights", 1.0) for row in rows], 0.0),
        margins=_padded([_numbers(row, "margins", 0.0) for row in rows], 0.0),
        ties=_padded([_indices(row, "ties") for row in rows], MISSING),
        tie_weights=_padded([_numbers(row, "tie_weights", 1.0) for row in rows], 0.0),
        kinds=[list(row["kinds"]) for row in rows],
    )


def _indices(row: Mapping[str, Any], name: str) -> Int[Tensor, "p 2"]:
    return torch.as_tensor(row.get(name, ()), dtype=torch.long).reshape(-1, 2)


def _numbers(row: Mapping[str, Any], name: str, default: float) -> Tensor:
    count = len(_indices(row, _PER_PAIR[name]))
    if row.get(name) is None:
        return torch.full((count,), default)
    return torch.as_tensor(row[name], dtype=torch.float32).reshape(-1)


def _padded(values: list[Tensor], padding: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)


def _filled_up(candidates: Tensor, count: int) -> Tensor:
    return torch.cat([candidates, candidates[-1:].expand(count - len(candidates), -1, -1, -1)])


def _check_row(row: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    where = f"sample {row.get('sample_id', '?')}"
    if missing := [name for name in _COLUMNS if name not in row]:
        raise DataError(f"the row has no column {' and '.join(missing)}; there are: {', '.join(row)}", where=where)
    for name in ("lr_image", "candidates"):
        if row[name].shape[-3:] != first[name].shape[-3:]:
            raise DataError(
                f"{name} has shape {tuple(row[name].shape)}, and {tuple(first[name].shape)} in sample "
                f"{first['sample_id']} of the same batch",
                where=where,
                fix="give all groups one image size, or use batches of one group",
            )
    count = len(row["candidates"])
    if len(row["kinds"]) != count:
        raise DataError(f"{len(row['kinds'])} kinds for {count} candidates", where=where)
    if len(_indices(row, "better_worse")) + len(_indices(row, "ties")) == 0:
        raise DataError("the group compares no two candidates", where=where, fix="leave such groups out")
    for name in ("better_worse", "ties"):
        pairs = _indices(row, name)
        bad = ((pairs < 0) | (pairs >= count)).any(1) | (pairs[:, 0] == pairs[:, 1])
        if bad.any():
            pair = tuple(pairs[bad][0].tolist())
            raise DataError(f"{name} has the pair {pair}, but there are candidates 0 to {count - 1}", where=where)
    _check_numbers(row, where)


def _check_numbers(row: Mapping[str, Any], where: str) -> None:
    for name, pairs_of in _PER_PAIR.items():
        numbers = _numbers(row, name, 1.0)
        if len(numbers) != len(_indices(row, pairs_of)):
            raise DataError(f"{len(numbers)} {name} for {len(_indices(row, pairs_of))} {pairs_of}", where=where)
        if not bool((numbers.isfinite() & (numbers >= 0)).all()):
            raise DataError(f"{name} must be numbers from 0 on, got {numbers.tolist()}", where=where)


def one_group(batch: GroupBatch, index: int) -> GroupBatch:
    """Returns group `index` as a batch of one."""
    return cast(GroupBatch, {name: values[index : index + 1] for name, values in cast(dict, batch).items()})


def labelled_pairs(batch: GroupBatch, candidates: int) -> LabelledPairs:
    """Returns the ordered pairs and after them the ties, as the losses of `objectives.preference` take them."""
    ordered, ties = (flat_pairs(batch[name], candidates) for name in ("better_worse", "ties"))
    there, tied = (batch[name][..., 0] != MISSING for name in ("better_worse", "ties"))
    margins = batch["margins"][there]
    return LabelledPairs(
        pairs=torch.cat([ordered, ties]),
        targets=torch.cat([torch.ones_like(margins), margins.new_full((len(ties),), 0.5)]),
        weights=torch.cat([batch["weights"][there], batch["tie_weights"][tied]]),
        margins=torch.cat([margins, margins.new_zeros(len(ties))]),
    )


def flat_pairs(better_worse: Int[Tensor, "g p 2"], candidates: int) -> Int[Tensor, "n 2"]:
    """Returns the pairs as indices into flattened `(g, candidates)` scores, without the padding."""
    offset = torch.arange(len(better_worse), device=better_worse.device)[:, None, None] * candidates
    return (better_worse + offset)[better_worse[..., 0] != MISSING]


def ends_of_order(better_worse: Int[Tensor, "g p 2"], candidates: int) -> tuple[Int[Tensor, " n"], Int[Tensor, " m"]]:
    """Returns where the best and the worst of each group stand in flattened `(g, candidates)` scores.

    The best are those that win most often among those that never lose, the worst those that lose most often among
    those that never win; ties are all returned.
    """
    groups = len(better_worse)
    pairs = flat_pairs(better_worse, candidates)
    ones = torch.ones(len(pairs), device=pairs.device)
    tally = torch.zeros(2, groups * candidates, device=pairs.device)
    wins, losses = (tally[i].index_add(0, pairs[:, i], ones).view(groups, candidates) for i in (0, 1))
    best, worst = (_most(counts, excluded=others > 0) for counts, others in ((wins, losses), (losses, wins)))
    return best.flatten().nonzero().squeeze(1), worst.flatten().nonzero().squeeze(1)


def _most(counts: Tensor, *, excluded: Tensor) -> Tensor:
    counts = counts.masked_fill(excluded, 0)
    return (counts == counts.amax(1, keepdim=True)) & (counts > 0)


def ranks_from_pairs(
    better_worse: Int[Tensor, "g p 2"], candidates: int, *, sample_ids: Sequence[str]
) -> Int[Tensor, "g k"]:
    """Turns pairs into ranks, 0 for the best, equal ranks for candidates that the pairs leave tied.

    Candidates in no pair get `MISSING`.

    Raises:
        DataError: The pairs contradict each other, or leave open how two candidates with different ranks compare; a
            list would then teach an order that nobody stated.
    """
    return torch.stack(
        [
            _group_ranks(pairs, candidates, where=f"sample {name}")
            for pairs, name in zip(better_worse, sample_ids, strict=True)
        ]
    )


def _group_ranks(pairs: Int[Tensor, "p 2"], candidates: int, *, where: str) -> Int[Tensor, " k"]:
    pairs = pairs[pairs[:, 0] != MISSING]
    beats = torch.zeros(candidates, candidates, dtype=torch.bool, device=pairs.device)
    beats[pairs[:, 0], pairs[:, 1]] = True
    for middle in range(candidates):  # Warshall's transitive closure
        beats |= beats[:, middle, None] & beats[None, middle, :]
    if beats.diagonal().any():
        raise DataError("better_worse goes round in a circle", where=where, fix="drop one of the pairs")
    beaten_by = beats.sum(0)
    ordered = beats.any(0) | beats.any(1)
    implied = (beaten_by[:, None] < beaten_by[None, :]) & ordered[:, None] & ordered[None, :]
    if not torch.equal(implied, beats):
        raise DataError(
            "the pairs do not rank all candidates against each other", where=where, fix="set loss_type: pairwise"
        )
    return beaten_by.masked_fill(~ordered, MISSING)


def augment_groups(
    lr_image: UInt8[Tensor, "g 3 h w"],
    candidates: UInt8[Tensor, "g k 3 H W"],
    *,
    sample_ids: Sequence[str],
    seed: int,
    epoch: int,
) -> tuple[UInt8[Tensor, "g 3 h w"], UInt8[Tensor, "g k 3 H W"]]:
    """Flips and turns whole groups: one of 8 symmetries of the square, or of 4 for other shapes.

    The draw depends on `(seed, epoch, sample_id)` alone, so it is the same on any rank and after any resume.
    """
    turns = 1 if lr_image.shape[-2] == lr_image.shape[-1] else 2
    lr_parts, candidate_parts = [], []
    for lr_part, candidate_part, sample_id in zip(lr_image, candidates, sample_ids, strict=True):
        draw = stateless_seed(seed, "judge_augmentation", epoch, sample_id)
        flip, quarter = draw & 1, (draw >> 1) % 4 // turns * turns
        lr_parts.append(_move(lr_part, flip, quarter))
        candidate_parts.append(_move(candidate_part, flip, quarter))
    return torch.stack(lr_parts), torch.stack(candidate_parts)


def _move(image: Tensor, flip: int, quarter: int) -> Tensor:
    return torch.rot90(image.flip(-1) if flip else image, quarter, dims=(-2, -1))
