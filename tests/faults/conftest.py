"""Runs in forked children that are killed where a test wants it, and what is left of them."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import Dataset

from refreward_trl.checksums import digest
from refreward_trl.reward_model.conv import ConvJudge
from refreward_trl.trainers.ddpo_config import SRDDPOConfig
from refreward_trl.trainers.ddpo_trainer import SRDDPOTrainer
from refreward_trl.trainers.ref_reward_config import RefRewardConfig
from refreward_trl.trainers.ref_reward_trainer import RefRewardTrainer
from refreward_trl.trainers.refl_config import SRReFLConfig
from refreward_trl.trainers.refl_trainer import SRReFLTrainer

spec = importlib.util.spec_from_file_location("toys", Path(__file__).parents[1] / "trainers" / "conftest.py")
assert spec is not None and spec.loader is not None
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)

# What every trainer looks for is imported here, once for all children.
with suppress(ImportError):
    import deepspeed  # noqa: F401

STEPS = 6
SAVE_STEPS = 2
TIMING = {"time", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
PATIENCE = 600.0
"""Seconds after which a child counts as hanging."""


class ToyGroups(Dataset):
    """Preference groups of three candidates; the more noise, the worse."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = toys.ToyPairs(7)[index]
        source = torch.Generator().manual_seed(index)
        noise = torch.randn(3, 3, 32, 32, generator=source) * torch.tensor([0.0, 40.0, 90.0]).view(3, 1, 1, 1)
        return {
            "sample_id": row["sample_id"],
            "lr_image": row["lr_image"],
            "candidates": (row["hr_image"].float() + noise).clamp(0, 255).byte(),
            "better_worse": torch.tensor([[0, 1], [0, 2], [1, 2]]),
            "kinds": ["hr", "mild", "severe"],
        }


def black_box(*, completions: torch.Tensor, **columns: Any) -> list[float]:
    return toys.brightness(completions=completions.detach()).tolist()


def make_trainer(kind: str, folder: Path, **changes: Any) -> Any:
    """Returns the trainer "refl-lora", "refl-full", "ddpo-lora", "ddpo-full", "rm-conv": tiny, with saves and logs."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        **({"ddp_backend": "gloo"} if int(os.environ.get("WORLD_SIZE", "1")) > 1 else {}),
        **changes,
    }
    method, _, part = kind.partition("-")
    if method == "rm":
        judge = ConvJudge(widths=(8, 16), hidden=8)
        return RefRewardTrainer(judge, RefRewardConfig(**settings), ToyGroups(), eval_dataset=ToyGroups())
    settings["ema_decay"] = 0.8
    adapter = toys.toy_lora() if part == "lora" else None
    data = {"train_dataset": toys.ToyPairs(7), "eval_dataset": toys.ToyPairs(2), "peft_config": adapter}
    if method == "refl":
        return SRReFLTrainer(toys.grey_generator(), toys.brightness, args=SRReFLConfig(**settings), **data)
    # Three updates per rollout: most kills happen inside one.
    rollout = {"num_generations": 4, "num_iterations": 3, "advantage": "running", "beta": 0.1}
    return SRDDPOTrainer(toys.grey_generator(), black_box, args=SRDDPOConfig(**{**rollout, **settings}), **data)


def ending(trainer: Any) -> dict[str, Any]:
    """Returns all that must be equal at the end of two equal runs, as JSON."""
    moments = {
        f"{key}/{name}": tensor
        for key, state in trainer.optimizer.state_dict()["state"].items()
        for name, tensor in state.items()
    }
    lines = [json.loads(line) for line in (Path(trainer.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    average = getattr(trainer, "average", None)
    return {
        "step": trainer.state.global_step,
        "weights": digest(trainer.model.state_dict()),
        "moments": digest(moments),
        "average": None if average is None else digest(average.state_dict()),
        "scheduler": repr(sorted(trainer.lr_scheduler.state_dict().items())),
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "metrics": [{name: value for name, value in line.items() if name not in TIMING} for line in lines],
    }


def in_child(action: Callable[[], Any], log: Path, kill_after: float | None = None) -> tuple[int, Any]:
    """Runs `action` in a forked child.

    Returns:
        Its exit code (negative: the signal that ended it), and what it returned, as JSON.
    """
    child = forked(action, log, {})
    started = time.monotonic()
    while not (code := exit_code(child)):
        elapsed = time.monotonic() - started
        if elapsed > (PATIENCE if kill_after is None else kill_after):
            os.kill(child, signal.SIGKILL)
            kill_after = PATIENCE
        time.sleep(0.002)
    assert time.monotonic() - started < PATIENCE, f"the child hung: {log.read_text()[-3000:]}"
    return code[0], result_of(log) if code[0] == 0 else None


def in_ranks(action: Callable[[], Any], log: Path, ranks: int = 2) -> list[tuple[int, Any]]:
    """Runs `action` in forked children that are the ranks of one run, without a launcher to stop them.

    Each writes its output to `log` with the rank before the ending.

    Returns:
        Per rank what `in_child` returns.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [rank_log(log, rank) for rank in range(ranks)]
    children = [
        forked(action, logs[rank], {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)
    ]
    codes: dict[int, int] = {}
    patience = time.monotonic() + PATIENCE
    while len(codes) < ranks and time.monotonic() < patience:
        for rank in set(range(ranks)) - codes.keys():
            codes |= dict.fromkeys([rank], *code) if (code := exit_code(children[rank])) else {}
        time.sleep(0.005)
    hung = set(range(ranks)) - codes.keys()
    for rank in hung:
        os.kill(children[rank], signal.SIGKILL)
        os.waitpid(children[rank], 0)
    assert not hung, "\n".join(f"rank {rank} hung: {logs[rank].read_text()[-3000:]}" for rank in hung)
    return [(codes[rank], result_of(logs[rank]) if codes[rank] == 0 else None) for rank in range(ranks)]


def rank_log(log: Path, rank: int) -> Path:
    return log.with_suffix(f".rank{rank}.log")


def result_of(log: Path) -> Any:
    return json.loads(log.with_suffix(".json").read_text())


def exit_code(child: int) -> tuple[int] | None:
    """Returns the exit code of a child that has ended."""
    done, status = os.waitpid(child, os.WNOHANG)
    return (os.waitstatus_to_exitcode(status),) if done else None


def forked(action: Callable[[], Any], log: Path, environment: dict[str, str]) -> int:
    """Starts `action` in a forked child and returns its process id."""
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)
    # The child need not look through all that was imported for garbage, which would copy those pages, too.
    gc.freeze()
    child = os.fork()
    if child != 0:
        return child
    code = 1
    try:
        os.environ.update(environment)
        # What a trainer of the parent has found out about its one process.
        AcceleratorState._reset_state(reset_partial_state=True)
        file = log.open("w", buffering=1)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        # pytest has replaced these by objects that write elsewhere.
        sys.stdout = sys.stderr = file
        result.write_text(json.dumps(action()))
        code = 0
    except BaseException as error:  # a child must never come back into the test
        traceback.print_exc()
        code = getattr(error, "exit_code", 1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Tally:
    """Counts the trials of one row of docs/reliability.md."""

    def __init__(self, rows: dict[str, dict[str, Any]], name: str) -> None:
        assert name in MATRIX, name
        self._row = rows.setdefault(name, {"trials": 0, "held": 0})

    @contextmanager
    def trial(self) -> Iterator[None]:
        """One injected fault; it has held if nothing is raised inside."""
        self._row["trials"] += 1
        yield
        self._row["held"] += 1


MATRIX = {
    "kill-anywhere": "SIGKILL at a random moment of a run, which then goes on: weights, moments, averages, scheduler, "
    "random state and metrics end bit-identical to those of a run that was never killed; what is visible verifies",
    "kill-in-save": "the same before the k-th file operation of a save, for every k",
    "kill-in-rollout": "the same between the updates that share one rollout",
    "damaged-file": "each file of a checkpoint emptied, halved, one byte short, one bit flipped or deleted: noticed "
    "and named, `auto` takes the checkpoint before, a checkpoint asked for by name is refused",
    "damaged-manifest": "one bit of the manifest flipped, at every byte: noticed",
    "full-disk": "a disk with room for 1/12, 2/12 ... of a checkpoint, or for no byte at all, from a step on: told in "
    "words with what is free and needed, earlier checkpoints verify, the run ends after three failed saves, and goes "
    "on bit-identically once there is room",
    "file-limit": "the same with a limit for the size of one file, in the weights and in the optimizer's state",
    "read-only": "the same with a file system that becomes read-only, or is from the start",
    "two-runs": "a second run in the same folder is refused; the folder of a run that was killed is taken over",
    "bad-reward": "a reward that raises, hangs or returns no rewards: `stop` stops with its name, `drop` leaves the "
    "candidates out and counts them; weights and moments stay finite; nothing becomes a score",
    "lost-rank": "one rank of two, either of them, is killed, raises, sleeps or cannot be interrupted, in a reward, "
    "in ReFL and in DDPO, without a launcher: both ranks end and one message names rank, step and samples",
    "lost-rank-launched": "the same through `accelerate launch`, DDP and ZeRO-2: no process is left over",
    "signal": "SIGTERM, SIGINT, SIGUSR2 or two SIGTERM, to one rank or both, in the middle of an update, of a reward "
    "or of a save: saved, exit code 75, and the run that goes on ends in the same bits",
    "signal-alone": "the same signals to a run of one process, in ReFL and DDPO",
    "kill-launched": "SIGKILL of all processes of a run of two ranks under ZeRO-2, at a random moment: it goes on "
    "with the same losses (1e-6), and its metrics have no gap and no duplicate",
    "wrong-recipe": "generated mistakes in every key of a recipe and in flags: typo, wrong type, out of range, twice, "
    "numbers as text, no YAML: refused before torch is imported, with exit code 2, line, key and fix",
    "bad-image": "a corpus of damaged and unusual images through datasets, training data and scores; every length and "
    "every bit of headers: the right pixels, or one error with the name and exit code 3; nothing is filled in black",
    "bad-table": "missing files, empty cells, wrong columns and sizes, repeated ids: all rows named in one error",
    "path-tricks": "`../`, absolute paths, URLs, links and NUL bytes in recipes, data, models and checkpoints: what "
    "leads out of its folder is refused by name (exit codes 2 to 5); datasets and models made of links still open",
    "hostile-file": "pickles, YAML tags, code of its own, chat templates, archives, huge headers and nested JSON as "
    "recipe, data, model or checkpoint: nothing runs or reaches for the network, memory grows by at most 256 MB, one "
    "error (exit codes 2 to 5)",
}
"""What is injected and what must hold, by the name of the row."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability-report", help="file to write the matrix of faults to, as Markdown")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the faults of launched runs first: they take minutes, for which the other process would have to wait."""
    items.sort(key=lambda item: not {"faults", "slow"} <= item.keywords.keys())


def pytest_sessionfinish(session: pytest.Session) -> None:
    rows = session.config.stash.get(ROWS, {})
    if hasattr(session.config, "workeroutput"):  # one of several processes of pytest-xdist
        session.config.workeroutput["rows"] = rows
        return
    path = session.config.getoption("--reliability-report")
    if path is None:
        return
    table = [
        f"| {name} | {what} | {rows[name]['trials']} | {rows[name]['held']} |"
        for name, what in MATRIX.items()
        if name in rows
    ]
    Path(path).write_text(REPORT.format(table="\n".join(table)), encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """Adds what a process of pytest-xdist has counted."""
    rows = node.config.stash.setdefault(ROWS, {})
    for name, counted in getattr(node, "workeroutput", {}).get("rows", {}).items():
        total = rows.setdefault(name, {"trials": 0, "held": 0})
        for key in total:
            total[key] += counted[key]


ROWS = pytest.StashKey[dict[str, dict[str, Any]]]()
REPORT = """# Reliability

Written by `make faults`, which injects every fault again and counts: about 20 minutes of computing time, shared by two
processes.

## What a run promises

| | promise |
|---|---|
| P1 | A checkpoint that can be seen is complete, and is verified byte by byte before it is used. |
| P2 | After the first save there is always a good checkpoint: two are kept, and a save that fails costs none. |
| P3 | Killed at any moment, a run that is started again ends in the same bits. |
| P4 | No sample is skipped or seen twice, and `metrics.jsonl` has no gap and no duplicate. |
| P5 | No rank waits for one that is dead, nor longer than `reward_timeout` + 10 s for one whose reward hangs. |
| P6 | A number that is not finite never reaches the optimizer. |
| P7 | A reward that failed never becomes a score. |
| P8 | No image, table or model folder can run code, and a recipe only the modules that it names. |
| P9 | What is wrong in a recipe is refused before anything is loaded, with the line and the fix. |

P3 holds on CPUs, with the same number of processes and threads and the same package versions. A signal stops all ranks
after the step they are in, with a checkpoint and exit code 75. A rank that stands still holds the others for
`ddp_timeout`. DeepSpeed's own part of a checkpoint is pickled, so P8 does not cover it: resume only what you trust.

Not promised: equal bits on GPUs (kernels add in any order), or going on with another number of processes.

## Faults injected

| row | what is done, and what must hold | trials | held |
|---|---|---|---|
{table}
"""


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str], Tally]:
    """Returns the counter of a row of `MATRIX`."""
    rows = request.config.stash.setdefault(ROWS, {})
    return lambda name: Tally(rows, name)


@pytest.fixture
def harness() -> SimpleNamespace:
    """The functions above for tests, which cannot import a conftest."""
    functions = {"in_child": in_child, "in_ranks": in_ranks, "rank_log": rank_log}
    return SimpleNamespace(make_trainer=make_trainer, ending=ending, **functions)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """A forked child must not find a pool of threads that only its parent has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
