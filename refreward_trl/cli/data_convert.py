"""`refreward data convert IN OUT`: reads preference data in another layout and writes them in ours."""

from __future__ import annotations

from pathlib import Path

from refreward_trl.cli.parser import CommandParser
from refreward_trl.errors import ConfigError

FORMATS = ("refsr", "trl", "pickapic", "labelstudio", "native")

DESCRIPTION = """Read preference data in another layout, and write them as an imagefolder or as parquet.

  refsr        a folder per group: lr.png, hr.png, and candidates named by their methods; ranks.csv, .json or .jsonl
               beside them with group, candidate, rank. Layout not verified on the release of RefSR-18K
  trl          prompt, chosen, rejected, images = [LR, A, B, ...]; chosen and rejected are letters, <answer>A</answer>,
               or images themselves; plain or conversational
  pickapic     jpg_0, jpg_1, label_0, label_1, and an LR image in lr_image or lr
  labelstudio  the full JSON export of pairwise tasks whose data have lr, left and right
  native       our own two formats, one into the other

Rows about one LR image become one group. Keys that have other names in the data: --columns KEY=NAME, with
  refsr        group candidate rank ranks aspect photo split
  trl          images chosen rejected lr hr sample_id photo generators chosen_generator rejected_generator aspect
               annotator weight
  pickapic     lr hr jpg_0 jpg_1 label_0 label_1 has_label model_0 model_1 user_id sample_id photo aspect weight
  labelstudio  lr hr left right left_generator right_generator sample_id photo split"""


def main(argv: list[str]) -> None:
    """Converts, and says what was found."""
    parser = CommandParser(
        "data convert",
        DESCRIPTION,
        "refreward data convert RefSR-18K prefs --lr-name LQ --columns group=id rank=order\n"
        "  refreward data convert pairs.parquet prefs --from pickapic --columns lr=low_res --format parquet",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="a file or a folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--from", dest="layout", choices=("auto", *FORMATS), default="auto", metavar="FORMAT",
                        help=f"one of {', '.join(FORMATS)}; default: found out")  # fmt: skip
    parser.add_argument("--format", choices=("imagefolder", "parquet"), default="imagefolder", help="of OUT")
    parser.add_argument("--columns", nargs="+", default=[], metavar="KEY=NAME", help="what keys are called in IN")
    parser.add_argument("--source", dest="order", metavar="NAME",
                        help="who gave the order, e.g. human (the default of labelstudio; else unknown)")  # fmt: skip
    parser.add_argument("--images", type=Path, metavar="DIR", help="where the files lie that a table names")
    parser.add_argument("--chosen-first", action="store_true", help="trl: images are [LR, chosen, rejected]")
    parser.add_argument("--lr-name", default="lr", metavar="NAME", help="refsr: name of LR images (default lr)")
    parser.add_argument("--hr-name", default="hr", metavar="NAME", help="refsr: name of HR images (default hr)")
    parser.add_argument("--ranks-table", type=Path, metavar="FILE", help="refsr: the table of ranks")
    arguments = parser.parse_words(argv)

    from refreward_trl.data.preference_converters import ConvertOptions, convert_preferences, detect_format
    from refreward_trl.data.preference_files import check_new_folder, write_preferences

    options = ConvertOptions(
        columns=dict(map(_column, arguments.columns)),
        source=arguments.order,
        images=arguments.images,
        chosen_first=arguments.chosen_first,
        lr_name=arguments.lr_name,
        hr_name=arguments.hr_name,
        ranks_table=arguments.ranks_table,
    )
    check_new_folder(arguments.out)
    layout = arguments.layout if arguments.layout != "auto" else detect_format(arguments.source)
    records = convert_preferences(arguments.source, layout, options)
    write_preferences(records, arguments.out, format=arguments.format)
    candidates = sum(len(record.candidates) for record in records)
    print(f"read {arguments.source} as {layout}: {len(records)} groups, {candidates} candidates")
    if layout == "refsr":
        print("the layout was not verified on the release of RefSR-18K: look at some groups")
    print(f"wrote {arguments.out}; check it: refreward data validate {arguments.out}")


def _column(word: str) -> tuple[str, str]:
    key, equals, name = word.partition("=")
    if not (key and equals and name):
        raise ConfigError(f"{word!r} is no KEY=NAME", where="--columns", fix="write for example lr=low_res")
    return key, name
