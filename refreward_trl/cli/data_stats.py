"""`refreward data stats DATA`: what a preference dataset holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refreward_trl.cli.parser import CommandParser

_MOST_SIZES = 6


def main(argv: list[str]) -> None:
    """Prints the figures as text or JSON."""
    parser = CommandParser(
        "data stats",
        "What a preference dataset holds: groups, candidates, pairs, ties, win rates, agreement, sources, sizes.",
        "refreward data stats prefs --split train",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder with metadata.jsonl, or parquet")
    parser.add_argument("--split", help="look at this split alone, or at several: train+val")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_words(argv)

    from refreward_trl.data.preference_files import read_preferences
    from refreward_trl.data.preference_stats import preference_stats

    stats = preference_stats(read_preferences(arguments.data, split=arguments.split))
    print(json.dumps(stats, indent=2, ensure_ascii=False) if arguments.json else as_text(stats))


def as_text(stats: Mapping[str, Any]) -> str:
    """Lays the figures out for reading."""
    lines = [
        f"{'groups':<14} {stats['groups']} of {stats['photos']} photos; {stats['unlabelled_groups']} unlabelled, "
        f"{stats['groups_with_hr']} with an HR image"
    ]
    for label, key in (
        ("candidates", "candidates"),
        ("splits", "splits"),
        ("sources", "sources"),
        ("degradations", "degradations"),
        ("LR sizes", "lr_sizes"),
        ("scales", "scales"),
    ):
        lines.append(f"{label:<14} {_listed(stats[key])}")
    for aspect, found in stats["aspects"].items():
        lines.append(
            f"{aspect:<14} {found['ordered_pairs']} ordered pairs and {found['ties']} ties in {found['groups']} groups"
        )
    for aspect, rows in stats["generators"].items():
        lines += ["", *_win_rates(aspect, rows)]
    if stats["annotators"]:
        lines += ["", *_agreements(stats["annotators"])]
    return "\n".join(lines)


def _listed(counts: Mapping[str, int]) -> str:
    shown = [f"{name}: {count}" for name, count in counts.items()][:_MOST_SIZES]
    return ", ".join(shown) + (f", and {len(counts) - _MOST_SIZES} more" if len(counts) > _MOST_SIZES else "")


def _win_rates(aspect: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    width = max(len("method"), *map(len, rows))
    yield f"{'method':<{width}}  {'wins':>6}  {'ties':>6}  {'losses':>6}  win rate ({aspect})"
    for name, row in rows.items():
        yield (
            f"{name:<{width}}  {row['wins']:>6}  {row['ties']:>6}  {row['losses']:>6}  {100 * row['win_rate']:>7.1f} %"
        )


def _agreements(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    width = max(len("annotator"), *map(len, rows))
    yield f"{'annotator':<{width}}  answers  compared  agreement with the others"
    for name, row in rows.items():
        agreement = "-" if row["agreement"] is None else f"{100 * row['agreement']:.1f} %"
        yield f"{name:<{width}}  {row['answers']:>7}  {row['compared']:>8}  {agreement}"
