"""`refreward data validate DATA`: everything that is wrong with a preference dataset, in one pass."""

from __future__ import annotations

import json
from pathlib import Path

from refreward_trl.cli.parser import CommandParser
from refreward_trl.errors import DataError

KINDS = {
    "size": "an SR image is no whole multiple of its LR image",
    "equal": "candidates have the same pixels",
    "contradiction": "an order goes round in a circle, or someone answers in two ways",
    "leak": "a photo is in two splits, by its name or because LR images look alike",
}
"""What can be skipped; rows and images that cannot be read are always told."""


def main(argv: list[str]) -> int | None:
    """Prints what is wrong, or that all is well."""
    parser = CommandParser(
        "data validate",
        "Read every row and image of a preference dataset and report all that is wrong: missing or damaged images, "
        "impossible\nrows, and\n" + "\n".join(f"  {kind:<14} {text}" for kind, text in KINDS.items()),
        "refreward data validate prefs\n  refreward data validate prefs --skip leak equal --json",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="a folder with metadata.jsonl, or parquet")
    parser.add_argument("--split", help="look at this split alone, or at several: train+val")
    parser.add_argument("--skip", nargs="+", default=[], choices=KINDS, metavar="KIND", help="do not look for these")
    parser.add_argument(
        "--hash-distance", type=int, default=10, metavar="BITS",
        help="LR images whose 63-bit hashes differ in at most so many bits show one view (default 10)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the problems as JSON")
    arguments = parser.parse_words(argv)

    from tqdm import tqdm

    from refreward_trl.data.preference_checks import check_preferences
    from refreward_trl.data.preference_files import scan_preferences
    from refreward_trl.data.sources import report_problems

    scan = scan_preferences(arguments.data, split=arguments.split)
    findings = check_preferences(
        scan,
        skip=arguments.skip,
        hash_distance=arguments.hash_distance,
        progress=lambda records: tqdm(records, desc="validate", unit="group"),
    )
    if arguments.json:
        problems = [{"kind": kind, "where": e.where, "what": e.what, "fix": e.fix} for kind, e in findings]
        print(json.dumps({"rows": scan.rows, "problems": problems}, indent=2))
        return DataError.exit_code if findings else None
    errors = [finding.error for finding in findings]
    report_problems(errors, max(scan.rows, len(errors)), str(arguments.data), listed=len(errors))
    images = sum(1 + len(r.candidates) + (r.hr_image is not None) for r in scan.records)
    print(f"{arguments.data}: ok, {len(scan.records)} groups, {images} images")
    return None
