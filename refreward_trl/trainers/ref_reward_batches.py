"""Preference groups on their way to the judge: collation, ranks, and flips and turns that depend on nothing global."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from refreward_trl.errors import DataError
from refreward_trl.randomness import stateless_seed

MISSING = -1
"""Fills up the pairs of a group that has fewer than others, and marks a candidate without a rank."""

_COLUMNS = ("sample_id", "lr_image", "candidates", "better_worse", "kinds")


class GroupBatch(TypedDict):
    """Stacked preference groups.

    `lr_image` uint8 `(g, 3, h, w)`, `candidates` uint8 `(g, K, 3, H, W)`, `better_worse` int64 `(g, P, 2)` padded with
    `MISSING`, `kinds` one list of K names per group.
    """

    sample_id: list[str]
    lr_image: Tensor
    candidates: Tensor
    better_worse: Tensor
    kinds: list[list[str]]


def collate_groups(rows: Sequence[Mapping[str, Any]]) -> GroupBatch:
    """Stacks preference groups of one size and one number of candidates.

    Raises:
        DataError: A missing column, sizes that differ, or a pair that does not name two candidates; names the sample.
    """
    for row in rows:
        _check_row(row, rows[0])
    pairs = [torch.as_tensor(row["better_worse"], dtype=torch.long).reshape(-1, 2) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(pairs, batch_first=True, padding_value=MISSING)
    return GroupBatch(
        sample_id=[row["sample_id"] for row in rows],
        lr_image=torch.stack([row["lr_image"] for row in rows]),
        candidates=torch.stack([row["candidates"] for row in rows]),
        better_worse=padded,
        kinds=[list(row["kinds"]) for row in rows],
    )


def _check_row(row: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    where = f"sample {row.get('sample_id', '?')}"
    if missing := [name for name in _COLUMNS if name not in row]:
        raise DataError(f"the row has no column {' and '.join(missing)}; there are: {', '.join(row)}", where=where)
    for name in ("lr_image", "candidates"):
        if row[name].shape != first[name].shape:
            raise DataError(
                f"{name} has shape {tuple(row[name].shape)}, and {tuple(first[name].shape)} in sample "
                f"{first['sample_id']} of the same batch",
                where=where,
                fix="give all groups one image size and one number of candidates, or use batches of one group",
            )
    count = len(row["candidates"])
    if len(row["kinds"]) != count:
        raise DataError(f"{len(row['kinds'])} kinds for {count} candidates", where=where)
    pairs = torch.as_tensor(row["better_worse"], dtype=torch.long).reshape(-1, 2)
    if len(pairs) == 0:
        raise DataError("the group orders no two candidates", where=where, fix="leave such groups out")
    bad = ((pairs < 0) | (pairs >= count)).any(1) | (pairs[:, 0] == pairs[:, 1])
    if bad.any():
        pair = tuple(pairs[bad][0].tolist())
        raise DataError(f"better_worse has the pair {pair}, but there are candidates 0 to {count - 1}", where=where)


def one_group(batch: GroupBatch, index: int) -> GroupBatch:
    """Returns group `index` as a batch of one."""
    part = slice(index, index + 1)
    return GroupBatch(
        sample_id=batch["sample_id"][part],
        lr_image=batch["lr_image"][part],
        candidates=batch["candidates"][part],
        better_worse=batch["better_worse"][part],
        kinds=batch["kinds"][part],
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
