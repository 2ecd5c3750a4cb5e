"""`refreward data`: convert, check, describe, split and build preference datasets."""

from __future__ import annotations

import importlib

from refreward_trl.cli.parser import did_you_mean
from refreward_trl.errors import ConfigError

ACTIONS = ("convert", "validate", "stats", "split", "build")

HELP = """usage: refreward data <action> [options]

Preference datasets: the candidates of LR images, and which of them is better.

  convert IN OUT [--from FORMAT] [--format imagefolder|parquet] [--columns KEY=NAME ...]
                 read another layout: RefSR-18K style folders, TRL, Pick-a-Pic, Label Studio
  validate DATA  [--split NAME] [--skip KIND ...] [--hash-distance BITS] [--json]
                 read every image; report every bad row, contradiction and leak in one pass
  stats DATA     [--split NAME] [--json]
                 groups, candidates, pairs, ties, win rates, agreement, sources, sizes
  split DATA     [OUT] [--fractions NAME=SHARE ...] [--seed N] [--hash-distance BITS]
                 by photo, never by crop; photos that look alike stay together
  build --config RECIPE [--key value ...]
                 make candidates of photos by SR methods and artefacts, and label them

`refreward data <action> --help` explains an action.

A dataset is a folder with metadata.jsonl, one group a line; the images lie beside it:
  {"sample_id": "a@0", "photo": "a", "lr_file_name": "a/lr.png", "candidates_file_names": ["a/0.png", "a/1.png"],
   "generators": ["bicubic", "mine"], "ranks": [2, 1], "source": "human",
   "choices": [{"first": 0, "second": 1, "preferred": "second", "aspect": "consistency", "annotator": "ann"}]}
or parquet with the images in the columns lr, hr and candidates. Ranks: lower is better, equal is a tie, null is not
ranked. Aspects: overall (ranks), consistency (consistency_ranks), naturalness (naturalness_ranks).

examples:
  refreward data convert export.json prefs --from labelstudio
  refreward data validate prefs
  refreward data split prefs --fractions train=0.8 val=0.1 test=0.1
  refreward data build --config recipes/tiny/preferences.yaml"""


def main(argv: list[str]) -> int | None:
    """Runs one of the actions."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        raise SystemExit(0)
    action, *words = argv
    if action not in ACTIONS:
        raise ConfigError(
            f"there is no action {action!r}{did_you_mean(action, ACTIONS)}",
            where="refreward data",
            fix=f"one of {', '.join(ACTIONS)}",
        )
    return importlib.import_module(f"refreward_trl.cli.data_{action}").main(words)
