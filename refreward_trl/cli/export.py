"""`refreward export`: a generator in the format that other programs read."""

from __future__ import annotations

from pathlib import Path

from refreward_trl.cli.parser import CommandParser
from refreward_trl.errors import ConfigError

DESCRIPTION = """Write an aligned generator for other programs.

  published   in the format of the checkpoint that it was made of (osediff.pkl, pisa_sr.pkl, HYPIR_sd2.pth, the
              folder of TSD-SR), for the authors' own code
  lora        the trained adapter alone, as diffusers' load_lora_adapter reads it (a folder)
  diffusers   a folder into which everything is merged: unet/ (or transformer/), vae/, scheduler/"""


def main(argv: list[str]) -> None:
    """Writes one generator."""
    parser = CommandParser(
        "export", DESCRIPTION, "refreward export runs/osediff_sd21/refl/generator aligned.pkl --format published"
    )
    parser.add_argument("generator", metavar="GENERATOR", help="folder of a saved generator")
    parser.add_argument("out", type=Path, metavar="OUT", help="the file or folder to write; must not be there")
    parser.add_argument("--format", choices=("published", "lora", "diffusers"), required=True, dest="file_format")
    arguments = parser.parse_words(argv)
    if arguments.out.exists():
        raise ConfigError("it is there already", where=str(arguments.out), fix="name a new file or folder")
    from refreward_trl.generators import load_generator
    from refreward_trl.generators.export import export_generator

    generator = load_generator(arguments.generator)
    export_generator(generator, arguments.out, arguments.file_format)
    print(f"wrote {arguments.out}")
