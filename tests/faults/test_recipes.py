"""Mistakes in recipes and flags by the hundred: each is refused before torch is imported, with line, key and fix."""

from __future__ import annotations

import json
import random
import re
import string
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from refreward_trl.cli.keys import METHODS, Key, keys_of, load_schema

pytestmark = pytest.mark.faults

RIGHT_SUGGESTIONS = 0.95
"""The least share of one-letter typos for which the nearest key named is the one that was meant."""

DRIVER = """
import contextlib, io, json, sys
from pathlib import Path
from refreward_trl.cli import app

class TorchIsImported(BaseException):
    # No Exception: lazy imports would dress that up as one of their own.
    pass

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise TorchIsImported

sys.meta_path.insert(0, NoTorch())
answers = []
for case in json.load(sys.stdin):
    if case["text"] is not None:
        Path("r.yaml").write_text(case["text"])
    words = [*case["method"].split(), *(["--config", "r.yaml"] if case["text"] is not None else []), *case["flags"]]
    with contextlib.redirect_stderr(io.StringIO()) as text:
        try:
            code = app.main(words)
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    answers.append([code, text.getvalue()])
assert "torch" not in sys.modules
print(json.dumps(answers))
"""
"""Runs `app.main`, what the `refreward` command is, for every case; an import of torch raises."""


@dataclass(frozen=True)
class Case:
    """One mistake, and what the error must contain: its place, and words such as the key."""

    method: str
    text: str | None
    flags: tuple[str, ...] = ()
    place: str = "command line: "
    words: tuple[str, ...] = ()
    meant: str | None = None


def base(method: str) -> list[str]:
    """The shortest recipe of a method that is right."""
    lines = [f"method: {method}", "output_dir: out"]
    needed = {"refl": ["rewards: [psnr]"], "ddpo": ["rewards: [psnr]"], "rm-grpo": ["judge: default"]}
    return lines + needed.get(method, [])


def in_recipe(method: str, lines: str, *words: str, meant: str | None = None, after: int = 0) -> Case:
    """A recipe that ends with `lines`, where the mistake is in the first of them, or `after` lines later."""
    before = lines_before(method, lines)
    text = "\n".join([*before, lines]) + "\n"
    return Case(method, text, (), f"r.yaml:{len(before) + 1 + after}: ", words, meant)


def lines_before(method: str, lines: str) -> list[str]:
    """The shortest recipe without the key that `lines` set."""
    key = lines.partition(":")[0]
    return [line for line in base(method) if not line.startswith(f"{key}:")]


def in_flags(method: str, *flags: str, words: tuple[str, ...], meant: str | None = None) -> Case:
    return Case(method, "\n".join(base(method)), flags, words=words, meant=meant)


def every_key() -> Iterator[tuple[str, Key]]:
    for method in METHODS:
        for key in keys_of(method).values():
            yield method, key


def each_key_once() -> Iterator[tuple[str, Key]]:
    """Every key, under one of the methods that have it, and under another one for the next."""
    homes: dict[str, list[tuple[str, Key]]] = {}
    for method, key in every_key():
        homes.setdefault(key.name, []).append((method, key))
    for number, places in enumerate(homes.values()):
        yield places[number % len(places)]


def bounds_of(key: Key) -> list[tuple[str, float]]:
    return [(sign, float(bound)) for sign, bound in re.findall(r"([<>]=?) ([-\d.]+)", key.bounds)]


def outside(key: Key) -> Iterator[float]:
    """The nearest numbers beyond each end of a key's range."""
    whole = "int" in key.types
    for sign, bound in bounds_of(key):
        nearest = bound if len(sign) == 1 else bound + (1 if whole else 0.001) * (1 if sign == "<=" else -1)
        yield int(nearest) if whole else nearest


def right_value(key: Key) -> Any:
    """A value that the key accepts."""
    if key.default:
        return key.default
    if key.choices:
        return key.choices[0]
    values = {"int": 1, "float": 0.5, "bool": True, "str": "word", "dict": {"a": 1}, "list[float]": [0.5]}
    return values.get(key.types[0], ["psnr"])


VALUES = {
    "a word": "word",
    "a whole number": 7,
    "a fraction": 0.25,
    "true": True,
    "a list of lists": [[1]],
    "a mapping": {"a": 1},
    "null": None,
    "infinity": float("inf"),
    "a number beyond 64 bits": 10**20,
    "a NUL": "a\0b",
}
FIT = {
    "int": {"a whole number"},
    "float": {"a whole number", "a fraction"},
    "bool": {"true"},
    "str": {"a word"},
    "dict": {"a mapping"},
}
"""Which of `VALUES` are of a type; none of them is a list that a recipe may hold."""


def as_yaml(value: Any) -> str:
    return ".inf" if value == float("inf") else json.dumps(value)


def wrong_values(key: Key) -> list[Any]:
    fitting = set().union(*(FIT.get(name, set()) for name in key.types)) | ({"null"} if key.nullable else set())
    if key.choices:
        fitting.discard("a word")
    return [value for name, value in VALUES.items() if name not in fitting]


def misspelt(name: str, source: random.Random, known: Collection[str]) -> str:
    """One letter too many, too few, another, or two exchanged; never one of the `known` words."""
    while True:
        place = source.randrange(len(name))
        letter = source.choice(string.ascii_lowercase)
        head, tail = name[:place], name[place + 1 :]
        swapped = head + tail[:1] + name[place] + tail[1:]
        wrong = source.choice([head + letter + name[place:], head + tail, head + letter + tail, swapped])
        if wrong not in known:
            return wrong


def typos() -> Iterator[Case]:
    """A typo in every key of every method; half of them in the recipe, half in a flag."""
    source = random.Random(0)
    known = {key.name for _, key in every_key()}
    for number, (method, key) in enumerate(every_key()):
        wrong = misspelt(key.name, source, known)
        if number % 2 and "bool" not in key.types:
            yield in_flags(method, f"--{wrong}", "1", words=(f"unknown flag {wrong!r}",), meant=key.name)
        else:
            yield in_recipe(method, f"{wrong}: 1", f"unknown key {wrong!r}", meant=key.name)


def wrong_types() -> Iterator[Case]:
    """Two values of wrong types for every key, others from key to key."""
    for number, (method, key) in enumerate(each_key_once()):
        wrong = wrong_values(key)
        for value in (wrong[number % len(wrong)], wrong[(number + 3) % len(wrong)]):
            yield wrong_line(method, key, as_yaml(value))


def out_of_range() -> Iterator[Case]:
    for number, (method, key) in enumerate(each_key_once()):
        for value in outside(key):
            words = (f"{key.name}: expected", key.bounds)
            flag = in_flags(method, f"--{key.name}={value}", words=words)
            yield flag if number % 3 == 0 else in_recipe(method, f"{key.name}: {value}", *words)
        if key.choices:
            wrong = right_value(key) + "x"
            yield in_recipe(method, f"{key.name}: {wrong}", f"{key.name}: expected", "did you mean", key.choices[0])


def duplicates() -> Iterator[Case]:
    for method, key in each_key_once():
        line = f"{key.name}: {as_yaml(right_value(key))}"
        first = len(lines_before(method, line)) + 1
        yield in_recipe(method, f"{line}\n{line}", f"duplicate key {key.name!r} (first on line {first})", after=1)


def numbers_as_text() -> Iterator[Case]:
    """What people and other YAML readers take for numbers, and this one does not."""
    for method, key in each_key_once():
        if "float" in key.types and not key.bounds.startswith(">= 1"):
            yield wrong_line(method, key, "'1e-5'", "without quotes")
            yield wrong_line(method, key, "0.1%")
        if key.types == ("int",):
            yield wrong_line(method, key, "1e1")
            yield wrong_line(method, key, "1_000")


def wrong_line(method: str, key: Key, value: str, *words: str) -> Case:
    return in_recipe(method, f"{key.name}: {value}", f"{key.name}: expected", *words)


def wrong_rewards() -> Iterator[Case]:
    """Mistakes inside the entries of `rewards` and `heldout_rewards`."""
    source = random.Random(1)
    for method in ("refl", "ddpo"):
        for known in load_schema()["reward_names"]:
            wrong = misspelt(known, source, [known])
            words = ("heldout_rewards[1].name: there is no reward", f"did you mean {known!r}")
            yield in_recipe(method, f"heldout_rewards:\n- psnr\n- {wrong}", *words, after=2)
        for known, value in (("name", "psnr"), ("weight", "2"), ("kwargs", "{}")):
            wrong = misspelt(known, source, [known])
            words = (f"heldout_rewards[0]: unknown key {wrong!r}", f"did you mean {known!r}")
            yield in_recipe(method, f"heldout_rewards:\n- name: psnr\n  {wrong}: {value}", *words, after=2)
        for entry, message in (
            ("weight: heavy", "heldout_rewards[0].weight: expected a number"),
            ("weight: .nan", "heldout_rewards[0].weight: expected a number"),
            ("weight: '1e-5'", "write it without quotes"),
            ("kwargs: [1]", "heldout_rewards[0].kwargs: expected a mapping"),
            ("name: ssim", "duplicate key 'name'"),
        ):
            yield in_recipe(method, f"heldout_rewards:\n- name: psnr\n  {entry}", message, after=2)
        for entry in ("3", "[psnr]", "null"):
            yield in_recipe(method, f"heldout_rewards: [{entry}]", "heldout_rewards: expected a list of {name")
        yield in_recipe(method, "heldout_rewards: [{weight: 1}]", "heldout_rewards[0]: 'name' is missing")
        yield in_recipe(method, "heldout_rewards: [a..b]", "there is no reward 'a..b'")


def wrong_methods() -> Iterator[Case]:
    """An unknown command in the recipe, a recipe for another command, and keys of other commands."""
    source = random.Random(2)
    for method in METHODS:
        for value in (misspelt(method, source, METHODS), "[refl]", "3", "null", "{a: b}"):
            text = "\n".join([f"method: {value}", *base(method)[1:]])
            yield Case(method, text, place="r.yaml:1: ", words=(f"method: expected one of {', '.join(METHODS)}",))
        other = METHODS[(METHODS.index(method) + 1) % len(METHODS)]
        words = (f"this recipe is for `refreward {other}`, not for `refreward {method}`",)
        yield Case(method, "\n".join(base(other)), place="r.yaml:1: ", words=words)
        foreign = next(name for name in keys_of(other) if name not in keys_of(method))
        yield in_recipe(method, f"{foreign}: 1", f"unknown key {foreign!r}; `refreward {method}` has no such setting")
        yield in_flags(method, f"--{foreign}=1", words=(f"unknown flag {foreign!r}", "has no such setting"))


def wrong_files() -> Iterator[Case]:
    """What is no plain YAML."""
    for line, message in (
        ("seed: [1", "not valid YAML"),
        ("run_name: {a: 1\nseed: 3", "not valid YAML"),
        ("run_name: 'a\nseed: 3", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("\tseed: 1", "not valid YAML"),
        ("just words", "not valid YAML"),
        ("---\nseed: 2", "another document"),
        ("seed: \0", "unacceptable character"),
        ("seed: !!int 1", "the tag"),
        ("seed: *a", "aliases"),
        ("<<: {seed: 1}", "unknown key '<<'"),
        ("? [a]\n: b", "a key must be a word"),
        ("1: x", "unknown key '1'"),
        ("true: x", "unknown key 'true'"),
        ("lr_scheduler_kwargs: " + "[" * 100_000, "nested too deeply"),
        ("lr_scheduler_kwargs: " + "{a: " * 30 + "}" * 30, "nested too deeply"),
        ("seed: " + "9" * 5000, "seed: expected a whole number"),
        ("seed: 1e999", "seed: expected a whole number"),
    ):
        yield in_recipe("refl", line, message)
    yield in_recipe("refl", "seed: 1\r\nsed: 2", "unknown key 'sed'; did you mean 'seed'", after=1)


def wrong_flags() -> Iterator[Case]:
    rewards = "rewards: expected a list of {name, weight, kwargs}"
    for flags, words in (
        (("--seed",), "--seed needs a value: a whole number >= 0"),
        (("--seed", "--use_cpu"), "--seed needs a value: a whole number >= 0"),
        (("--seed=",), "seed: expected a whole number"),
        (("--seed", "x"), "seed: expected a whole number"),
        (("--seed", "1", "2"), "unexpected word '2'; a setting is written --key value"),
        (("seed=1",), "unexpected word 'seed=1'"),
        (("-seed",), "unexpected word '-seed'"),
        (("--",), "unknown flag ''"),
        (("--=1",), "unknown flag ''"),
        (("--seed.x=1",), "did you mean 'seed'"),
        (("--lerning-rate", "1"), "did you mean 'learning_rate'"),
        (("--learning_rate", "nan"), "learning_rate: expected a number"),
        (("--learning_rate", "1e-5f"), "learning_rate: expected a number"),
        (("--use_cpu", "maybe"), "use_cpu: expected true or false"),
        (("--use_cpu", "yes"), "write true"),
        (("--rewards", "[{"), f'{rewards}, got "[{{"; as JSON it cannot be read'),
        (("--rewards", '["psnr"] x'), "as JSON it cannot be read"),
        (("--rewards", '[{"name": "psnr", "name": "ssim"}]'), "as JSON it cannot be read: duplicate key 'name'"),
        (("--rewards", "[" * 90_000), "as JSON it cannot be read: nested too deeply"),
        (("--rewards", "[" * 30 + "]" * 30), "as JSON it cannot be read: nested too deeply"),
        (("--rewards", '[{"name": "psnr", "weight": ' + "9" * 5000 + "}]"), "as JSON it cannot be read: Exceeds"),
        (("--rewards", '[{"name": "psnr", "weight": ' + "9" * 400 + "}]"), "rewards[0].weight: expected a number"),
        (("--rewards", '[{"nam": "psnr"}]'), "rewards[0]: unknown key 'nam'; did you mean 'name'"),
        (("--rewards", '["pnsr"]'), "there is no reward 'pnsr'; did you mean 'psnr'"),
        (("--rewards", "null"), rewards),
        (("--seed", "[1]"), "seed: expected a whole number"),
    ):
        yield in_flags("refl", *flags, words=(words,))
    yield Case("refl", None, ("--output_dir", "out"), words=("rewards: nothing is set",))
    yield Case("finetune", None, ("--seed", "1"), words=("output_dir: nothing is set",))


GENERATORS = (
    typos,
    wrong_types,
    out_of_range,
    duplicates,
    numbers_as_text,
    wrong_rewards,
    wrong_methods,
    wrong_files,
    wrong_flags,
)


def answers_to(cases: list[Case], folder: Path) -> list[tuple[Any, str]]:
    """Returns exit code and text for each case, from one process that cannot import torch."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([asdict(case) for case in cases]),
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(answer) for answer in json.loads(done.stdout)]


def test_the_recipes_that_are_spoilt_are_right(tmp_path: Path) -> None:
    """Without a mistake the command goes on to import torch: what is refused below is the mistake."""
    cases = [Case(method, "\n".join(base(method))) for method in METHODS]
    cases += [in_recipe(method, f"{key.name}: {as_yaml(right_value(key))}") for method, key in each_key_once()]
    for case, (code, text) in zip(cases, answers_to(cases, tmp_path), strict=True):
        assert str(code).startswith("TorchIsImported"), (case, code, text)


@pytest.mark.parametrize("generate", GENERATORS, ids=lambda function: function.__name__)
def test_every_mistake_is_refused(
    generate: Callable[[], Iterator[Case]], tally: Callable[[str], Any], tmp_path: Path
) -> None:
    cases = list(generate())
    right = []
    for case, (code, text) in zip(cases, answers_to(cases, tmp_path), strict=True):
        with tally("wrong-recipe").trial():
            assert code == 2, (case, code, text[-300:])
            assert case.place in text or case.text is None, (case, text[-300:])
            assert all(word in text for word in case.words), (case, text[-300:])
            assert "fix: " in text and "Traceback" not in text and len(text) < 2000
        if case.meant is not None:
            right.append(f"did you mean {case.meant!r}?" in text)
    if right:
        print(f"{sum(right)} of {len(right)} typos get the right suggestion")
        assert sum(right) / len(right) >= RIGHT_SUGGESTIONS


COMMANDS = (
    (["refl", "--config", "r.yaml", "--lerning_rate", "1"], "did you mean 'learning_rate'?"),
    (["refl", "--config", "r.yaml", "--learning_rate", "fast"], 'expected a number >= 0, got "fast"'),
    (["refl", "--config", "r.yaml", "--rewards", '["pnsr"]'], "did you mean 'psnr'?"),
    (["refl", "--config", "wrong.yaml"], "wrong.yaml:4: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
    (["ddpo", "--config", "r.yaml"], "r.yaml:1: this recipe is for `refreward refl`, not for `refreward ddpo`"),
    (["ddpo", "--config", "tiny/refll"], "did you mean 'tiny/refl'?"),
    (["rm", "--seed", "1"], "output_dir: nothing is set"),
    (["finetune", "--config", "tiny/finetune", "--seed", "-1"], "expected a whole number >= 0"),
    (["recipes", "check", "r.yaml", "wrong.yaml"], "wrong.yaml:4: unknown key 'lerning_rate'"),
    (["recipes", "chek"], "invalid choice"),
    (["refll", "--config", "r.yaml"], "there is no command 'refll'; did you mean 'refl'?"),
    (["refl", "--config", "r.yaml", "--config", "r.yaml"], "give one recipe"),
)


@pytest.mark.parametrize(("words", "message"), COMMANDS, ids=lambda value: " ".join(value)[:40] if value else "")
def test_the_command_line_answers_without_torch(
    words: list[str], message: str, tally: Callable[[str], Any], tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text("\n".join(base("refl")))
    (tmp_path / "wrong.yaml").write_text("\n".join([*base("refl"), "lerning_rate: 1"]))
    command = [sys.executable, "-X", "importtime", "-m", "refreward_trl", *words]
    with tally("wrong-recipe").trial():
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        imports, text = (
            [line for line in done.stderr.splitlines() if line.startswith("import time:") is wanted]
            for wanted in (True, False)
        )
        assert done.returncode == 2, done.stderr[-2000:]
        assert text[0].startswith("error: ") and message in "\n".join(text)
        assert any("| " in line and "refreward_trl" in line for line in imports)
        assert not any(line.endswith(" torch") for line in imports)
