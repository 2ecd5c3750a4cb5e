"""`refreward doctor`: what a run will take in memory, time and disk, and what helps if it is too much."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refreward_trl.cli.parser import CommandParser
from refreward_trl.cli.recipe import Recipe, read_recipe
from refreward_trl.errors import ConfigError

if TYPE_CHECKING:
    from refreward_trl.cli.doctor_plan import Pictures, Plan
    from refreward_trl.trainers.memory_estimate import Sharding

DOES_NOT_FIT = 6
MOST_PARTS = 6
LEAST_HELP = 0.01
"""Share of the peak that a setting must spare to be named."""
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DISK_KEPT = 2


@dataclass(frozen=True)
class Room:
    """How much there is.

    Attributes:
        size: Bytes; None where nobody knows.
        what: Of what.
    """

    size: int | None
    what: str


def main(argv: list[str]) -> int:
    """Prints the estimate; returns 0 if the run fits and 6 if it does not."""
    parser = _parser()
    if "-h" in argv or "--help" in argv:
        parser.parse_args(["--help"])
    arguments, flags = parser.parse_known_args(argv)
    recipe = read_recipe(arguments.config, flags=flags)
    limit = None if arguments.memory is None else read_size(arguments.memory)
    print(f"rehearsing {recipe.method} on shapes ...", file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed talks there when it is imported
        report = examine(recipe, arguments, limit)
    print(json.dumps(report, indent=2) if arguments.json else as_text(report))
    return 0 if report["fits"] else DOES_NOT_FIT


def _parser() -> CommandParser:
    parser = CommandParser(
        "doctor",
        "Predict from shapes alone what a run takes: peak memory, time of a step, size of a checkpoint;\n"
        "and which setting helps by how much. Weights are not loaded. Keys of the recipe can be overridden:\n"
        "--key value. Exit code 0: it fits; 6: it does not.",
        "refreward doctor --config tiny/refl --per_device_train_batch_size 64 --memory 2GB",
    )
    parser.add_argument("--config", required=True, metavar="RECIPE", help="a .yaml file, or a packaged recipe")
    parser.add_argument("--memory", metavar="SIZE", help="what there is, such as 24GB; default: this device's")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where it will run; default: what is here")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="ranks that train together")
    parser.add_argument("--zero", type=int, default=0, choices=(0, 1, 2, 3), help="DeepSpeed's ZeRO stage")
    parser.add_argument("--offload", action="store_true", help="with ZeRO's state in the CPU's memory")
    parser.add_argument("--quick", action="store_true", help="do not try the settings that could help")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def read_size(text: str) -> int:
    """Returns the bytes of a size such as "24GB", "512 MiB" or "800000000".

    Raises:
        ConfigError: It is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found and {"G": "GB", "M": "MB"}.get(found[2].upper(), found[2].upper())
    if found is None or unit not in _UNITS or not float(found[1]):
        raise ConfigError(f"{text!r} is no size", where="--memory", fix="write it like 24GB, 512MB or 16GiB")
    return round(float(found[1]) * _UNITS[unit])


def examine(recipe: Recipe, arguments: Any, limit: int | None) -> dict[str, Any]:
    """Returns everything that the command prints."""
    import torch

    from refreward_trl.cli.doctor_plan import look_at_pictures, plan
    from refreward_trl.trainers.memory_estimate import Sharding, measure_rates

    if arguments.processes < 1:
        raise ConfigError(f"--processes is {arguments.processes}", where="--processes", fix="use 1 or more")
    here = "cuda" if torch.cuda.is_available() and not recipe.values.get("use_cpu") else "cpu"
    device = arguments.device or here
    sharding = Sharding(arguments.processes, arguments.zero, arguments.offload)
    pictures = look_at_pictures(recipe)
    made = plan(recipe, pictures, cpu=device == "cpu")
    estimate = made.estimate
    total = estimate.total(sharding)
    room = room_of(device, limit)
    imports = imported() if device == "cpu" and limit is None else 0
    # The processes of a CPU share its memory.
    needed = (total + imports) * (arguments.processes if device == "cpu" and limit is None else 1)
    seconds = None
    if device == here:
        rates = measure_rates(torch.device(device))
        seconds = rates.seconds(estimate.work) * recipe.values.get("gradient_accumulation_steps", 1) / _traced(recipe)
    helps = [] if arguments.quick else _helps(recipe, pictures, made, sharding, total, device)
    fits = room.size is None or needed <= room.size
    return {
        "method": recipe.method,
        "device": device,
        "processes": arguments.processes,
        "zero_stage": arguments.zero,
        "peak_bytes": total,
        "in_use_bytes": estimate.peak(sharding)[0],
        "peak_during": estimate.peak(sharding)[1].name,
        "parts": estimate.parts(sharding),
        "phases": {phase.name: phase.size for phase in estimate.phases},
        "imports_bytes": imports,
        "room_bytes": room.size,
        "room": room.what,
        "fits": fits,
        "trained_weights": estimate.holdings.trained // 4,
        "step_seconds": seconds,
        "step_tflop": (estimate.work.convolution + estimate.work.matrix) / 1e12,
        "checkpoint_bytes": estimate.checkpoint,
        "generator_bytes": estimate.saved,
        "disk": _disk(recipe, estimate.checkpoint, estimate.saved),
        "helps": helps,
        "remarks": list(made.remarks),
    }


def room_of(device: str, limit: int | None) -> Room:
    """Returns the memory of a device, or what the user says it is."""
    if limit is not None:
        return Room(limit, "what you gave")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            return Room(None, "a GPU that is not here: give --memory")
        return Room(torch.cuda.get_device_properties(0).total_memory, torch.cuda.get_device_name(0))
    return Room(available(), "available to this machine")


def available() -> int | None:
    """Returns the bytes of memory that new processes can have, within the limit of a container; None if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    try:
        most = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return free
    return free if free is None or not most.isdigit() else min(free, int(most) - used)


def imported() -> int:
    """Returns what this process holds: it has imported what a run imports."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _traced(recipe: Recipe) -> int:
    return min(2, recipe.values.get("gradient_accumulation_steps", 1))


def _disk(recipe: Recipe, checkpoint: int, saved: int) -> dict[str, Any]:
    """Returns what a run writes at most at a time: the kept checkpoints, one being written, and the generator."""
    kept = max(_DISK_KEPT, recipe.values.get("save_total_limit") or _DISK_KEPT)
    folder = Path(str(recipe.values.get("output_dir", "."))).expanduser()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    needed = 0 if recipe.values.get("save_strategy") == "no" else checkpoint * (kept + 1)
    return {"needed_bytes": needed + saved, "free_bytes": shutil.disk_usage(folder).free, "kept": kept}


def _helps(
    recipe: Recipe, pictures: Pictures, made: Plan, sharding: Sharding, total: int, device: str
) -> list[dict[str, Any]]:
    """Tries each setting that is not used yet; returns those that spare something, the best first."""
    from refreward_trl.cli.doctor_plan import knobs, plan

    found = []
    for knob in knobs(recipe, sharding, cpu=device == "cpu"):
        print(f"  trying {knob.text} ...", file=sys.stderr)
        estimate = made.estimate
        if knob.values:
            changed = Recipe(recipe.method, recipe.source, {**recipe.values, **knob.values})
            # What evaluation takes stays what it is.
            again = plan(changed, replace(pictures, evaluated=None), cpu=device == "cpu").estimate
            estimate = replace(again, phases=[*again.phases, *made.estimate.phases[1:]])
        size = estimate.total(knob.sharding or sharding)
        if total - size > LEAST_HELP * total:
            found.append({"set": knob.text, "peak_bytes": size, "spares_bytes": total - size, "costs": knob.costs})
    return sorted(found, key=lambda entry: entry["peak_bytes"])


def as_text(report: dict[str, Any]) -> str:
    """Lays a report out in plain words."""
    lines = [
        f"peak memory   {show(report['peak_bytes'])} a process"
        + (f" above {show(report['imports_bytes'])} for the imports" if report["imports_bytes"] else ""),
        f"              {_verdict(report)}",
        f"a step        {_step(report)}",
        f"a checkpoint  {show(report['checkpoint_bytes'])}; the saved generator {show(report['generator_bytes'])}",
        f"on the disk   {show(report['disk']['needed_bytes'])} with {report['disk']['kept']} checkpoints kept; "
        f"{show(report['disk']['free_bytes'])} are free",
        "",
        f"What it is made of, at its most (during the {report['peak_during']}):",
    ]
    parts = list(report["parts"].items())
    shown, rest = parts[:MOST_PARTS], parts[MOST_PARTS:]
    if rest:
        shown.append((f"{len(rest)} smaller parts", sum(size for _, size in rest)))
    lines += [f"  {show(size):>8}  {100 * size / report['peak_bytes']:3.0f} %  {name}" for name, size in shown]
    lines += ["", *_advice(report)]
    for remark in report["remarks"]:
        lines += ["", *textwrap.wrap(f"note: {remark}", 118)]
    return "\n".join(lines)


def _verdict(report: dict[str, Any]) -> str:
    if report["room_bytes"] is None:
        return f"fits? unknown: {report['room']}"
    word = "fits into" if report["fits"] else "does NOT fit into"
    return f"{word} {show(report['room_bytes'])} ({report['room']})"


def _step(report: dict[str, Any]) -> str:
    work = f"{report['step_tflop']:.3g} TFLOP"
    if report["step_seconds"] is None:
        return f"{work} (its time: ask on the machine that will run it)"
    return f"about {report['step_seconds']:.2g} s: {work} at the rates measured just now (rough)"


def _advice(report: dict[str, Any]) -> list[str]:
    if not report["helps"]:
        return ["No setting that was tried would make it smaller by more than 1 %."] if report["fits"] else []
    lines = ["What would help:" if not report["fits"] else "What would make it smaller:"]
    for entry in report["helps"]:
        fits = (
            report["room_bytes"] is not None and entry["peak_bytes"] + report["imports_bytes"] <= report["room_bytes"]
        )
        note = " and fits" if fits and not report["fits"] else ""
        lines.append(f"  -{show(entry['spares_bytes']):>7} -> {show(entry['peak_bytes'])}{note}: {entry['set']}")
        lines.append(f"           costs: {entry['costs']}")
    return lines


def show(size: float) -> str:
    """Returns a number of bytes as text, such as "1.5 GB"."""
    units: Sequence[str] = ("B", "kB", "MB", "GB", "TB")
    amount, place = float(size), 0
    while abs(amount) >= 999.5 and place < len(units) - 1:
        amount, place = amount / 1000, place + 1
    return f"{amount:.3g} {units[place]}"
