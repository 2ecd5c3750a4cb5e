"""`refreward upscale IN OUT`: super-resolve images of any size with a generator."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from refreward_trl.cli.parser import CommandParser
from refreward_trl.errors import ConfigError

MAX_SCALE = 64.0
KINDS = ("png", "jpg", "webp", "tif")


def main(argv: list[str]) -> None:
    """Upscales the images, prints a line about them, and raises a `DataError` if any failed."""
    arguments = _parser().parse_words(argv)
    _check(arguments)

    from refreward_trl.cli.upscale_jobs import find_jobs

    jobs = find_jobs(arguments.source, arguments.target, kind=arguments.format, recursive=arguments.recursive)

    from refreward_trl.cli.upscale_run import UpscaleOptions, run

    names = {name: value for name, value in vars(arguments).items() if name in UpscaleOptions.__dataclass_fields__}
    run(jobs, UpscaleOptions(**names))


def _parser() -> CommandParser:
    parser = CommandParser(
        "upscale",
        "Super-resolve an image, or a folder of images, of any size: in overlapping tiles, in bounded memory.",
        "refreward upscale photos photos_x4 --recursive --json photos_x4/manifest.json",
    )
    add = parser.add_argument
    add("source", type=Path, metavar="IN", help="image (png, jpg, webp, tif, bmp) or folder of images")
    add("target", type=Path, metavar="OUT", help="image file or folder; an input is never overwritten")
    add(
        "--generator",
        default="default",
        metavar="NAME",
        help="default, a saved folder, a published checkpoint (osediff.pkl, ...), or package.module:attribute",
    )
    add("--family", metavar="NAME", help="of a published checkpoint that does not show it, e.g. naosd")
    add("--base-model", metavar="NAME", help="folder or hub id that a published checkpoint builds on")
    add(
        "--scale",
        type=float,
        metavar="FACTOR",
        help="any factor from 1; default: the generator's own (x4). Below it the result is reduced, above it the "
        "input is first enlarged by bicubic; sizes are exactly round(FACTOR * size)",
    )
    add(
        "--tile",
        type=_tile,
        default="auto",
        metavar="auto|N",
        help="side of a tile in output pixels, at least 64; auto: 512, on a GPU 1024",
    )
    add("--overlap", type=_number(0), metavar="N", help="pixels that tiles share; default: a quarter of the tile")
    add("--color-fix", choices=("adain", "wavelet", "none"), help="default: the generator's own")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the networks")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    add("--batch-size", type=_number(1), default=1, metavar="N", help="equal tiles per forward (default 1)")
    add("--seed", type=_number(0), default=0, metavar="N", help="of the noise, for generators that take noise")
    add("--prompt", metavar="TEXT", help="for generators with a text encoder; default: the fixed prompt")
    add("--recursive", action="store_true", help="folders in IN too")
    add("--skip-existing", action="store_true", help="leave outputs that exist as they are, to go on where it stopped")
    add("--format", choices=KINDS, help="of the outputs; default: the input's, or OUT's ending")
    add("--quality", type=_number(1, 100), default=95, metavar="N", help="jpg and webp; webp 100 is lossless")
    add("--json", type=Path, metavar="MANIFEST", help="write settings, versions and one entry per image")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    """Checks what no single option shows. Raises `ConfigError`."""
    scale = arguments.scale
    if scale is not None and not (math.isfinite(scale) and 1 <= scale <= MAX_SCALE):
        raise ConfigError(f"the scale is {scale:g}", where="--scale", fix=f"use a number from 1 to {MAX_SCALE:g}")
    if arguments.overlap is not None and arguments.tile != "auto" and arguments.overlap >= arguments.tile:
        raise ConfigError(
            f"tiles of {arguments.tile} pixels cannot share {arguments.overlap}",
            where="--overlap",
            fix="share less than a tile; a quarter of it is the default",
        )


def _number(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    def read(word: str) -> int:
        try:
            value = int(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{word!r} is no whole number") from error
        if value < lowest or (highest is not None and value > highest):
            bounds = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"{word} is out of range; use {bounds}")
        return value

    return read


def _tile(word: str) -> int | str:
    return word if word == "auto" else _number(64)(word)
