"""Hostile recipes, data, models and checkpoints: nothing in them runs, leads out of its folder or fills the memory.

Every attack runs in a forked child. What would run touches a canary; so does any attempt to reach the network.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import pickle
import re
import resource
import shutil
import socket
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import jinja2
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from refreward_trl import checkpointing
from refreward_trl.cli import app
from refreward_trl.data.images import read_image
from refreward_trl.data.pairs import load_pairs
from refreward_trl.errors import RefRewardError
from refreward_trl.generators import DEFAULT_FOLDER, load_generator
from refreward_trl.generators.module import ModuleGenerator
from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.reward_model.loading import load_judge
from refreward_trl.rewards.heldout import HeldOutJudge
from refreward_trl.rewards.refreward import RefReward

pytestmark = [pytest.mark.faults, pytest.mark.filterwarnings("ignore")]

MOST_GROWTH = 256 * 2**20
"""Bytes by which an attack may raise the peak of the memory."""
SECONDS = 60
"""Of CPU time, after which an attack counts as hanging."""
ASSETS = DEFAULT_FOLDER.parent
DEEP = "[" * 100_000

Action = Callable[[], Any]


@dataclass(frozen=True)
class Stage:
    """Where an attack is laid out.

    Attributes:
        folder: Its own folder.
        canary: The file that appears if anything of the attack runs.
        harness: The functions of the conftest.
        runs: Folder of the runs whose checkpoints are spoilt.
    """

    folder: Path
    canary: Path
    harness: SimpleNamespace
    runs: Path

    def judge(self) -> Path:
        """A copy of the shipped judge."""
        return Path(shutil.copytree(ASSETS / "judge", self.folder / "judge"))

    def conv_judge(self) -> Path:
        return Path(shutil.copytree(ASSETS / "heldout_judge", self.folder / "conv"))

    def generator(self) -> Path:
        """A copy of the shipped generator."""
        return Path(shutil.copytree(DEFAULT_FOLDER, self.folder / "generator"))

    def photos(self) -> Path:
        folder = self.folder / "photos"
        folder.mkdir(exist_ok=True)
        photo().save(folder / "a.png")
        return folder

    def secret(self) -> Path:
        """A readable image beside the dataset, which is not part of it."""
        path = self.folder / "secret.png"
        photo().save(path)
        return path

    def checkpoint(self, kind: str = "refl-lora") -> Path:
        """A copy of the newest checkpoint of a short run."""
        run = self.runs / kind
        if not run.exists():
            self.harness.make_trainer(kind, run, max_steps=2, eval_strategy="no").train()
        copy = Path(shutil.copytree(run, self.folder / "run", ignore=shutil.ignore_patterns("generator")))
        return checkpointing.list_checkpoints(copy)[-1]

    def resume(self, checkpoint: Path, kind: str = "refl-lora") -> Action:
        """Goes on from a checkpoint that is named, in a folder of its own."""

        def action() -> None:
            changes = {"resume": str(checkpoint), "max_steps": 3, "eval_strategy": "no", "save_strategy": "no"}
            self.harness.make_trainer(kind, self.folder / "next", **changes).train()

        return action

    def recipe(self, *flags: str, method: str = "refl", lines: str = "", **changes: Any) -> Action:
        """Runs a recipe on one photo."""
        values = {
            "method": method,
            "output_dir": str(self.folder / "out"),
            "dataset": str(self.photos()),
            "eval_dataset": str(self.photos()),
            "degradation": "bicubic",
            "crop_size": 32,
            "max_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            **({"rewards": [{"name": "lr_consistency"}]} if method in ("refl", "ddpo") else {}),
            **changes,
        }
        path = self.folder / "recipe.yaml"
        path.write_text("\n".join([*(f"{name}: {json.dumps(value)}" for name, value in values.items()), lines]))
        return lambda: app.main([method, "--config", str(path), *flags])


def photo() -> Image.Image:
    coarse = np.random.default_rng(0).integers(60, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class Attack:
    """An attack and its end.

    Attributes:
        row: Of the matrix.
        prepare: Lays it out; returns the route that walks into it.
        code: The exit code of the refusal, or 0 where the attack has no effect.
        words: Parts of the message: what and where.
    """

    row: str
    prepare: Callable[[Stage], Action]
    code: int
    words: tuple[str, ...]


ATTACKS: dict[str, Attack] = {}
Prepare = Callable[[Stage], Action]


def attack(row: str, code: int, *words: str) -> Callable[[Prepare], Prepare]:
    def register(prepare: Prepare) -> Prepare:
        add(row, prepare.__name__, prepare, code, *words)
        return prepare

    return register


def add(row: str, name: str, prepare: Prepare, code: int, *words: str) -> None:
    assert name not in ATTACKS, name
    ATTACKS[name] = Attack(row, prepare, code, words)


# Payloads


class Payload:
    """Touches the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


def python_code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w')\nclass Evil:\n    pass\n"


def yaml_call(canary: Path) -> str:
    return f"!!python/object/apply:builtins.open [{json.dumps(str(canary))}, w]"


def template_call(canary: Path) -> str:
    return f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """Each of them touches the canary where it is read without care."""

    def load_torch_file(canary: Path) -> None:
        torch.save({"x": Payload(canary)}, tmp_path / "file.pt")
        torch.load(tmp_path / "file.pt", weights_only=False)

    careless: list[Callable[[Path], Any]] = [
        lambda canary: pickle.loads(pickle.dumps(Payload(canary))),
        load_torch_file,
        lambda canary: yaml.unsafe_load(yaml_call(canary)),
        lambda canary: exec(python_code(canary), {}),
        lambda canary: jinja2.Environment().from_string(template_call(canary)).render(),
    ]
    for number, read in enumerate(careless):
        canary = tmp_path / f"canary{number}"
        read(canary)
        assert canary.exists(), number


# Ways out: recipes and command lines

NUL = "a\0b"
for key, code in {
    "output_dir": 2,
    "dataset": 2,
    "eval_dataset": 2,
    "test_dataset": 2,
    "generator": 2,
    "resume": 2,
    "control": 2,
    "run_name": 2,
}.items():
    add("path-tricks", f"NUL in {key}", lambda stage, key=key: stage.recipe(**{key: NUL}), code, key, "\\u0000")
add("path-tricks", "NUL in a flag", lambda stage: stage.recipe("--output_dir", NUL), 2, "output_dir", "\\u0000")
add(
    "path-tricks",
    "NUL in the kwargs of a reward",
    lambda stage: stage.recipe(rewards=[{"name": "refreward", "kwargs": {"source": NUL}}]),
    5,
    "no judge",
    "\\x00",
)
add("path-tricks", "NUL in the recipe's name", lambda stage: lambda: app.main(["refl", "--config", NUL]), 2, "a")
add("path-tricks", "NUL in score", lambda stage: lambda: app.main(["score", NUL, NUL]), 3, "does not exist")
for name, path in {"up": "../" * 30 + "etc", "absolute": "/etc", "device": "/dev/zero"}.items():
    add("path-tricks", f"resume: {name}", lambda stage, path=path: stage.recipe(resume=path), 5, "manifest.json")
    words = ["recipes", "copy", f"{path}/hosts"]
    add("path-tricks", f"recipes copy: {name}", lambda stage, words=words: lambda: app.main(words), 2, "hosts")
    add("path-tricks", f"control: {name}", lambda stage, path=path: stage.recipe(control=path), 2, "measured.json")


# Ways out: data


def image_folder(stage: Stage, *names: str) -> Path:
    folder = stage.folder / "set"
    folder.mkdir()
    photo().save(folder / "a.png")
    rows = [{"hr_image_file_name": "a.png"}, *({"hr_image_file_name": name} for name in names)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def parquet(stage: Stage, **columns: dict[str, Any]) -> Path:
    """A table of one row, whose columns all hold images."""
    path = stage.folder / "set" / "set.parquet"
    path.parent.mkdir()
    cell = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {"info": {"features": {name: {"_type": "Image"} for name in columns}}}
    schema = pyarrow.schema([(name, cell) for name in columns], {"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([columns], schema), path)
    return path


def picture(path: str | Path | None = None) -> dict[str, Any]:
    buffer = io.BytesIO()
    photo().save(buffer, "PNG")
    return {"bytes": buffer.getvalue() if path is None else None, "path": None if path is None else str(path)}


def first_row(source: Path) -> Action:
    return lambda: load_pairs(source, degradation="bicubic")[0]


OUTSIDE: dict[str, Callable[[Stage], str]] = {
    "up": lambda stage: "../secret.png",
    "down and up": lambda stage: "x/../../secret.png",
    "absolute": lambda stage: str(stage.secret()),
    "file URL": lambda stage: f"file://{stage.secret()}",
    "URL": lambda stage: "http://127.0.0.1:9/a.png",
    "chain": lambda stage: f"zip://secret.png::{stage.folder}/secret.zip",
    "hub": lambda stage: "hf://datasets/a/b/c.png",
    "NUL": lambda stage: "a.png\0",
}


def in_metadata(name: Callable[[Stage], str]) -> Prepare:
    def prepare(stage: Stage) -> Action:
        stage.secret()
        return first_row(image_folder(stage, name(stage)))

    return prepare


def in_cell(name: Callable[[Stage], str]) -> Prepare:
    def prepare(stage: Stage) -> Action:
        stage.secret()
        return first_row(parquet(stage, hr_image=picture(name(stage))))

    return prepare


def in_another_column(name: Callable[[Stage], str]) -> Prepare:
    def prepare(stage: Stage) -> Action:
        stage.secret()
        return first_row(parquet(stage, hr_image=picture(), mask=picture(name(stage))))

    return prepare


for label, name in OUTSIDE.items():
    add("path-tricks", f"metadata: {label}", in_metadata(name), 3, "set")
    add("path-tricks", f"parquet: {label}", in_cell(name), 3, "row 0, column hr_image")
    add("path-tricks", f"another column: {label}", in_another_column(name), 3, "row 0", "mask")


@attack("path-tricks", 3, "dataset")
def table_on_disk_with_a_file_outside(stage: Stage) -> Action:
    inside, outside = stage.folder / "set", stage.folder / "other"
    for folder in (inside, outside):
        datasets.Dataset.from_list([{"hr_image": picture()}]).save_to_disk(str(folder))
    state = json.loads((inside / "state.json").read_text())
    state["_data_files"] = [{"filename": f"../other/{state['_data_files'][0]['filename']}"}]
    (inside / "state.json").write_text(json.dumps(state))
    return first_row(inside)


@attack("path-tricks", 0)
def photos_that_are_links(stage: Stage) -> Action:
    """Many datasets are folders of links."""
    (stage.folder / "links").mkdir()
    (stage.folder / "links" / "a.png").symlink_to(stage.secret())
    return first_row(stage.folder / "links")


# Ways out: models


def linked(folder: Path) -> Path:
    """Moves every file of a folder to a store of blobs and leaves links, as the cache of the Hub does."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate([path for path in folder.rglob("*") if path.is_file()]):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    return folder


@attack("path-tricks", 0)
def judge_of_links(stage: Stage) -> Action:
    folder = linked(stage.judge())
    return lambda: load_judge(folder)


@attack("path-tricks", 0)
def generator_of_links(stage: Stage) -> Action:
    folder = linked(stage.generator())
    return lambda: load_generator(folder)


@attack("path-tricks", 0)
def conv_judge_of_links(stage: Stage) -> Action:
    folder = linked(stage.conv_judge())
    return lambda: ConvJudge.from_pretrained(folder)


def moved_out(folder: Path, weights: str, shown_as: Callable[[Path], str]) -> None:
    """Copies the weights out of a folder, whose index names them; those that stay hide that."""
    outside = Path(shutil.copy(folder / weights, folder.parent / "outside.safetensors"))
    (folder / weights).rename(folder / "decoy.safetensors")
    names = {name: shown_as(outside) for name in load_file(outside)}
    index = {"metadata": {"total_size": outside.stat().st_size}, "weight_map": names}
    (folder / f"{weights}.index.json").write_text(json.dumps(index))


WAYS = {"up": lambda path: f"../{path.name}", "absolute": str, "NUL": lambda path: f"{path.name}\0"}
for label, way in WAYS.items():

    def index_of_a_judge(stage: Stage, way: Callable[[Path], str] = way) -> Action:
        folder = stage.judge()
        moved_out(folder, "model.safetensors", way)
        return lambda: load_judge(folder)

    def index_of_a_generator(stage: Stage, way: Callable[[Path], str] = way) -> Action:
        folder = stage.generator()
        moved_out(folder / "unet", "diffusion_pytorch_model.safetensors", way)
        return lambda: load_generator(folder)

    add("path-tricks", f"index of a judge: {label}", index_of_a_judge, 5, "index.json", "no safetensors file of this")
    add("path-tricks", f"index of a generator: {label}", index_of_a_generator, 5, "index.json", "safetensors")


# Ways out: checkpoints


def forge(checkpoint: Path, **files: Any) -> None:
    """Seals a spoilt checkpoint again, as an attacker can; `files` are further entries of the manifest, by name."""
    path = checkpoint / checkpointing.MANIFEST
    manifest = json.loads(path.read_text())
    path.unlink()
    facts = {name: value for name, value in manifest.items() if name not in ("files", "format_version")}
    facts.pop(checkpointing.OWN_DIGEST)
    checkpointing.seal(checkpoint, facts)
    sealed = json.loads(path.read_text())
    sealed.pop(checkpointing.OWN_DIGEST)
    sealed["files"] |= files
    path.write_text(checkpointing.manifest_text(sealed))


def entry_of(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": checkpointing._sha256(path)}


for label, way in WAYS.items():

    def entry_of_a_manifest(stage: Stage, way: Callable[[Path], str] = way) -> Action:
        checkpoint = stage.checkpoint()
        outside = checkpoint.parent / "outside"
        outside.write_text("secret")
        forge(checkpoint, **{way(outside): entry_of(outside)})
        return stage.resume(checkpoint)

    add("path-tricks", f"entry of a manifest: {label}", entry_of_a_manifest, 5, "checkpoint-2", "outside")


@attack("path-tricks", 5, "model.safetensors", "outside the checkpoint")
def weights_of_a_checkpoint_are_a_link(stage: Stage) -> Action:
    checkpoint = stage.checkpoint()
    (checkpoint / "model.safetensors").rename(stage.folder / "outside")
    (checkpoint / "model.safetensors").symlink_to(stage.folder / "outside")
    forge(checkpoint)
    return stage.resume(checkpoint)


@attack("path-tricks", 5, "outside the checkpoint")
def folder_of_a_checkpoint_is_a_link(stage: Stage) -> Action:
    checkpoint = stage.checkpoint()
    outside = stage.folder / "outside"
    outside.mkdir()
    (outside / "x.json").write_text("{}")
    (checkpoint / "more").symlink_to(outside)
    forge(checkpoint, **{"more/x.json": entry_of(outside / "x.json")})
    return stage.resume(checkpoint)


def in_own_folder(stage: Stage, run: Path, **changes: Any) -> Action:
    """Goes on in the run's own folder, with `resume: auto`."""
    settings = {"max_steps": 4, "save_steps": 1, "eval_strategy": "no", **changes}
    return lambda: stage.harness.make_trainer("refl-lora", run, **settings).train() and None


@attack("path-tricks", 0)
def leftovers_that_are_links(stage: Stage) -> Action:
    """What a run cleans up must not be followed."""
    run = stage.checkpoint().parent
    precious = stage.folder / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    for name in (".tmp-checkpoint-2-abcdefgh", ".old-checkpoint-1", "checkpoint-1"):
        (run / name).symlink_to(precious)
    resume = in_own_folder(stage, run)

    def action() -> None:
        resume()
        assert (precious / "file").read_text() == "precious"
        assert not (run / ".tmp-checkpoint-2-abcdefgh").is_symlink()

    return action


@attack("path-tricks", 2, "metrics.jsonl", "link")
def metrics_that_are_a_link(stage: Stage) -> Action:
    """A run folder from somebody else must not make the run append to a file elsewhere."""
    run = stage.checkpoint().parent
    (stage.folder / "profile").write_text("precious\n" * 100)
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(stage.folder / "profile")
    resume = in_own_folder(stage, run)

    def action() -> None:
        try:
            resume()
        finally:
            assert (stage.folder / "profile").read_text() == "precious\n" * 100

    return action


# Files that want to run, or to fill the memory: checkpoints


def torch_file(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": Payload(canary)}, buffer)
    return buffer.getvalue()


def inflated(path: Path, part: str) -> None:
    """Writes a torch file of few bytes, of which one part ("data.pkl", "data/0") unpacks to `BOMB` bytes of zeros."""
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            head, tail = b"", source.read(entry)
            if entry.filename.endswith("data.pkl") and part == "data.pkl":
                # A long text, which the pickle then throws away.
                head, tail = tail[:2] + b"X" + struct.pack("<I", BOMB), b"0" + tail[2:]
            elif entry.filename.endswith("data.pkl"):
                tail = tail.replace(b"K\x03", b"J" + struct.pack("<i", BOMB // 4))
            if not entry.filename.endswith(f"/{part}"):
                target.writestr(entry.filename, tail)
                continue
            packed = zipfile.ZipInfo(entry.filename)
            packed.compress_type = zipfile.ZIP_DEFLATED
            with target.open(packed, "w", force_zip64=True) as file:
                file.write(head)
                for _ in range(BOMB // 2**24):
                    file.write(bytes(2**24))
                file.write(tail if head else b"")


BOMB = 2**29
"""Bytes that a compressed part of a file really unpacks to; more would take the tests too long to make."""
HUGE = 2**33

STATES = {"optimizer.pt": 0, "scheduler.pt": 0, "rng_state.pth": 0}
for name in STATES:

    def pickled(stage: Stage, name: str = name) -> Action:
        checkpoint = stage.checkpoint()
        (checkpoint / name).write_bytes(pickle.dumps(Payload(stage.canary)))
        forge(checkpoint)
        return stage.resume(checkpoint)

    def saved_by_torch(stage: Stage, name: str = name) -> Action:
        checkpoint = stage.checkpoint()
        (checkpoint / name).write_bytes(torch_file(stage.canary))
        forge(checkpoint)
        return stage.resume(checkpoint)

    def no_state(stage: Stage, name: str = name) -> Action:
        checkpoint = stage.checkpoint()
        torch.save({"x": torch.zeros(1)}, checkpoint / name)
        forge(checkpoint)
        return stage.resume(checkpoint)

    add("hostile-file", f"pickle as {name}", pickled, 5, name)
    add("hostile-file", f"torch file as {name}", saved_by_torch, 5, name)
    add("hostile-file", f"other content in {name}", no_state, 5, "checkpoint-2")


for part in ("data.pkl", "data/0"):

    def compressed(stage: Stage, part: str = part) -> Action:
        checkpoint = stage.checkpoint()
        inflated(checkpoint / "optimizer.pt", part)
        forge(checkpoint)
        return stage.resume(checkpoint)

    add("hostile-file", f"compressed {part} in optimizer.pt", compressed, 5, "optimizer.pt", "is compressed")


@attack("hostile-file", 5, "optimizer.pt", "fewer numbers")
def optimizer_that_repeats_one_number(stage: Stage) -> Action:
    """A tensor of the size of a disk, every number of which is the same one in the file."""
    checkpoint = stage.checkpoint()
    torch.save({"state": {0: {"exp_avg": torch.zeros(1).expand(2**40)}}}, checkpoint / "optimizer.pt")
    forge(checkpoint)
    return stage.resume(checkpoint)


@attack("hostile-file", 0)
def pickled_arguments_and_weights_in_a_checkpoint(stage: Stage) -> Action:
    """Files that other trainers would read."""
    checkpoint = stage.checkpoint()
    for name in ("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "rank0.pkl"):
        (checkpoint / name).write_bytes(torch_file(stage.canary))
    forge(checkpoint)
    return stage.resume(checkpoint)


for name in ("manifest.json", "trainer_state.json", "alignment_state-rank0.json"):

    def deep_state(stage: Stage, name: str = name) -> Action:
        checkpoint = stage.checkpoint()
        (checkpoint / name).write_text(DEEP)
        if name != checkpointing.MANIFEST:
            forge(checkpoint)
        return stage.resume(checkpoint)

    def empty_state(stage: Stage, name: str = name) -> Action:
        checkpoint = stage.checkpoint()
        (checkpoint / name).write_text("{}")
        if name != checkpointing.MANIFEST:
            forge(checkpoint)
        return stage.resume(checkpoint)

    add("hostile-file", f"{name}: nested", deep_state, 5, name, "checkpoint-2")
    add("hostile-file", f"{name}: empty", empty_state, 5, name, "checkpoint-2")


def header(length: int, content: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + content


HEADERS = {
    "huge length": header(2**63),
    "long length": header(99_000_000, b"{"),
    "huge tensor": header(
        len(tensor := json.dumps({"x": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}).encode()),
        tensor,
    ),
    "nested": header(len(DEEP), DEEP.encode()),
    "pickle": b"",
}
for label, content in HEADERS.items():

    def in_a_judge(stage: Stage, content: bytes = content) -> Action:
        folder = stage.judge()
        (folder / "model.safetensors").write_bytes(content or torch_file(stage.canary))
        return stage.recipe(rewards=[{"name": "refreward", "kwargs": {"source": str(folder)}}])

    def in_a_generator(stage: Stage, content: bytes = content) -> Action:
        folder = stage.generator()
        (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(content or torch_file(stage.canary))
        return stage.recipe(generator=str(folder))

    def in_a_conv_judge(stage: Stage, content: bytes = content) -> Action:
        folder = stage.conv_judge()
        (folder / "conv_judge.safetensors").write_bytes(content or torch_file(stage.canary))
        return lambda: ConvJudge.from_pretrained(folder)

    def in_a_checkpoint(stage: Stage, content: bytes = content) -> Action:
        checkpoint = stage.checkpoint()
        (checkpoint / "model.safetensors").write_bytes(content or torch_file(stage.canary))
        forge(checkpoint)
        return stage.resume(checkpoint)

    add("hostile-file", f"safetensors of a judge: {label}", in_a_judge, 5, "judge")
    add("hostile-file", f"safetensors of a generator: {label}", in_a_generator, 5, "unet")
    add("hostile-file", f"safetensors of a conv judge: {label}", in_a_conv_judge, 5, "conv")
    add("hostile-file", f"safetensors of a checkpoint: {label}", in_a_checkpoint, 5, "model.safetensors")


# Files that want to run: models


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def score_with(folder: Path) -> Action:
    image = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 64, 64)
    return lambda: load_judge(folder).rate(*image)


@attack("hostile-file", 5, "judge")
def judge_with_only_pickled_weights(stage: Stage) -> Action:
    folder = stage.judge()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(torch_file(stage.canary))
    return score_with(folder)


@attack("hostile-file", 5, "pytorch_model.bin")
def judge_whose_index_names_pickled_weights(stage: Stage) -> Action:
    folder = stage.judge()
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(torch_file(stage.canary))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return score_with(folder)


OWN_CODE = {
    "model": ("config.json", {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}),
    "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
}
for label, (file, classes) in OWN_CODE.items():
    for foreign in (False, True):

        def own_code(stage: Stage, file: str = file, classes: Any = classes, foreign: bool = foreign) -> Action:
            folder = stage.judge()
            (folder / "evil.py").write_text(python_code(stage.canary))
            others = {"model_type": "evil"} if file == "config.json" else {"tokenizer_class": "Evil"}
            edit(folder / file, auto_map=classes, **(others if foreign else {}))
            return score_with(folder)

        # A folder of a known type is opened by the class of transformers; its own code is left where it is.
        refused = foreign and label == "model"
        name = f"code of its own: {label}, {'unknown' if foreign else 'known'} type"
        add("hostile-file", name, own_code, 5 if refused else 0, *(("judge",) if refused else ()))


@attack("hostile-file", 0)
def code_of_a_repository_on_the_hub(stage: Stage) -> Action:
    folder = stage.judge()
    edit(folder / "config.json", auto_map={"AutoConfig": "someone/evil--evil.Evil"}, _name_or_path="someone/evil")
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": "someone/evil--evil.Evil"})
    return score_with(folder)


@attack("hostile-file", 5, "generator", "os.system")
def class_of_a_generator_is_a_function(stage: Stage) -> Action:
    folder = stage.generator()
    edit(folder / "generator_config.json", **{"class": "os.system"})
    return lambda: load_generator(folder)


@attack("hostile-file", 5, "config.json")
def class_of_a_vae_is_a_stranger(stage: Stage) -> Action:
    folder = stage.generator()
    (folder / "vae" / "evil.py").write_text(python_code(stage.canary))
    edit(folder / "vae" / "config.json", _class_name="Evil", auto_map={"AutoModel": "evil.Evil"})
    return lambda: load_generator(folder)


@attack("hostile-file", 0)
def generator_with_code_of_its_own(stage: Stage) -> Action:
    folder = stage.generator()
    for part in ("unet", "vae"):
        (folder / part / "evil.py").write_text(python_code(stage.canary))
        edit(folder / part / "config.json", auto_map={"AutoModel": "evil.Evil"}, _name_or_path="someone/evil")
    return lambda: load_generator(folder)


@attack("hostile-file", 5, "unet")
def generator_with_only_pickled_weights(stage: Stage) -> Action:
    folder = stage.generator()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(torch_file(stage.canary))
    return lambda: load_generator(folder)


@attack("hostile-file", 5, "unet", "evil.bin")
def generator_whose_index_names_pickled_weights(stage: Stage) -> Action:
    folder = stage.generator()
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    names = load_file(weights)
    weights.rename(weights.with_name("other.safetensors"))
    (folder / "unet" / "evil.bin").write_bytes(torch_file(stage.canary))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "evil.bin")}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return lambda: load_generator(folder)


@attack("hostile-file", 5, "policy")
def adapter_of_a_generator_is_pickled(stage: Stage) -> Action:
    folder = stage.generator()
    (folder / "policy").mkdir()
    (folder / "policy" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    for name in ("adapter_model.bin", "pytorch_lora_weights.bin"):
        (folder / "policy" / name).write_bytes(torch_file(stage.canary))
    return lambda: load_generator(folder)


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(self.conv(image), scale_factor=2)


def module_folder(stage: Stage, **adapter: Any) -> Path:
    folder = stage.folder / "module"
    ModuleGenerator(Doubling(), 2).save_pretrained(folder)
    (folder / "policy").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv"], **adapter}
    (folder / "policy" / "adapter_config.json").write_text(json.dumps(config))
    return folder


@attack("hostile-file", 5, "adapter_model.safetensors")
def adapter_of_a_module_is_pickled(stage: Stage) -> Action:
    folder = module_folder(stage)
    (folder / "policy" / "adapter_model.bin").write_bytes(torch_file(stage.canary))
    return lambda: ModuleGenerator.from_pretrained(folder, module=Doubling())


ADAPTERS: dict[str, dict[str, Any]] = {
    "a rank of billions": {"r": 2**25},
    "another type": {"peft_type": "EVIL"},
    "code of its own": {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}},
    "a base on the hub": {"base_model_name_or_path": "someone/evil", "revision": "main"},
    "an initialisation on data": {"init_lora_weights": "eva", "eva_config": {}},
}
for label, adapter in ADAPTERS.items():

    def hostile_adapter(stage: Stage, adapter: dict[str, Any] = adapter) -> Action:
        folder = module_folder(stage, **adapter)
        (folder / "policy" / "evil.py").write_text(python_code(stage.canary))
        weights = {f"base_model.model.conv.lora_{x}.weight": torch.zeros(2, 2, 1, 1) for x in "AB"}
        save_file(weights, folder / "policy" / "adapter_model.safetensors")
        return lambda: ModuleGenerator.from_pretrained(folder, module=Doubling())

    add("hostile-file", f"adapter: {label}", hostile_adapter, 5, "module")


TEMPLATES: dict[str, Callable[[Path], str]] = {
    "a way to os": template_call,
    "a way through classes": lambda canary: "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a way through format": lambda canary: "{{ '{0.__class__.__mro__}'.format(1) }}",
    "a file": lambda canary: "{% include '/etc/hosts' %}",
    "an import": lambda canary: "{% import 'os' as os %}{{ os }}",
    "a product": lambda canary: "{{ 'a' * 8589934592 }}",
    "a range": lambda canary: "{% for i in range(1000000000) %}a{% endfor %}",
    "loops": lambda canary: "{% for i in range(99999) %}{% for j in range(99999) %}aaaa{% endfor %}{% endfor %}",
    "doubling": lambda canary: "{% set x = 'a' %}" + "{% set x = x ~ x %}" * 40 + "{{ x }}",
    "a power": lambda canary: "{{ 9 ** 9 ** 9 }}",
    "a width": lambda canary: "{{ '%8589934592d' % 1 }}",
    "nesting": lambda canary: "{{ " + "(" * 10_000 + ")" * 10_000 + " }}",
    "recursion": lambda canary: "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an error": lambda canary: "{{ raise_exception('no') }}",
    "no syntax": lambda canary: "{% for %}",
}
for label, template in TEMPLATES.items():

    def hostile_template(stage: Stage, template: Callable[[Path], str] = template) -> Action:
        folder = stage.judge()
        (folder / "chat_template.jinja").write_text(template(stage.canary))
        return score_with(folder)

    add("hostile-file", f"chat template: {label}", hostile_template, 5, "template")


for name in ("config.json", "judge_spec.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):

    def nested_in_a_judge(stage: Stage, name: str = name) -> Action:
        folder = stage.judge()
        (folder / name).write_text('{"a": ' + DEEP)
        return score_with(folder)

    add("hostile-file", f"nested {name} of a judge", nested_in_a_judge, 5, name)

for name in ("generator_config.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):

    def nested_in_a_generator(stage: Stage, name: str = name) -> Action:
        folder = stage.generator()
        (folder / name).write_text('{"a": ' + DEEP)
        return lambda: load_generator(folder)

    add("hostile-file", f"nested {name} of a generator", nested_in_a_generator, 5, name)

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "wide judge": ("judge/config.json", {"text_config": {"hidden_size": 2**20, "intermediate_size": 2**24}}),
    "deep judge": ("judge/config.json", {"text_config": {"num_hidden_layers": 10**8}}),
    "judge of a wrong type": ("judge/config.json", {"text_config": {"hidden_size": "32"}}),
    "wide U-Net": ("generator/unet/config.json", {"block_out_channels": [2**20] * 3}),
    "deep U-Net": ("generator/unet/config.json", {"layers_per_block": 10**8}),
    "wide conv judge": ("conv/conv_judge.json", {"widths": [2**20] * 4}),
    "deep conv judge": ("conv/conv_judge.json", {"widths": [8] * 10**6}),
    "wide prompt": ("judge/judge_spec.json", {"tile": 2**40}),
}
for label, (name, changes) in SIZES.items():

    def oversized(stage: Stage, name: str = name, changes: dict[str, Any] = changes) -> Action:
        kind = name.partition("/")[0]
        folder = {"judge": stage.judge, "generator": stage.generator, "conv": stage.conv_judge}[kind]()
        path = stage.folder / name
        content = json.loads(path.read_text())
        for key, value in changes.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(content))
        opener: Callable[[Path], Any] = {
            "judge": load_judge,
            "generator": load_generator,
            "conv": ConvJudge.from_pretrained,
        }[kind]
        return lambda: opener(folder)

    add("hostile-file", label, oversized, 5, SIZES[label][0].split("/")[0])


# Files that want to run: recipes and data

TAGS: dict[str, Callable[[Path], str]] = {
    "a call": lambda canary: f"seed: {yaml_call(canary)}",
    "an object": lambda canary: "seed: !!python/object:os.system {}",
    "a module": lambda canary: "run_name: !!python/module:os",
    "a name": lambda canary: "run_name: !!python/name:os.system",
    "a key": lambda canary: f"? {yaml_call(canary)}\n: 1",
    "a reward": lambda canary: f"heldout_rewards: [{yaml_call(canary)}]",
    "aliases": lambda canary: "a: &a [x, x]\n" + "b: &b [*a, *a]\n" * 30,
    "depth": lambda canary: "lr_scheduler_kwargs: " + DEEP,
}
for label, tag in TAGS.items():

    def hostile_yaml(stage: Stage, tag: Callable[[Path], str] = tag) -> Action:
        return stage.recipe(lines=tag(stage.canary))

    add("hostile-file", f"YAML: {label}", hostile_yaml, 2, "recipe.yaml")


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", start), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@functools.cache
def zeros(count: int) -> bytes:
    packer = zlib.compressobj(1)
    block = bytes(2**20)
    return b"".join(packer.compress(block) for _ in range(count // len(block))) + packer.flush()


IMAGES: dict[str, Callable[[], bytes]] = {
    "too many pixels": lambda: png(60_000, 60_000, (b"IDAT", zeros(2**20))),
    "pixels beyond its size": lambda: png(8, 8, (b"IDAT", zeros(BOMB))),
    "inflated text": lambda: png(8, 8, (b"zTXt", b"a\0\0" + zeros(BOMB)), (b"IDAT", zeros(2**20))),
    "inflated profile": lambda: png(8, 8, (b"iCCP", b"a\0\0" + zeros(BOMB)), (b"IDAT", zeros(2**20))),
    "a program": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n(x) run\n",
}
for label, image in IMAGES.items():

    def bomb_in_score(stage: Stage, image: Callable[[], bytes] = image) -> Action:
        path = stage.folder / "bomb.png"
        path.write_bytes(image())
        photo().save(stage.folder / "lr.png")
        return lambda: app.main(["score", str(stage.folder / "lr.png"), str(path), "--reward", "lr_consistency"])

    def bomb_in_a_recipe(stage: Stage, image: Callable[[], bytes] = image) -> Action:
        (stage.photos() / "bomb.png").write_bytes(image())
        return stage.recipe()

    add("hostile-file", f"image in score: {label}", bomb_in_score, 3, "bomb.png")
    add("hostile-file", f"image in a recipe: {label}", bomb_in_a_recipe, 3, "bomb.png")


@attack("hostile-file", 3, "row 0", "mask")
def bomb_in_another_column(stage: Stage) -> Action:
    bomb = {"bytes": IMAGES["too many pixels"](), "path": None}
    return first_row(parquet(stage, hr_image=picture(), mask=bomb))


@attack("hostile-file", 0)
def archive_in_an_image_folder(stage: Stage) -> Action:
    """`datasets` looks into archives that lie in a folder of images."""
    folder = image_folder(stage)
    with zipfile.ZipFile(folder / "more.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("../../../canary.png", b"x")
        with archive.open("b.png", "w", force_zip64=True) as file:
            for _ in range(BOMB // 2**24):
                file.write(bytes(2**24))
    return first_row(folder)


@attack("hostile-file", 3, "set.parquet")
def parquet_that_unpacks_to_gigabytes(stage: Stage) -> Action:
    path = stage.folder / "set.parquet"
    cells = pyarrow.array([{"bytes": bytes([number]) * 2**27, "path": None} for number in range(3)])
    table = pyarrow.table({"hr_image": cells})
    pyarrow.parquet.write_table(table, path, compression="zstd", compression_level=1, use_dictionary=False)
    return first_row(path)


@attack("hostile-file", 3, "set.parquet")
def pickle_as_parquet(stage: Stage) -> Action:
    path = stage.folder / "set.parquet"
    path.write_bytes(pickle.dumps(Payload(stage.canary)))
    return first_row(path)


@attack("hostile-file", 3, "set")
def pickle_in_a_table_on_disk(stage: Stage) -> Action:
    folder = stage.folder / "set"
    datasets.Dataset.from_list([{"hr_image": picture()}]).save_to_disk(str(folder))
    next(folder.glob("*.arrow")).write_bytes(pickle.dumps(Payload(stage.canary)))
    return first_row(folder)


@attack("hostile-file", 0)
def script_beside_the_images(stage: Stage) -> Action:
    """Older versions of `datasets` ran a script of the folder's name."""
    folder = image_folder(stage)
    for name in ("set.py", "imagefolder.py", "metadata.py", "dataset.py"):
        (folder / name).write_text(python_code(stage.canary))
    return first_row(folder)


@attack("hostile-file", 3, "set")
def nested_metadata(stage: Stage) -> Action:
    folder = image_folder(stage)
    (folder / "metadata.jsonl").write_text('{"hr_image_file_name": "a.png", "x": ' + DEEP)
    return first_row(folder)


@attack("hostile-file", 2, "measured.json")
def nested_figures_of_a_control(stage: Stage) -> Action:
    control = stage.folder / "control"
    control.mkdir()
    (control / "measured.json").write_text(DEEP)
    return stage.recipe(control=str(control))


def test_read_image_refuses_bombs_within_its_own_limit(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(9_000, 9_000, (b"IDAT", zeros(2**20))))
    with pytest.raises(RefRewardError, match="above the limit"):
        read_image(tmp_path / "a.png")


# The trials


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def guarded(action: Action, canary: Path) -> dict[str, Any]:
    """Runs an attack in the child: no network, no more memory than the machine can spare, no endless loop."""

    def touch(*arguments: Any, **keywords: Any) -> Any:
        canary.write_text("the network")
        raise OSError("there is no network")

    socket.socket.connect = socket.getaddrinfo = touch  # type: ignore[method-assign, assignment]
    # The settings of the tests would hide that something reaches for the Hub.
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # not the attack's doing
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    sys.stdin = io.StringIO("y\n" * 100)
    before = peak()
    with contextlib.redirect_stderr(io.StringIO()) as text, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = action()
            code = code if isinstance(code, int) else 0
        except RefRewardError as error:
            code = error.exit_code
            print(f"error: {error}", file=sys.stderr)
        except Exception as error:
            code = f"{type(error).__name__}: {error}"[:300]
    return {"code": code, "text": text.getvalue(), "growth": peak() - before}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every child needs is imported and used once here, so that it does not count as growth."""
    judge = load_judge("default")
    judge.rate(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 64, 64))
    load_generator("default").generate(torch.rand(1, 3, 16, 16))
    HeldOutJudge()
    RefReward.from_pretrained("default")
    folder = tmp_path_factory.mktemp("warm")
    parquet(Stage(folder, folder, SimpleNamespace(), folder), hr_image=picture())
    load_pairs(folder / "set" / "set.parquet", degradation="bicubic")[0]
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_runs_and_memory_stays_bounded(
    name: str, harness: SimpleNamespace, tally: Callable[[str], Any], tmp_path: Path, runs: Path
) -> None:
    case = ATTACKS[name]
    canary = tmp_path / "canary"
    (tmp_path / "stage").mkdir()
    action = case.prepare(Stage(tmp_path / "stage", canary, harness, runs))
    with tally(case.row).trial():
        code, result = harness.in_child(lambda: guarded(action, canary), tmp_path / "child.log")
        assert code == 0, (tmp_path / "child.log").read_text()[-2000:]
        assert not canary.exists(), result
        assert result["code"] == case.code, result
        assert result["growth"] <= MOST_GROWTH, result["growth"] / 2**20
        if case.code:
            text = result["text"]
            assert len(re.findall(r"(?:^|[\r\n\]])error: ", text)) == 1, text  # also behind a bar of progress
            assert "fix: " in text and "Traceback" not in text, text
            assert all(word in text for word in case.words), text


def test_the_corpus_has_its_size() -> None:
    rows = [case.row for case in ATTACKS.values()]
    assert rows.count("path-tricks") >= 20 and rows.count("hostile-file") >= 30
