"""Groups are pure functions of sample and seed; what is known of their order is; chosen pairs are worth comparing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from refreward_trl.data.images import to_float, to_uint8
from refreward_trl.data.preference_building import (
    BuildArguments,
    Made,
    Sample,
    build_group,
    check_build_arguments,
    choose_candidates,
    disagreement,
    distinct,
    make_candidates,
    rank_by,
)
from refreward_trl.errors import ConfigError
from refreward_trl.randomness import stateless_generator
from refreward_trl.resampling import downscale, upscale


def sample(number: int = 0, methods: int = 2, side: int = 64) -> Sample:
    generator = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 3, 9, 9, generator=generator)
    photo = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[0].clamp(0, 1)
    photo = (photo + 0.1 * torch.rand(photo.shape, generator=generator)).clamp(0, 1)
    lr_image = to_uint8(downscale(photo[None], 4)[0])
    up = upscale(to_float(lr_image)[None], 4)[0]
    shown = {f"m{k}": to_uint8(up + 0.05 * k * torch.randn(up.shape, generator=generator)) for k in range(methods)}
    return Sample(f"photo{number}@0", lr_image, to_uint8(photo), shown, to_uint8(photo.flip(2)))


def settings(**fields: Any) -> BuildArguments:
    return dataclasses.replace(BuildArguments(methods=["m0", "m1"]), **fields)


def energy(lr_image: Tensor, sr_image: Tensor, hr_image: Tensor | None) -> float:
    return float(sr_image.float().diff(dim=2).square().mean())


def closeness(lr_image: Tensor, sr_image: Tensor, hr_image: Tensor | None) -> float:
    assert hr_image is not None
    return -float((sr_image.float() - hr_image.float()).square().mean())


def test_a_group_is_a_pure_function_of_sample_and_seed() -> None:
    torch.manual_seed(0)
    first = build_group(sample(), settings(artefacts_per_group=3, candidates_per_group=6))
    torch.manual_seed(1)
    again = build_group(sample(), settings(artefacts_per_group=3, candidates_per_group=6))
    assert first is not None and again is not None and first.choices == again.choices
    assert all(torch.equal(a.image, b.image) for a, b in zip(first.candidates, again.candidates, strict=True))
    other = build_group(sample(), settings(artefacts_per_group=3, candidates_per_group=6, seed=1))
    assert other is not None and [m.kind for m in other.candidates] != [m.kind for m in first.candidates]


@pytest.mark.parametrize("number", range(6))
def test_the_known_order_is_what_construction_says(number: int) -> None:
    built = build_group(sample(number), settings(artefacts_per_group=2, candidates_per_group=7, min_difference=0.0))
    assert built is not None and len(built.candidates) == 7 and not built.ranks
    hr = next(n for n, made in enumerate(built.candidates) if (made.generator, made.kind) == ("hr", ""))
    pairs = {(choice.first, choice.second) for choice in built.choices}
    assert {(hr, n) for n in range(7) if n != hr} <= pairs
    severities = {
        tuple(sorted((a, b)))
        for a, b in itertools.combinations(range(7), 2)
        if built.candidates[a].kind and built.candidates[a].kind == built.candidates[b].kind
    }
    assert len(severities) == 2 and pairs == {(hr, n) for n in range(7) if n != hr} | {
        pair for pair in pairs if tuple(sorted(pair)) in severities
    }
    assert len(pairs) == 6 + 2
    assert all(choice.preferred == "first" and choice.annotator == "" for choice in built.choices)


def test_the_severe_one_is_the_one_that_changes_more() -> None:
    ahead = 0
    for number in range(8):
        made, known = make_candidates(
            sample(number), settings(artefacts=["blur"], include_hr=False), stateless_generator(0, "t", number)
        )
        ((mild, severe),) = known
        hr_image = sample(number).hr_image
        assert hr_image is not None and (made[mild].kind, made[severe].kind) == ("blur", "blur")
        distances = [(made[n].image.float() - hr_image.float()).square().mean() for n in (mild, severe)]
        ahead += distances[0] < distances[1]
    assert ahead == 8


def test_artefacts_on_a_method_are_worse_than_that_method_and_say_nothing_of_others() -> None:
    made, known = make_candidates(
        sample(), settings(include_hr=False, artefacts_on="method"), stateless_generator(0, "t")
    )
    assert [one.kind for one in made[:2]] == ["", ""] and len(made) == 4
    base = next(n for n in (0, 1) if made[n].generator == made[2].generator)
    assert known == {(base, 2), (base, 3), (2, 3)}


def test_without_hr_images_only_methods_and_their_artefacts_are_left() -> None:
    blind = dataclasses.replace(sample(), hr_image=None)
    built = build_group(blind, settings(include_hr=False, artefacts_on="method", label="none"))
    assert built is not None and not built.choices and not built.ranks
    assert {made.generator for made in built.candidates} == {"m0", "m1"}


def test_where_a_candidate_stands_tells_nothing() -> None:
    places = set()
    for number in range(12):
        built = build_group(sample(number), settings())
        assert built is not None
        places |= {n for n, made in enumerate(built.candidates) if (made.generator, made.kind) == ("hr", "")}
    assert places == {0, 1, 2, 3}


# Distinct candidates, worthwhile pairs


def test_copies_and_near_copies_are_left_out() -> None:
    image = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    made = [Made(image + shift, f"m{shift}") for shift in (0, 0, 1, 3, 4)]
    assert distinct(made, 0.0) == [0, 2, 3, 4]
    assert distinct(made, 2.0) == [0, 3]
    alike = dataclasses.replace(sample(), sr_images={"m0": image, "m1": image}, hr_image=image)
    assert build_group(alike, settings(artefacts=[], candidates_per_group=2)) is None


def test_the_pairs_with_most_weight_are_chosen() -> None:
    weights = torch.zeros(5, 5)
    for (a, b), weight in {(1, 3): 5.0, (3, 4): 2.0, (0, 1): 1.0}.items():
        weights[a, b] = weights[b, a] = weight
    assert choose_candidates(weights, 2) == [1, 3]
    assert choose_candidates(weights, 3) == [1, 3, 4]
    assert choose_candidates(weights, 5) == [0, 1, 3, 4]  # 2 is worth comparing with nothing
    assert choose_candidates(torch.zeros(3, 3), 3) == [] == choose_candidates(torch.zeros(0, 0), 2)


def test_two_scores_disagree_where_they_order_a_pair_in_opposite_ways() -> None:
    found = disagreement([1.0, 2.0, 3.0, math.nan], [5.0, 7.0, 6.0, 9.0])
    assert found.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert not disagreement([1.0, 2.0], [1.0, 2.0]).any()
    assert disagreement([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])[0, 2] == 4


def test_contested_candidates_are_those_that_two_metrics_put_in_opposite_orders() -> None:
    wanted = settings(choose="contested", candidates_per_group=2, label="none", artefacts_per_group=3)
    for number in range(4):
        built = build_group(sample(number), wanted, rivals=(closeness, energy))
        assert built is not None
        photo = sample(number)
        first, second = (
            [score(photo.lr_image, made.image, photo.hr_image) for made in built.candidates]
            for score in (closeness, energy)
        )
        assert (first[0] - first[1]) * (second[0] - second[1]) < 0
    assert build_group(sample(), wanted, rivals=(closeness, closeness)) is None


def test_a_constructed_label_chooses_only_candidates_whose_order_is_known() -> None:
    for number in range(6):
        built = build_group(sample(number), settings(include_hr=False, candidates_per_group=4))
        assert built is not None
        # The methods' images are ordered by nothing: one mild and one severe artefact are left.
        assert [made.generator for made in built.candidates] == ["hr", "hr"] and len(built.choices) == 1


# Labels by a metric


def test_ranks_follow_the_metric_and_margins_tie() -> None:
    assert rank_by([3.0, 1.0, 2.0]) == (1, 3, 2)
    assert rank_by([1.0, math.nan, 1.0, 0.0]) == (1, None, 1, 2)
    assert rank_by([0.0, 0.4, 0.9, 2.0], tie_margin=0.5) == (2, 2, 2, 1)
    assert rank_by([]) == () and rank_by([math.nan]) == (None,)
    assert rank_by([math.inf, 1.0, -math.inf]) == (1, 2, 3)


def test_a_metric_labels_by_ranks() -> None:
    built = build_group(sample(), settings(label="closeness"), score=closeness)
    assert built is not None and not built.choices
    values = [closeness(sample().lr_image, made.image, sample().hr_image) for made in built.candidates]
    assert built.ranks == rank_by(values)
    assert build_group(sample(), settings(label="closeness", tie_margin=1e9), score=closeness) is None
    assert build_group(sample(), settings(label="closeness"), score=lambda *images: math.nan) is None


@pytest.mark.parametrize(
    ("fields", "has_hr", "key", "message"),
    [
        ({"artefacts": ["blurr"]}, True, "artefacts", "unknown artefact 'blurr'"),
        ({"label": "human"}, True, "label", "only people"),
        ({}, False, "include_hr", "no HR images"),
        ({"include_hr": False}, False, "artefacts_on", "no HR images"),
        ({"artefacts_on": "method", "methods": []}, True, "artefacts_on", "no method"),
        ({"include_hr": False, "artefacts": []}, True, "label", "no order is known"),
        ({"include_hr": False, "artefacts_per_group": 0}, True, "label", "no order is known"),
        ({"candidates_per_group": 6}, True, "candidates_per_group", "5 candidates are made, 6"),
        ({"choose": "contested", "contested_by": ["psnr_y"]}, True, "contested_by", "1 metrics"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict, has_hr: bool, key: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_build_arguments(settings(**fields), has_hr=has_hr)
    assert caught.value.where == key
    check_build_arguments(settings(), has_hr=True)
