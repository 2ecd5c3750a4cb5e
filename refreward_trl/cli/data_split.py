"""`refreward data split DATA [OUT]`: splits a preference dataset by photo."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from refreward_trl.cli.parser import CommandParser
from refreward_trl.errors import ConfigError

if TYPE_CHECKING:
    from refreward_trl.data.preference_records import PreferenceRecord

DEFAULT = ("train=0.8", "val=0.1", "test=0.1")


def main(argv: list[str]) -> None:
    """Writes the splits and prints their sizes."""
    parser = CommandParser(
        "data split",
        "Split a preference dataset by photo, never by crop. Photos whose LR images look alike stay together.\n"
        "An imagefolder gets a column `split` in its metadata.jsonl; with OUT, or for parquet, a new dataset is made.",
        "refreward data split prefs --fractions train=0.8 val=0.1 test=0.1 --seed 1\n"
        "  refreward data split prefs.parquet split_prefs --fractions train=0.9 val=0.1",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder with metadata.jsonl, or parquet")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="a new folder for the split dataset")
    parser.add_argument(
        "--fractions", nargs="+", default=DEFAULT, metavar="NAME=SHARE",
        help=f"splits and their shares of the photos (default {' '.join(DEFAULT)})",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    parser.add_argument(
        "--hash-distance", type=int, default=10, metavar="BITS",
        help="LR images whose 63-bit hashes differ in at most so many bits show one view (default 10)",
    )  # fmt: skip
    arguments = parser.parse_words(argv)
    fractions = dict(map(_fraction, arguments.fractions))
    if len(fractions) < len(arguments.fractions):
        parser.error("a split is named twice")
    records = split_records(arguments, fractions)
    _write(records, arguments.data, arguments.out)
    for name in fractions:
        members = [record for record in records if record.split == name]
        print(f"{name}: {len(members)} groups of {len({record.photo for record in members})} photos")


def _fraction(word: str) -> tuple[str, float]:
    name, _, share = word.partition("=")
    try:
        if not name.isidentifier():
            raise ValueError
        return name, float(share)
    except ValueError as error:
        raise ConfigError(
            f"{word!r} is no split and share", where="--fractions", fix="write for example train=0.8"
        ) from error


def split_records(arguments: Namespace, fractions: dict[str, float]) -> list[PreferenceRecord]:
    """Returns the records with their splits."""
    from dataclasses import replace

    from tqdm import tqdm

    from refreward_trl.data.perceptual_hash import perceptual_hash
    from refreward_trl.data.preference_files import read_preferences
    from refreward_trl.data.preference_splits import assign_splits, photo_clusters

    records = read_preferences(arguments.data)
    hashes = [perceptual_hash(record.lr_image.read()) for record in tqdm(records, desc="split", unit="group")]
    clusters = photo_clusters(records, hashes, arguments.hash_distance)
    for photos in clusters:
        if len(photos) > 1:
            print(f"look alike and stay together: {', '.join(photos)}")
    splits = assign_splits(clusters, fractions, seed=arguments.seed)
    return [replace(record, split=splits[record.photo]) for record in records]


def _write(records: list[PreferenceRecord], data: Path, out: Path | None) -> None:
    from refreward_trl.data.preference_files import METADATA_FILE, write_preferences
    from refreward_trl.data.preference_writers import write_split_column

    metadata = data if data.suffix == ".jsonl" else data / METADATA_FILE
    if out is not None:
        write_preferences(records, out, format="imagefolder" if metadata.is_file() else "parquet")
        print(f"wrote {out}")
        return
    if not metadata.is_file():
        raise ConfigError("only a metadata.jsonl can be rewritten", where=str(data), fix="name a new folder as OUT")
    write_split_column(metadata, {record.sample_id: record.split for record in records})
    print(f"wrote {metadata}")
