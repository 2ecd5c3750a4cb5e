"""Scorers of known behaviour on labelled pairs: the table must say what they are, and nothing must leak into it."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from math import isnan, log, nan
from typing import Any

import numpy as np
import pytest
import torch
from preference_sets import Refusing, brightness, group, guess, likeness, scorer
from scipy.stats import kendalltau, spearmanr
from torch import Tensor

from refreward_trl.data.image_sources import ImageTensor
from refreward_trl.data.preferences import PreferenceChoice, PreferenceRecord, read_preferences, write_preferences
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.evaluation.preference_answers import ask, blank, foreign_lr_images, resized
from refreward_trl.evaluation.preference_baselines import IDENTITY, Baselines, identity_margins, open_baselines
from refreward_trl.evaluation.preference_benchmark import as_dict, evaluate_preferences
from refreward_trl.evaluation.preference_pairs import dataset_digest, pair_table
from refreward_trl.evaluation.preference_report import _differences, as_text
from refreward_trl.evaluation.preference_results import PreferenceEvaluation, ScorerResult, summarise
from refreward_trl.evaluation.preference_scorers import RewardScorer, Scorer
from refreward_trl.evaluation.statistics import clustered_bootstrap_ci


def measure(model: Scorer, records: list[PreferenceRecord], **options: Any) -> ScorerResult:
    table = pair_table(records, "overall")
    return summarise(model.name, "model", ask([model], table, label="", **options)[model.name], table)


def evaluate(records: list[PreferenceRecord], *models: Scorer, aspect: str = "overall") -> PreferenceEvaluation:
    table = pair_table(records, aspect)
    return evaluate_preferences(table, [lambda model=model: model for model in models or (scorer(),)], Baselines())


GROUPS = [group(number) for number in range(12)]


def test_a_perfect_scorer_is_always_right_an_inverse_one_never() -> None:
    perfect, inverse = (measure(scorer(lambda lr, sr, s=s: s * brightness(lr, sr)), GROUPS) for s in (1, -1))
    assert (perfect.accuracy.mean, perfect.auc) == (1, 1)
    assert perfect.kendall.value.mean == pytest.approx(1) and perfect.spearman.value.mean == pytest.approx(1)
    assert perfect.calibration.ece < 1e-3
    assert (inverse.accuracy.mean, inverse.auc) == (0, 0)
    assert inverse.kendall.value.mean == pytest.approx(-1) and inverse.spearman.value.mean == pytest.approx(-1)


def test_a_scorer_that_knows_nothing_is_right_half_of_the_time() -> None:
    result = measure(scorer(guess), [group(number, (0, 1, 2, 3)) for number in range(60)])
    assert 0.4 < result.accuracy.mean < 0.6 and result.accuracy.low < 0.5 < result.accuracy.high
    constant = measure(scorer(lambda lr, sr: torch.zeros(len(sr))), GROUPS)
    assert constant.accuracy.mean == 0.5 and constant.auc == 0.5
    assert isnan(constant.kendall.value.mean) and constant.kendall.groups == 0


def test_a_scorer_that_ignores_the_lr_image_loses_exactly_nothing_without_it() -> None:
    def mixed(completions: Any, **columns: Any) -> list[float]:
        return [float(image.mean()) if image.sum() % 2 < 1 else float(-image.mean()) for image in completions]

    result = measure(RewardScorer("blind", mixed, {}), GROUPS)
    assert 0 < result.accuracy.mean < 1
    for ablation in result.ablations.values():
        assert (ablation.drop.mean, ablation.drop.low, ablation.drop.high) == (0, 0, 0)
        assert ablation.accuracy == result.accuracy


def test_a_scorer_that_reads_the_lr_image_needs_the_right_one() -> None:
    result = measure(scorer(likeness), GROUPS)
    assert result.accuracy.mean == 1
    assert result.ablations["shuffled"].drop.low > 0
    # Its brightness is all that this one reads, and a blank image keeps it.
    assert result.ablations["blanked"].drop.mean == 0


def test_a_scorer_that_reads_the_texture_of_the_lr_image_loses_it_with_a_blank_one() -> None:
    def textured(lr_image: Tensor, sr_image: Tensor) -> Tensor:
        return brightness(lr_image, sr_image) * lr_image.std(dim=(2, 3)).mean(dim=1).sub(1e-3).sign()

    blanked, shuffled = (measure(scorer(textured), GROUPS).ablations[name] for name in ("blanked", "shuffled"))
    assert (blanked.accuracy.mean, blanked.drop.mean, shuffled.drop.mean) == (0, 1, 0)


def test_the_blank_image_has_the_mean_colour_alone() -> None:
    image = group(3).lr_image.read()
    plain = blank(image)
    assert plain.shape == image.shape and plain.dtype == torch.uint8
    assert plain.float().std(dim=(1, 2)).max() == 0
    assert (plain.float().mean(dim=(1, 2)) - image.float().mean(dim=(1, 2))).abs().max() <= 0.5


def test_the_wrong_lr_image_is_of_another_photo_and_of_the_same_size_if_there_is_one() -> None:
    records = [group(n, photo=f"photo{n % 4}", side=(16, 32)[n % 2]) for n in range(16)] + [group(99, side=64)]
    foreign = foreign_lr_images(records, seed=0)
    by_source = {id(record.lr_image): record for record in records}
    for record in records:
        source = foreign[record.sample_id]
        assert source is not None
        other = by_source[id(source)]
        assert other.photo != record.photo
        if record.sample_id != "p099@0":
            assert other.lr_image.size() == record.lr_image.size()
    assert resized(records[0].lr_image.read(), records[-1].lr_image.read()).shape == (3, 32, 32)
    assert foreign_lr_images(records[::-1], seed=0) == foreign
    assert foreign_lr_images(records, seed=1) != foreign
    assert foreign_lr_images(records[:1], seed=0) == {"p000@0": None}


def test_one_photo_has_no_wrong_lr_image_and_no_interval() -> None:
    result = measure(scorer(likeness), [group(number, photo="same") for number in range(3)])
    assert result.accuracy.mean == 1 and isnan(result.accuracy.low)
    assert isnan(result.ablations["shuffled"].drop.mean) and result.ablations["blanked"].drop.mean == 0
    assert isnan(result.calibration.ece)


@pytest.mark.parametrize("count", range(2, 9))
def test_groups_of_any_size_agree_with_scipy(count: int) -> None:
    random = np.random.default_rng(count)
    records = [group(n, tuple(random.integers(0, count, count).tolist())) for n in range(8)]
    records = [record for record in records if len(set(record.ranks["overall"])) > 1]

    def wavering(lr_image: Tensor, sr_image: Tensor) -> Tensor:
        return (brightness(lr_image, sr_image) * 20).round() + (sr_image.std(dim=(1, 2, 3)) * 1e4).round() % 3

    result = measure(scorer(wavering), records)
    taus, rhos = [], []
    for record in records:
        images = [candidate.image.read()[None] / 255 for candidate in record.candidates]
        scores = [wavering(images[0], image).item() for image in images]
        if len(set(scores)) > 1:
            wanted = [-rank for rank in record.ranks["overall"] if rank is not None]
            taus.append(kendalltau(scores, wanted).statistic)
            rhos.append(spearmanr(scores, wanted).statistic)
    assert result.kendall.groups == result.spearman.groups == len(taus)
    assert result.kendall.value.mean == pytest.approx(np.mean(taus))
    assert result.spearman.value.mean == pytest.approx(np.mean(rhos))
    ties = sum(a == b for record in records for a, b in combinations(record.ranks["overall"], 2))
    assert int(result.answers.margins.size) == len(records) * count * (count - 1) // 2
    assert int(np.isnan(result.outcomes).sum()) == ties


def test_ties_are_left_out_of_accuracy_and_judged_where_a_tie_may_be_said() -> None:
    records = [group(number, (0, 0, 3)) for number in range(12)]
    result = measure(scorer(), records)
    assert result.accuracy.mean == 1 and result.as_dict()["scored_pairs"] == 24
    assert result.with_ties is not None and result.with_ties.mean > 0.9
    assert 0 < result.tie_threshold < 0.1
    assert measure(scorer(), GROUPS).with_ties is None


def test_partial_orders_have_tau_but_no_rho() -> None:
    choices = (PreferenceChoice(0, 1, "first"), PreferenceChoice(0, 2, "first"))
    result = measure(scorer(), [replace(group(number), ranks={}, choices=choices) for number in range(4)])
    assert result.kendall.groups == 4 and result.spearman.groups == 0 and isnan(result.spearman.value.mean)


def test_missing_answers_are_counted_and_never_taken_for_one() -> None:
    table = pair_table(GROUPS, "overall")
    model = Refusing("shy", [0, 1, 2, 3])
    result = evaluate(GROUPS, model).models[0]
    assert result.accuracy.mean == 1 and result.answers.missing == 24 and len(table) == 36
    assert result.problem == "it did not want to"
    assert result.kendall.groups == result.spearman.groups == 4
    assert sum(part.count for part in result.calibration.bins) == 12
    assert result.as_dict()["scored_pairs"] == 12
    nothing = evaluate(GROUPS, Refusing("mute", [])).models[0]
    assert not nothing.is_known and isnan(nothing.auc) and isnan(nothing.swap.mean) and nothing.answers.missing == 36
    assert nothing.ablations["shuffled"].drop.mean != 0


def test_pairs_of_one_photo_do_not_narrow_the_interval() -> None:
    records = [group(4 * n + k, photo=f"photo{n}") for n in range(8) for k in range(4)]

    def by_photo(lr_image: Tensor, sr_image: Tensor) -> Tensor:
        return brightness(lr_image, sr_image)

    answers = measure(scorer(by_photo), records).answers
    table = pair_table(records, "overall")
    wrong = np.array([photo in ("photo0", "photo1", "photo2") for photo in table.photos])
    result = summarise("half", "model", replace(answers, margins=np.where(wrong, -1.0, 1.0)), table)
    _, low, high = clustered_bootstrap_ci(result.outcomes, range(len(table)))
    assert result.accuracy.high - result.accuracy.low > 2 * (high - low)


def scrambled(record: PreferenceRecord, order: list[int]) -> PreferenceRecord:
    ranks = tuple(record.ranks["overall"][place] for place in order)
    return replace(record, candidates=tuple(record.candidates[place] for place in order), ranks={"overall": ranks})


def test_the_order_of_groups_and_candidates_changes_nothing() -> None:
    makers = ("a", "b", "c")
    records = [group(n, (n % 3, (n + 1) % 3, (n * n) % 3), generators=makers, kinds=makers) for n in range(9)]

    expected = as_dict(evaluate(records, scorer(guess)))
    random = np.random.default_rng(0)
    moved = [records[place] for place in random.permutation(9)]
    moved = [scrambled(record, random.permutation(3).tolist()) for record in moved]
    found = as_dict(evaluate(moved, scorer(guess)))
    for content in (expected, found):  # they name places
        content.pop("worst_errors")
        content.pop("hashes")
    numbers = [
        json.loads(json.dumps(content), parse_float=lambda text: f"{float(text):.9g}") for content in (expected, found)
    ]
    assert numbers[0] == numbers[1]
    assert expected["models"]["mine"]["accuracy"]["mean"] not in (0.0, 1.0)


# The generators' identity


def test_identity_equals_a_count_by_hand_and_does_not_see_its_own_photo() -> None:
    # a beats b in p0 and p1, loses in p2; they tie in p3; c meets only a, in p4 alone.
    makers = {0: ("a", "b"), 1: ("a", "b"), 2: ("b", "a"), 3: ("a", "b"), 4: ("c", "a"), 5: ("a", "a"), 6: ("", "b")}
    records = [group(n, (0, 0) if n == 3 else (0, 1), generators=made) for n, made in makers.items()]
    margins = identity_margins(pair_table(records, "overall"))
    # Without p0, a has 1 win of p1 and half a one of p3; b has that of p2 and the other half.
    assert margins[0] == pytest.approx(log((1.5 + 0.5) / (1.5 + 0.5)))
    assert margins[1] == margins[0]
    # Without p2, in which b won: a has two and a half.
    assert margins[2] == pytest.approx(log((0.5 + 0.5) / (2.5 + 0.5)))
    assert margins[3] == pytest.approx(log((2 + 0.5) / (1 + 0.5)))
    assert isnan(margins[4]) and margins[5] == 0 and isnan(margins[6])
    changed = [scrambled(records[0], [1, 0]), *records[1:]]
    changed[0] = replace(changed[0], ranks={"overall": (0, 1)})
    assert identity_margins(pair_table(changed, "overall"))[0] == pytest.approx(-margins[0])
    photos = [replace(record, photo="same") for record in records]
    assert np.isnan(identity_margins(pair_table(photos, "overall"))[[0, 1, 2, 3, 4, 6]]).all()


def test_identity_is_in_every_table_also_where_it_cannot_be_computed() -> None:
    known = evaluate([group(n, (0, 1), generators=("good", "bad")) for n in range(6)])
    assert known.baselines[0].name == IDENTITY and known.baselines[0].accuracy.mean == 1
    assert as_dict(known)["differences"]["mine"][IDENTITY]["mean"] == 0
    unknown = as_dict(evaluate(GROUPS))["baselines"]
    assert list(unknown) == [IDENTITY]
    assert unknown[IDENTITY]["problem"] == "generators unknown" and isnan(unknown[IDENTITY]["accuracy"]["mean"])


def test_artefacts_are_an_identity_too() -> None:
    records = [group(n, (0, 1), generators=("a", "a"), kinds=("", "blur")) for n in range(6)]
    generators, methods = evaluate(records).identities
    assert generators.accuracy.mean == 0.5 and methods.accuracy.mean == 1
    assert methods.name == "method_identity"


# Slices, differences, errors


def test_slices_hold_every_pair_once() -> None:
    records = [
        group(
            n,
            generators=("a", "b", "c"),
            kinds=("", "blur", "noise"),
            degradation=("x2", "")[n % 2],
            source=f"s{n % 3}",
        )
        for n in range(6)
    ]
    found = evaluate(records).models[0].slices
    assert {by: {value: part.pairs for value, part in parts.items()} for by, parts in found.items()} == {
        "kind": {"blur": 6, "noise": 12},
        "degradation": {"x2": 9, "(unknown)": 9},
        "generators": {"a and b": 6, "a and c": 6, "b and c": 6},
        "source": {"s0": 6, "s1": 6, "s2": 6},
    }


def test_differences_are_taken_on_the_pairs_that_both_answered() -> None:
    evaluation = evaluate(GROUPS, Refusing("shy", [0, 1, 2, 3]), scorer(lambda lr, sr: -brightness(lr, sr), "wrong"))
    shy, wrong = evaluation.models
    assert evaluation.difference(shy, wrong).mean == 1 and evaluation.difference(wrong, shy).mean == -1


def test_a_model_is_compared_with_those_that_were_named_before_it() -> None:
    evaluation = evaluate(GROUPS, scorer(lambda lr, sr: -brightness(lr, sr), "before"), scorer(name="after"))
    found = as_dict(evaluation)["differences"]
    assert found["after"]["before"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert "after" not in found["before"]
    assert "after minus before: +100.0 points (95 % CI +100.0 to +100.0" in as_text(evaluation)
    (row,) = (row for row in _differences(evaluation).rows if row[0] == "before")
    assert row[1] == "" and row[2] != ""


def test_worst_errors_are_the_most_certain_ones_of_as_many_groups_as_there_are() -> None:
    table = pair_table(GROUPS, "overall")
    answers = ask([scorer()], table, label="")["mine"]
    margins = np.ones(36)
    margins[[3, 4, 5, 9, 30]] = -5.0, -9.0, -1.0, -2.0, 0.0
    result = summarise("mine", "model", replace(answers, margins=margins), table)
    evaluation = PreferenceEvaluation(table, [result], [])
    assert evaluation.worst_errors(result) == [4, 9, 3, 5]
    assert evaluation.worst_errors(result, most=1) == [4]
    assert evaluation.worst_errors(evaluate(GROUPS).models[0]) == []


# Data


def test_the_digest_knows_labels_and_pixels_but_no_order_and_no_format(tmp_path) -> None:
    records = [group(number) for number in range(3)]
    digest = dataset_digest(pair_table(records, "overall"))
    assert dataset_digest(pair_table(records[::-1], "overall")) == digest
    for format in ("imagefolder", "parquet"):
        write_preferences(records, tmp_path / format, format=format)
        assert dataset_digest(pair_table(read_preferences(tmp_path / format), "overall")) == digest
    pixels = records[0].candidates[0].image.read().clone()
    pixels[0, 0, 0] ^= 1
    candidates = (replace(records[0].candidates[0], image=ImageTensor(pixels)), *records[0].candidates[1:])
    for changed in (
        replace(records[0], ranks={"overall": (0, 2, 1)}),
        replace(records[0], candidates=candidates),
        replace(records[0], hr_image=None),
    ):
        assert dataset_digest(pair_table([changed, *records[1:]], "overall")) != digest


def test_groups_without_labels_are_counted_and_bad_sizes_all_told() -> None:
    table = pair_table([*GROUPS, replace(group(50), ranks={})], "overall")
    assert table.counts() == {"groups": 12, "photos": 12, "pairs": 36, "ties": 0, "unlabelled_groups": 1}
    with pytest.raises(DataError, match="says anything about 'naturalness'"):
        pair_table(GROUPS, "naturalness")
    with pytest.raises(ConfigError, match="no aspect 'beauty'"):
        pair_table(GROUPS, "beauty")
    small = ImageTensor(torch.zeros(3, 7, 7, dtype=torch.uint8))
    bad = [replace(record, lr_image=small) for record in GROUPS[:2]]
    with pytest.raises(DataError) as caught:
        pair_table([*bad, *GROUPS[2:]], "overall")
    assert str(caught.value).count("no whole multiple") == 8


def test_baselines_stand_beside_every_model_or_it_is_said_why_not() -> None:
    records = [group(n, side=48, with_hr=n > 1) for n in range(5)]
    baselines = open_baselines()
    evaluation = evaluate_preferences(pair_table(records, "overall"), [scorer], baselines)
    found = {result.name: result for result in evaluation.baselines}
    assert {IDENTITY, "lr_consistency", "psnr_to_upsampled_lr", "laplacian_variance", "psnr_y", "ssim_y"} <= set(found)
    assert found["psnr_y"].accuracy.mean == 1 and found["psnr_y"].answers.missing == 6
    assert found["psnr_y"].problem == "no HR images" and not found["psnr_y"].ablations
    assert found["ms_ssim"].problem == "images under 176 pixels" or "ms_ssim" in evaluation.not_computed
    assert found["lr_consistency"].accuracy.mean == 1 and set(found["lr_consistency"].ablations) == {
        "shuffled",
        "blanked",
    }
    assert not found["laplacian_variance"].ablations
    assert evaluation.best_baseline is not None and evaluation.best_baseline.sees == "SR and LR"
    assert set(evaluation.not_computed) <= {"pyiqa", "stlpips", "ms_ssim", "uqi", "scc", "vif"}
    assert nan not in [value for value in as_dict(evaluation)["protocol"].values() if isinstance(value, float)]
