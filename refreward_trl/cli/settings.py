"""The words after `refreward finetune|rm|refl|ddpo|data build`: `--config`, flags that override it, their help."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refreward_trl.cli.keys import Key, keys_of, show
from refreward_trl.cli.recipe import Recipe, read_recipe
from refreward_trl.errors import ConfigError

_WIDTH = 118

DRY_RUN = ("--dry-run", "--dry_run")

GENERATOR_KEYS = ("generator", "base_model", "use_peft", "lora_r", "lora_alpha")
DATA_KEYS = ("dataset", "eval_dataset", "degradation", "crop_size", "max_eval_images")
RUN_KEYS = (
    "output_dir",
    "max_steps",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "eval_steps",
    "save_steps",
    "report_to",
)
ALIGNMENT_KEYS = ("anchor", "anchor_weight", "ema_decay", "resume")


@dataclass(frozen=True)
class TrainingHelp:
    """What `--help` says about one training command.

    Attributes:
        method: The command.
        description: What it does, in a sentence or two.
        groups: Title -> keys worth showing first; `--help-all` shows the rest.
        examples: Command lines that work as they stand.
        packaged: Name of a packaged recipe; by default that of the method among the tiny ones.
    """

    method: str
    description: str
    groups: Mapping[str, Sequence[str]]
    examples: Sequence[str]
    packaged: str = ""


def settings(argv: Sequence[str], about: TrainingHelp) -> Recipe | None:
    """Reads the words of a training command.

    Returns:
        The checked recipe, or None when help or a dry run was asked for and printed.

    Raises:
        ConfigError: Anything in the recipe or the flags is wrong.
        RefRewardError: A dry run found something missing.
    """
    if "--help-all" in argv:
        print(_help_all(about))
        return None
    if not argv or "-h" in argv or "--help" in argv:
        print(_help(about))
        return None
    dry_run = any(word in DRY_RUN for word in argv)
    source, flags = _take_config([word for word in argv if word not in DRY_RUN], about)
    recipe = read_recipe(source, method=about.method, flags=flags)
    if not dry_run:
        return recipe
    from refreward_trl.cli.dry_run import show_plan

    show_plan(recipe)
    return None


def _take_config(argv: Sequence[str], about: TrainingHelp) -> tuple[str | None, list[str]]:
    sources: list[str] = []
    flags: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--config":
            sources.append(next(words, ""))
        elif word.startswith("--config="):
            sources.append(word.removeprefix("--config="))
        else:
            flags.append(word)
    if len(sources) > 1 or "" in sources:
        raise ConfigError(
            "give one recipe: --config RECIPE" if len(sources) > 1 else "--config needs a recipe",
            where=f"refreward {about.method}",
            fix=f"for example: {about.examples[0]}",
        )
    return (sources[0] if sources else None), flags


def _help(about: TrainingHelp) -> str:
    keys = keys_of(about.method)
    packaged = about.packaged or f"tiny/{about.method}"
    lines = [
        f"usage: refreward {about.method} --config RECIPE [--key value ...]",
        "",
        *textwrap.wrap(about.description, _WIDTH),
        "",
        f"  {'--config RECIPE':<36} a .yaml file, or a packaged recipe such as {packaged}",
        f"  {'--key value':<36} overrides the recipe; lists and mappings as JSON; the same keys as in the recipe",
        f"  {'--dry-run':<36} look for everything that the recipe names; load, download and train nothing",
        f"  {'--help-all':<36} every key ({len(keys)} in all)",
        f"  {'--debug':<36} show the traceback of an error",
    ]
    for title, names in about.groups.items():
        lines += ["", f"{title}:", *(_line(keys[name]) for name in names)]
    return "\n".join([*lines, "", "examples:", *(f"  {example}" for example in about.examples)])


def _help_all(about: TrainingHelp) -> str:
    keys = keys_of(about.method)
    lines = [f"Every key of a `{about.method}` recipe, and flag of `refreward {about.method}`, with its default."]
    for owner in sorted({key.owner for key in keys.values()}, key=lambda name: name == "TrainingArguments"):
        title = "TrainingArguments (of transformers)" if owner == "TrainingArguments" else owner
        lines += [
            "",
            f"{title}:",
            *(_line(key, full=True) for name, key in sorted(keys.items()) if key.owner == owner),
        ]
    return "\n".join([*lines, "", "example:", f"  {about.examples[0]}"])


def _line(key: Key, *, full: bool = False) -> str:
    default = key.default if isinstance(key.default, str) else show(key.default)
    head = f"{f'  --{key.name} [{default}]':<38} "
    if full:
        return f"{head}{key.help} ({key.expected()})".rstrip()
    choices = f" ({' | '.join(key.choices)})" if key.choices else ""
    for text in (key.help, re.split("[:;(]", key.help)[0].strip(), ""):
        if len(head + text + choices) <= _WIDTH:
            break
    return (head + textwrap.shorten(text + choices, _WIDTH - len(head), placeholder=" ...")).rstrip()
