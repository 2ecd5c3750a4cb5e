"""Finds the command, runs it, and turns its errors into one screen of text and an exit code.

Each command is one module with `main(argv: list[str]) -> int | None`, imported only when its name is given. Command
modules import torch inside functions, so that every `--help` and every mistake in a recipe is answered at once.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from typing import NamedTuple

from refreward_trl import __version__
from refreward_trl.cli.parser import did_you_mean
from refreward_trl.errors import DISK_ERRORS, ConfigError, Preempted, RefRewardError, SetupError
from refreward_trl.signals import STOPPING


class Command(NamedTuple):
    """A line of `refreward --help`."""

    group: str
    name: str
    summary: str


COMMANDS = (
    Command("see it work", "demo", "judge, ReFL, DDPO and a report with pictures, in minutes on a CPU"),
    Command("train", "finetune", "a generator on pairs of low- and high-resolution images"),
    Command("train", "data", "preference datasets: convert, validate, stats, split, build"),
    Command("train", "rm", "a reward model on ranked candidates of one low-resolution image"),
    Command("train", "rm-sft", "a start for a reward model that thinks before it answers"),
    Command("train", "rm-grpo", "a reward model that thinks before it answers, by GRPO on ranking rewards"),
    Command("train", "rm-distill", "let a large or reasoning judge label candidates for a small one"),
    Command("train", "eval-rm", "how good a reward model is, and whether it looks at the low-resolution image"),
    Command("train", "refl", "align a generator by the gradient of a reward"),
    Command("train", "ddpo", "align a generator by policy gradient: the reward may be a black box"),
    Command("train", "doctor", "what a run will take in memory, time and disk, and what helps if it is too much"),
    Command("use", "score", "score super-resolved images against their low-resolution inputs"),
    Command("use", "eval", "compare generators and folders of images, each figure with its protocol"),
    Command("use", "upscale", "super-resolve images of any size: tiles, any scale, folders"),
    Command("use", "export", "an aligned generator for other programs: published formats, LoRA, diffusers"),
    Command("use", "recipes", "list, show, copy or check recipes"),
    Command("use", "env", "versions to paste into a bug report"),
)
NAMES = tuple(command.name for command in COMMANDS)
HEAD_START = 10.0
"""Seconds that the other ranks leave to rank 0 to report a mistake that all of them found."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: The words after the program's name; `sys.argv[1:]` by default. `--debug` may stand anywhere.

    Returns:
        0, the `exit_code` of the `RefRewardError` that ended the command, or 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        return _dispatch(words)
    except RefRewardError as error:
        if debug:
            traceback.print_exc()
        _report_undisturbed(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (say, `head`) has gone; keep Python from complaining again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if debug or error.errno not in DISK_ERRORS:
            raise
        _report(SetupError(DISK_ERRORS[error.errno], where=str(error.filename or "a file that was written")))
        return SetupError.exit_code


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"refreward_trl {__version__}")
        return 0
    if words[0] not in NAMES:
        raise ConfigError(
            f"there is no command {words[0]!r}{did_you_mean(words[0], NAMES)}",
            fix="`refreward --help` lists the commands",
        )
    command = importlib.import_module(f"refreward_trl.cli.{words[0].replace('-', '_')}")
    return command.main(words[1:]) or 0


def _help() -> str:
    lines = [
        "usage: refreward <command> [options]     (or: python -m refreward_trl <command> [options])",
        "",
        "Align one-step super-resolution generators with rewards that see the low-resolution image.",
    ]
    group = None
    for command in COMMANDS:
        if command.group != group:
            group = command.group
            lines += ["", f"{group}:"]
        lines.append(f"  {command.name:<10} {command.summary}")
    lines += [
        "",
        "options:",
        "  -h, --help   show this help; `refreward <command> --help` shows a command's own",
        "  --version    show the version",
        "  --debug      after any command: show the traceback of an error",
        "",
        "examples:",
        "  refreward demo --output-dir runs/demo",
        "  refreward refl --config recipes/tiny/refl.yaml --learning_rate 1e-4",
        "  accelerate launch --config_file deepspeed_configs/zero2.yaml -m refreward_trl refl --config tiny/refl",
    ]
    return "\n".join(lines)


def _ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _keeps_silent(error: RefRewardError) -> bool:
    """Whether another rank tells the user. A launcher starts every rank with the same words: rank 0 tells a mistake
    in them."""
    return error.reported_by is not None or (isinstance(error, ConfigError) and _rank() != 0)


def _report_undisturbed(error: RefRewardError) -> None:
    handlers = {}
    if isinstance(error, Preempted) or (_ranks() > 1 and not _keeps_silent(error)):
        # What stopped the run comes again and again from some launchers, and a launcher stops the other ranks as soon
        # as one has failed; nothing is left that it could stop.
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOPPING}
    _report(error)
    if not isinstance(error, Preempted):
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _report(error: RefRewardError) -> None:
    rank = _rank()
    if _keeps_silent(error):
        # A launcher ends the other ranks as soon as one has failed: let the other one speak first.
        time.sleep(HEAD_START)
        return
    if isinstance(error, Preempted):
        # All ranks have stopped together.
        if rank == 0:
            print(f"stopped: {error}", file=sys.stderr)
        return
    prefix = f"[rank {rank}] " if _ranks() > 1 else ""
    print(f"{prefix}error: {error}", file=sys.stderr)
