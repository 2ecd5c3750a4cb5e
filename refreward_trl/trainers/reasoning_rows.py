"""Preference groups as questions to a judge that writes its answer: rows for TRL's GRPO and SFT trainers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from refreward_trl.data.images import to_float, to_pil
from refreward_trl.data.preference_records import PreferenceGroup
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.randomness import stateless_generator
from refreward_trl.resampling import upscale
from refreward_trl.reward_model.spec import JudgeSpec

if TYPE_CHECKING:
    import datasets

Style = Literal["pointwise", "pairwise"]
KEPT_GROUPS = 8
"""Groups that stay in memory: the rows of a group are asked for one after the other."""


class ReasoningRows(Dataset):
    """Questions about preference groups, the rows of one group next to each other.

    Pointwise, a group gives one row per candidate, `mates` of them: LR image and candidate. Pairwise it gives two: LR
    image and two candidates, and the same with the candidates in the other order.

    A row has `prompt` (a conversation) and `images` (PIL: the LR image, enlarged unless the spec says otherwise, and
    the candidates) as TRL wants them; `group`, `sample_id` and `photo`; pointwise `candidate`, `mates` and `truths`,
    pairwise `shown` and `truth`, as `rewards.ranking` reads them. Truths are 1 where the first is better, 0.5 for a
    tie and 0 where the second is better.

    Args:
        groups: Returns group number `i`; see `data.preference_groups.RecordGroups.group` for stored ones.
        count: Number of groups.
        spec: How the judge is asked.
        style: "pointwise" or "pairwise".
        mates: Pointwise, candidates of a group that are asked about; a group with more gets a random choice.
        seed: Seed of the choices.

    Raises:
        ConfigError: The spec has no prompt for the style, or `mates` under 2.
    """

    def __init__(
        self,
        groups: Callable[[int], PreferenceGroup],
        count: int,
        *,
        spec: JudgeSpec,
        style: Style,
        mates: int = 4,
        seed: int = 0,
    ) -> None:
        self.prompt = spec.reason_prompt if style == "pointwise" else spec.reason_compare_prompt
        if not self.prompt:
            name = "reason_prompt" if style == "pointwise" else "reason_compare_prompt"
            raise ConfigError(f"the judge's spec has no {name}", where="judge_spec", fix=f"give a spec with {name}")
        if mates < 2:
            raise ConfigError(f"a group of {mates} cannot be ranked", where="mates", fix="use at least 2")
        self.spec, self.style, self.seed = spec, style, seed
        self.block = mates if style == "pointwise" else 2
        self._count = count
        self._group = lru_cache(maxsize=KEPT_GROUPS)(groups)

    def __len__(self) -> int:
        return self._count * self.block

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number, place = divmod(index, self.block)
        group = self._group(number)
        draws = stateless_generator(self.seed, "question", group.sample_id, number)
        row = (
            self._pointwise(group, place, draws) if self.style == "pointwise" else self._pairwise(group, place, draws)
        )
        about = {"sample_id": group.sample_id, "photo": group.photo, "group": f"{group.sample_id}#{number}"}
        return {"prompt": [{"role": "user", "content": self.prompt}]} | row | about

    def as_dataset(self, answer: Callable[[Mapping[str, Any]], Any] | None = None) -> datasets.Dataset:
        """Returns the rows as TRL wants them: a `datasets.Dataset`, whose rows are made when they are asked for.

        Args:
            answer: Makes the `completion` of a row, to learn from; then only prompt, images and completion are kept.
        """
        import datasets

        def make(batch: Mapping[str, Any]) -> dict[str, list[Any]]:
            rows = [self[index] for index in batch["row"]]
            if answer is not None:
                kept = ("prompt", "images")
                rows = [{name: row[name] for name in kept} | {"completion": answer(row)} for row in rows]
            return {name: [row[name] for row in rows] for name in rows[0]}

        return datasets.Dataset.from_dict({"row": list(range(len(self)))}).with_transform(make)

    def _pointwise(self, group: PreferenceGroup, place: int, draws: torch.Generator) -> dict[str, Any]:
        chosen = choose_mates(group, self.block, draws)
        truths = [
            [chosen.index(first), chosen.index(second), truth]
            for (first, second), truth in known_truths(group).items()
            if first in chosen and second in chosen
        ]
        images = [shown_lr(group, self.spec), to_pil(to_float(group.candidates[chosen[place]]))]
        facts = {
            "candidate": place,
            "mates": self.block,
            "truths": json.dumps(truths),
            "kind": group.kinds[chosen[place]],
        }
        return {"images": images} | facts

    def _pairwise(self, group: PreferenceGroup, place: int, draws: torch.Generator) -> dict[str, Any]:
        truths = known_truths(group)
        if not truths:
            raise DataError("the group compares no two candidates", where=f"sample {group.sample_id}")
        pair, truth = list(truths.items())[int(torch.randint(len(truths), (), generator=draws))]
        turned = int(torch.randint(2, (), generator=draws)) != place
        shown = pair[::-1] if turned else pair
        images = [shown_lr(group, self.spec), *(to_pil(to_float(group.candidates[number])) for number in shown)]
        return {"images": images, "shown": list(shown), "truth": 1 - truth if turned else truth}


def known_truths(group: PreferenceGroup) -> Mapping[tuple[int, int], float]:
    """Returns `(i, j)` -> 1 where candidate i is better than j, 0.5 for a tie."""
    return {pair: 1.0 for pair in group.better_worse} | {pair: 0.5 for pair in group.ties}


def choose_mates(group: PreferenceGroup, count: int, draws: torch.Generator) -> list[int]:
    """Returns `count` candidates of a group, in a random order: two that are compared, and others.

    Raises:
        DataError: The group has fewer candidates, or compares none.
    """
    pairs = list(known_truths(group))
    if len(group.candidates) < count or not pairs:
        raise DataError(
            f"{len(group.candidates)} candidates and {len(pairs)} comparisons, {count} candidates are asked about",
            where=f"sample {group.sample_id}",
            fix="lower mates, or leave such groups out",
        )
    first = pairs[int(torch.randint(len(pairs), (), generator=draws))]
    others = [number for number in range(len(group.candidates)) if number not in first]
    order = torch.randperm(len(others), generator=draws).tolist()
    chosen = [*first, *(others[place] for place in order[: count - 2])]
    return [chosen[place] for place in torch.randperm(count, generator=draws).tolist()]


def shown_lr(group: PreferenceGroup, spec: JudgeSpec) -> Any:
    """Returns the LR image as the judge sees it, as a PIL image."""
    lr_image = to_float(group.lr_image)
    scale = group.candidates[0].shape[-1] // lr_image.shape[-1]
    if spec.lr_view == "upsampled" and scale > 1:
        lr_image = upscale(lr_image[None], scale)[0]
    return to_pil(lr_image.clamp(0, 1))


def check_size(rows: ReasoningRows, spec: JudgeSpec, *, square: bool) -> None:
    """Makes sure that the judge will see the pixels as they are: no library may have to resize them.

    Raises:
        ConfigError: The images of the first row do not fit the judge's patch grid or tile.
    """
    for image in rows[0]["images"]:
        sides: tuple[int, int] = image.size
        fits = sides == (spec.tile, spec.tile) if square else all(side % spec.pixel_multiple == 0 for side in sides)
        if not fits or max(sides) > spec.tile:
            wanted = f"{spec.tile}" if square else f"a multiple of {spec.pixel_multiple}, at most {spec.tile}"
            raise ConfigError(
                f"images of {sides[0]}x{sides[1]} pixels do not fit the judge", where="crop_size", fix=f"use {wanted}"
            )


def rationale(row: Mapping[str, Any], spec: JudgeSpec) -> str:
    """Returns a constructed answer to a row: a stock thought, and what the labels say. Nobody thought it.

    Pointwise, the rating is the share of comparisons that the candidate wins, on the scale of the spec.
    """
    if "shown" in row:
        first, second = (token.strip() for token in spec.choice_tokens)
        better = first if row["truth"] >= 0.5 else second
        return f"<think> {better} looks better </think> <answer> {better} </answer>"
    wins = [
        truth if first == row["candidate"] else 1 - truth
        for first, second, truth in json.loads(row["truths"])
        if row["candidate"] in (first, second)
    ]
    share = sum(wins) / len(wins) if wins else 0.5
    low, high = spec.rating_range
    rating = round(low + share * (high - low))
    quality = ("poor", "fair", "good")[min(2, int(3 * share))]
    return f"<think> it looks {quality} </think> <answer> {rating} </answer>"


def as_tensors(images: list[Any]) -> list[Tensor]:
    """Returns PIL images as batches of one, float pixels in [0, 1]."""
    from refreward_trl.data.images import from_pil

    return [to_float(from_pil(image, where="images"))[None] for image in images]
