"""Splits of a preference dataset by photo, so that nothing that is learned from is measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from refreward_trl.data.perceptual_hash import SAME_VIEW, near_pairs
from refreward_trl.data.preference_records import PreferenceRecord
from refreward_trl.errors import ConfigError, DataError
from refreward_trl.randomness import stateless_seed


def photo_clusters(
    records: Sequence[PreferenceRecord], hashes: Sequence[Tensor | None], distance: int = SAME_VIEW
) -> list[tuple[str, ...]]:
    """Returns the photos in clusters: those that must not be told apart by a split, because LR images of theirs look
    alike (see `perceptual_hash`). Photos and clusters are sorted by name."""
    parents = {record.photo: record.photo for record in records}

    def root(photo: str) -> str:
        while parents[photo] != photo:
            photo = parents[photo]
        return photo

    for first, second, _ in near_pairs(hashes, distance):
        low, high = sorted((root(records[first].photo), root(records[second].photo)))
        parents[high] = low
    clusters: dict[str, list[str]] = {}
    for photo in sorted(parents):
        clusters.setdefault(root(photo), []).append(photo)
    return [tuple(photos) for photos in clusters.values()]


def assign_splits(
    clusters: Sequence[Sequence[str]], fractions: Mapping[str, float], *, seed: int = 0
) -> dict[str, str]:
    """Gives each photo a split.

    Args:
        clusters: Photos that stay together.
        fractions: Split -> share of the photos; they add up to 1.
        seed: Of the order in which clusters are dealt out, each to the split that lacks most photos.

    Raises:
        ConfigError: The fractions are not positive, or do not add up to 1.
        DataError: There are too few clusters for so many splits.
    """
    if any(not 0 < share <= 1 for share in fractions.values()) or not math.isclose(sum(fractions.values()), 1):
        shown = ", ".join(f"{name}={share:g}" for name, share in fractions.items())
        raise ConfigError(
            f"the fractions {shown} are no shares of 1",
            where="fractions",
            fix="give each split a positive share, all together 1",
        )
    if len(clusters) < len(fractions):
        raise DataError(
            f"{len(clusters)} photos (near-duplicates count once) for {len(fractions)} splits",
            where="split",
            fix="use fewer splits, or more photos",
        )
    photos = sum(map(len, clusters))
    order = sorted(clusters, key=lambda cluster: stateless_seed(seed, "preference_split", *cluster))
    counts = dict.fromkeys(fractions, 0)
    splits: dict[str, str] = {}
    for number, cluster in enumerate(order):
        empty = [name for name in fractions if counts[name] == 0]
        # As many clusters are left as splits are empty: each of those gets one.
        choices = empty if len(order) - number <= len(empty) else list(fractions)
        chosen = max(choices, key=lambda name: fractions[name] * photos - counts[name])
        counts[chosen] += len(cluster)
        splits |= dict.fromkeys(cluster, chosen)
    return splits
