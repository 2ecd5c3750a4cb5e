"""Checks name every kind of fault; hashes tell views apart; splits keep photos and look-alikes together."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refreward_trl.data.degradations import degrade
from refreward_trl.data.image_sources import ImageFile, ImageTensor
from refreward_trl.data.images import read_image, to_float, to_pil, to_uint8
from refreward_trl.data.perceptual_hash import SAME_VIEW, near_pairs, perceptual_hash
from refreward_trl.data.preference_checks import KINDS, check_preferences, find_circle
from refreward_trl.data.preference_files import Scan
from refreward_trl.data.preference_splits import assign_splits, photo_clusters
from refreward_trl.data.preference_stats import agreements, preference_stats, win_rates
from refreward_trl.data.preferences import Candidate, PreferenceChoice, PreferenceRecord
from refreward_trl.data.sources import default_photos
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.randomness import stateless_generator


def noise(number: int, height: int = 16, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


def group(sample_id: str = "a@0", count: int = 3, **fields: Any) -> PreferenceRecord:
    photo = sample_id.partition("@")[0]
    lr_image = ImageTensor(noise(sum(map(ord, photo))))
    candidates = tuple(Candidate(ImageTensor(noise(1000 + k, 32, 32)), f"m{k}") for k in range(count))
    return PreferenceRecord(sample_id, photo, **{"lr_image": lr_image, "candidates": candidates, **fields})


def check(*records: PreferenceRecord, **options: Any) -> list[tuple[str, str]]:
    scan = Scan(list(records), [f"row {n}" for n in range(len(records))], [], len(records))
    return [(kind, str(error)) for kind, error in check_preferences(scan, **options)]


def choice(first: int, second: int, preferred: Any = "first", annotator: str = "", **rest: Any) -> PreferenceChoice:
    return PreferenceChoice(first, second, preferred, annotator=annotator, **rest)


def test_a_good_dataset_has_no_findings() -> None:
    ranks = {"overall": (1, 2, 2), "naturalness": (3, 2, 1)}
    assert check(group("a@0", ranks=ranks), group("a@1"), group("b@0", choices=(choice(0, 1), choice(1, 2)))) == []


def test_every_fault_of_every_row_is_found_in_one_pass(tmp_path: Path) -> None:
    (tmp_path / "half.png").write_bytes(ImageTensor(noise(1)).encoded()[:100])
    half, fine = Candidate(ImageFile(tmp_path / "half.png")), group("a@0")
    odd, small = (Candidate(ImageTensor(noise(5, side, side))) for side in (40, 8))
    circle = (choice(0, 1), choice(1, 2), choice(2, 0))
    found = check(
        replace(fine, sample_id="bad@0", lr_image=half.image, candidates=(*fine.candidates, half)),
        replace(fine, sample_id="odd@0", candidates=(*fine.candidates, odd, small)),
        replace(fine, sample_id="same@0", candidates=(*fine.candidates, fine.candidates[1])),
        replace(fine, sample_id="circle@0", choices=circle),
        replace(fine, split="train"),
        replace(fine, sample_id="a@1", split="val"),
    )
    assert Counter(kind for kind, _ in found) == {"image": 2, "size": 2, "equal": 1, "contradiction": 1, "leak": 2}
    texts = "\n".join(text for _, text in found)
    assert "row 0 (bad@0): the LR image: the image is damaged" in texts and "candidate 3: the image is dam" in texts
    assert "row 1 (odd@0): candidate 3 has 40x40 pixels, no whole multiple" in texts
    assert "row 1 (odd@0): candidate 4 has 8x8 pixels, smaller than" in texts
    assert "row 2 (same@0): candidates 1 and 3 have the same pixels" in texts
    assert "row 3 (circle@0): the overall order of the candidates goes round in a circle: 0 > 1 > 2 > 0" in texts
    assert set(Counter(kind for kind, _ in found)) | {"row"} == set(KINDS)


@pytest.mark.parametrize("kind", ["size", "equal", "contradiction", "leak"])
def test_what_is_skipped_is_not_told(kind: str) -> None:
    records = [
        replace(group("a@0"), candidates=(Candidate(ImageTensor(noise(5, 8, 8))),) * 2, split="train"),
        replace(group("a@1"), choices=(choice(0, 1, annotator="x"), choice(1, 0, annotator="x")), split="val"),
    ]
    everything = {found for found, _ in check(*records)}
    assert everything == {"size", "equal", "contradiction", "leak"}
    assert {found for found, _ in check(*records, skip=[kind])} == everything - {kind}


def test_contradictions_are_those_of_one_person_or_of_all_votes_together() -> None:
    same = (choice(0, 1, annotator="ann"), choice(1, 0, "first", "ann"))
    ((_, text),) = check(group(choices=same))
    assert "annotator 'ann' answers in 2 ways how candidates 0 and 1 compare in overall" in text
    # Several people may disagree, and people unknown may be several.
    assert not check(group(choices=(choice(0, 1, annotator="ann"), choice(1, 0, annotator="bob"))))
    assert not check(group(choices=(choice(0, 1), choice(1, 0))))
    # Other aspects are other questions; ties close no circle.
    assert not check(group(choices=(choice(0, 1, annotator="x"), choice(1, 0, annotator="x", aspect="consistency"))))
    assert not check(group(choices=(choice(2, 1), choice(1, 0), choice(0, 2, "tie"))))
    # Ranks and choices can close a circle together.
    assert check(group(ranks={"overall": (1, 2, None)}, choices=(choice(1, 2), choice(2, 0))))


@pytest.mark.parametrize("length", range(2, 7))
def test_any_circle_is_found_and_no_order_is_one(length: int) -> None:
    order = [(a, b) for a in range(length) for b in range(a + 1, length)]
    assert find_circle(order) is None
    ring = [(a, (a + 1) % length) for a in range(length)]
    circle = find_circle([(0, length), *ring])
    assert circle is not None and circle[0] == circle[-1] and len(circle) == length + 1
    assert set(itertools.pairwise(circle)) <= set(ring)


# Hashes and splits


@functools.cache
def views() -> dict[str, list[Tensor]]:
    """LR images of some default photos by two presets each, and of another crop."""
    made = {}
    for path in default_photos("val"):
        photo = to_float(read_image(path))[:, :320, :320]
        both = [
            degrade(photo, preset, generator=stateless_generator(0, "hash", path.stem), scale=4)
            for preset in ("bicubic", "seesr")
        ]
        made[path.stem] = [to_uint8(lr_image) for lr_image in both]
    return made


def test_degraded_copies_are_near_and_other_photos_far() -> None:
    hashes = [perceptual_hash(image) for pair in views().values() for image in pair]
    near = {(first, second) for first, second, _ in near_pairs(hashes)}
    assert near == {(number, number + 1) for number in range(0, len(hashes), 2)}
    assert all(bits <= SAME_VIEW for _, _, bits in near_pairs(hashes))


def test_distances_are_those_of_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    from refreward_trl.data import perceptual_hash as module

    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 3)
    codes = torch.randint(2, (10, 63), generator=torch.Generator().manual_seed(0)).bool()
    hashes = [None if n == 4 else code for n, code in enumerate(codes)]
    found = {(a, b): bits for a, b, bits in near_pairs(hashes, 63)}
    wanted = {(a, b): int((codes[a] ^ codes[b]).sum()) for a in range(10) for b in range(a + 1, 10) if 4 not in (a, b)}
    assert found == wanted


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (32, 32)])
def test_flat_images_of_any_size_have_no_hash(size: tuple[int, int]) -> None:
    assert perceptual_hash(torch.full((3, *size), 120, dtype=torch.uint8)) is None


def renamed(split: bool = False) -> list[PreferenceRecord]:
    """Groups whose photos look alike two by two, under other names."""
    return [
        replace(group(f"{name}-{number}@0"), lr_image=ImageTensor(image), split=f"s{number}" if split else "")
        for name, images in views().items()
        for number, image in enumerate(images)
    ]


def test_photos_that_look_alike_are_a_leak_whatever_they_are_called() -> None:
    records = [
        replace(r, candidates=tuple(Candidate(ImageTensor(noise(k, 160, 160))) for k in (0, 1))) for r in renamed(True)
    ]
    found = check(*records)
    assert [kind for kind, _ in found] == ["leak"] * len(views())
    assert "looks like" in found[0][1] and "of 63 bits" in found[0][1]
    assert check(*records, hash_distance=-1) == []
    assert check(*(replace(record, split="") for record in records)) == []


def test_clusters_join_what_looks_alike() -> None:
    records = renamed()
    hashes = [perceptual_hash(record.lr_image.read()) for record in records]
    assert photo_clusters(records, hashes) == [(f"{name}-0", f"{name}-1") for name in sorted(views())]
    assert len(photo_clusters(records, [None] * len(records))) == len(records)


@pytest.mark.parametrize("seed", range(5))
def test_splits_have_their_shares_and_keep_clusters_together(seed: int) -> None:
    clusters = [(f"p{n}",) for n in range(90)] + [("twin0", "twin1"), *((f"t{k}a", f"t{k}b") for k in range(4))]
    splits = assign_splits(clusters, {"train": 0.8, "val": 0.1, "test": 0.1}, seed=seed)
    assert all(len({splits[photo] for photo in cluster}) == 1 for cluster in clusters)
    counts = Counter(splits.values())
    assert counts.total() == 100 and abs(counts["train"] - 80) <= 1 and abs(counts["val"] - 10) <= 1
    assert splits == assign_splits(clusters[::-1], {"train": 0.8, "val": 0.1, "test": 0.1}, seed=seed)
    assert splits != assign_splits(clusters, {"train": 0.8, "val": 0.1, "test": 0.1}, seed=seed + 1)


def test_small_splits_get_a_photo_too_or_an_error() -> None:
    splits = assign_splits([("a",), ("b",), ("c",)], {"train": 0.98, "val": 0.01, "test": 0.01})
    assert set(splits.values()) == {"train", "val", "test"}
    with pytest.raises(DataError, match=r"2 photos .* for 3 splits"):
        assign_splits([("a",), ("b",)], {"train": 0.98, "val": 0.01, "test": 0.01})
    for shares in ({"train": 0.5}, {"train": 1.5, "val": -0.5}):
        with pytest.raises(ConfigError, match="no shares of 1"):
            assign_splits([("a",), ("b",)], shares)


# Figures


def test_win_rates_count_merged_pairs_between_methods() -> None:
    one = group("a@0", ranks={"overall": (1, 2, 3)})
    two = group("b@0", choices=(choice(1, 0), choice(2, 1, "tie")))
    rates = win_rates([one, two], "overall")
    assert {name: (row["wins"], row["ties"], row["losses"]) for name, row in rates.items()} == {
        "m0": (2, 0, 1),
        "m1": (2, 1, 1),
        "m2": (0, 1, 2),
    }
    assert rates["m1"]["win_rate"] == 2.5 / 4 and list(rates)[-1] == "m2"
    same = replace(one, candidates=tuple(replace(c, generator="g") for c in one.candidates))
    assert win_rates([same], "overall") == {}


def test_agreement_is_with_the_others_together() -> None:
    answers = (
        choice(0, 1, annotator="ann"),
        choice(1, 0, "second", "bob"),
        choice(0, 1, "second", "eve"),
        choice(1, 2, annotator="ann"),
    )
    found = agreements([group(choices=answers)])
    assert {name: (row["answers"], row["compared"], row["agreement"]) for name, row in found.items()} == {
        "ann": (2, 1, 0.0),  # bob and eve together: a tie
        "bob": (1, 1, 0.0),
        "eve": (1, 1, 0.0),
    }
    found = agreements([group(choices=(*answers, choice(0, 1, annotator="dan")))])
    assert [found[name]["agreement"] for name in ("ann", "bob", "dan", "eve")] == [1.0, 1.0, 1.0, 0.0]


def test_stats_add_up() -> None:
    records = [
        group("a@0", ranks={"overall": (1, 1, 2)}, source="human"),
        group("a@1", count=5),
        group("b@0", count=5),
    ]
    stats = preference_stats(records)
    assert (stats["groups"], stats["photos"], stats["unlabelled_groups"]) == (3, 2, 2)
    assert stats["candidates"] == {"3": 1, "5": 2} and stats["sources"] == {"human": 1, "unknown": 2}
    assert stats["aspects"] == {"overall": {"groups": 1, "ordered_pairs": 2, "ties": 1}}
    assert stats["lr_sizes"] == {"16x16": 3} and stats["scales"] == {"x2": 13}


def test_a_png_of_a_tensor_is_the_tensor(tmp_path: Path) -> None:
    image = noise(3, 7, 9)
    to_pil(image).save(tmp_path / "a.png")
    assert torch.equal(ImageFile(tmp_path / "a.png").read(), image)
