"""The benchmark on real outputs: what it builds, what a judge may not see, and which pairs count."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from refreward_trl.data.preferences import PreferenceRecord
from refreward_trl.evaluation.preference_pairs import PairTable, pair_table
from refreward_trl.resampling import downscale, upscale

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CROPS = 8
SIDE = 32


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("real_preferences")


def distance(image: Tensor, hr_image: Tensor) -> Tensor:
    return (image - hr_image).square().mean(dim=(1, 2, 3))


@pytest.fixture
def records(benchmark: ModuleType) -> list[PreferenceRecord]:
    """Groups of real crops; the networks are bicubic enlargement with different gains."""
    crops = benchmark.Crops.cut("val", 1, SIDE, 0)
    names = ["bicubic", "unsharp", *(name for fold in benchmark.FOLDS for name in fold)]
    networks = {
        name: lambda lr_image, gain=1 - 0.05 * place: gain * upscale(lr_image, 4) for place, name in enumerate(names)
    }
    return list(benchmark._records(crops, networks, distance, "test"))


@pytest.fixture
def table(records: list[PreferenceRecord]) -> PairTable:
    return pair_table(records, "overall")


def test_groups_are_ranked_by_the_oracle(records: list[PreferenceRecord]) -> None:
    assert len(records) == CROPS
    for record in records:
        assert record.hr_image is not None
        hr_image = record.hr_image.read().float()
        distances = [float((one.image.read().float() - hr_image).square().mean()) for one in record.candidates]
        by_rank = sorted(
            zip(record.ranks["overall"], distances, record.candidates, strict=True), key=lambda row: row[:2]
        )
        assert by_rank[0][2].generator == "hr"
        assert [distance for _, distance, _ in by_rank] == sorted(distances)


def test_each_fold_has_one_wrong_content_of_unseen_networks(
    benchmark: ModuleType, records: list[PreferenceRecord]
) -> None:
    for record in records:
        for unseen in benchmark.FOLDS:
            assert sum(bool(one.kind) and one.generator in unseen for one in record.candidates) == 1


def test_unseen_networks_are_taken_out(benchmark: ModuleType, records: list[PreferenceRecord]) -> None:
    for unseen in benchmark.FOLDS:
        for record in records:
            rest = benchmark._without(record, unseen)
            assert not {one.generator for one in rest.candidates} & {*unseen}
            whole = [(one, rank) for one, rank in zip(record.candidates, record.ranks["overall"], strict=True)]
            kept = [pair for pair in whole if pair[0].generator not in unseen]
            assert kept == list(zip(rest.candidates, rest.ranks["overall"], strict=True))


def test_wrong_content(benchmark: ModuleType) -> None:
    own, other = benchmark.Crops.cut("val", 1, SIDE, 0).hr_image[:2]
    assert torch.equal(benchmark.wrong_content("other_photo", own, other, left=True), other)
    for left in (True, False):
        half = benchmark.wrong_content("other_half", own, other, left=left)
        first, second = (other, own) if left else (own, other)
        assert torch.equal(half[..., : SIDE // 2], first[..., : SIDE // 2])
        assert torch.equal(half[..., SIDE // 2 :], second[..., SIDE // 2 :])
    detail = benchmark.wrong_content("other_detail", own, other, left=True)
    reduced = [downscale(image[None], 4)[0] for image in (detail, own, other)]
    off, foreign = ((reduced[0] - each).abs().mean() for each in reduced[1:])
    assert off < foreign / 5, "the LR image can hardly tell"
    assert (detail - own).abs().mean() > 0.01


def test_pairs_of_each_part(benchmark: ModuleType, table: PairTable) -> None:
    def pairs(part: str, fold: int) -> list:
        (found,) = (each for each in benchmark.PARTS if each.title == part)
        return [pair for pair, holds in zip(table.pairs, benchmark._masks(found, table)[fold], strict=True) if holds]

    for fold, unseen in enumerate(benchmark.FOLDS):
        makers = [pair.generators for pair in pairs("an unseen network", fold)]
        assert len(makers) == CROPS * (2 * 6 + 1), "2 unseen with 6 seen, and with each other"
        assert all({*pair} & {*unseen} and "hr" not in pair for pair in makers)
        assert all({*pair.generators} == {*unseen} for pair in pairs("both unseen", fold))
        assert len(pairs("both seen", fold)) == CROPS * 15
        wrong = pairs("wrong content", fold)
        assert len(wrong) == CROPS * 9, "one such candidate against 8 outputs and the HR image"
        assert sum(len(pairs(kind, fold)) for kind in benchmark.WRONG_CONTENT) == len(wrong)


def test_an_oracle_is_right_and_its_opposite_wrong(benchmark: ModuleType, table: PairTable) -> None:
    margins = torch.ones(len(benchmark.FOLDS), len(table)).double().numpy()
    masks = {part.title: benchmark._masks(part, table) for part in benchmark.PARTS}
    right = benchmark._figures(benchmark.Row("oracle", "SR", margins, -margins), table, masks)
    for title in masks:
        assert right["accuracy"][title]["mean"] == 1
        assert right["lr_shuffled_drop"][title]["mean"] == 1
    wrong = benchmark.Row("wrong", "SR", -margins)
    everything = masks["an unseen network"]
    assert benchmark._difference(benchmark.Row("oracle", "SR", margins), wrong, table, everything).mean == 1
