"""Our ReFL and DDPO trainers against the last diffusion trainers of TRL, 0.23.1: images per second and peak memory.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/vs_trl.py [--rounds 15] [--out figures.json]

The arms, what they train and what one denoising step means on either side are in `vs_trl_arms.py`. All arms of a
method wait, each in a process of its own, and take turns of a few updates; every second round goes through them
backwards. A ratio is that of neighbouring turns, so that what slows the machine down slows both. An update scores as
many images on either side; warm-up, and with it our start-up check, does not count.

Arms: `trl-*`; `ours-*` with the same terms in the loss, and the same activations computed again in the backward pass;
`ours-refl-kept`, which computes none again (TRL leaves no choice); and `ours-*-anchored` with our defaults, whose
fidelity anchor has no counterpart in TRL. Memory is the peak above what the
process holds once everything is imported and built. On a busy machine the ratio by CPU time says more than that by the
clock.

TRL 0.23.1 needs older packages than ours, hence an environment of its own: `--trl-python`, by default one in the
user's cache, which the first run makes of `requirements-trl-0.23.txt`. Exits with 1 if a goal is missed, and says
where the time goes. Needs Linux (`/proc`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ARMS = {
    "ddpo": ["trl-ddpo", "ours-ddpo", "ours-ddpo-anchored"],
    "refl": ["trl-refl", "ours-refl", "ours-refl-kept", "ours-refl-anchored"],
}
"""By method; the opponent first."""
GOALS = {"ddpo": 1.3, "refl": 1.0}
"""Images per second of `ours-*`, in units of TRL's."""

Rounds = Mapping[str, Sequence[Mapping[str, Any]]]
"""What each arm reported, round by round."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--rounds", type=int, default=15, help="turns of each arm that count")
    parser.add_argument("--updates", type=int, default=2, help="updates of a turn")
    parser.add_argument("--warm-up", type=int, default=2, help="updates before the first turn")
    parser.add_argument("--images", type=int, default=16, help="images that are scored per update")
    parser.add_argument("--candidates", type=int, default=8, help="of one LR image, in our DDPO")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trl-python", type=Path, help="interpreter with TRL 0.23.1")
    parser.add_argument("--profile", action="store_true", help="say where the time goes whatever comes out")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.images % options.candidates:
        parser.error("--images must be a multiple of --candidates")
    pythons = {"ours": sys.executable, "trl": str(options.trl_python or trl_python(cache_folder()))}
    figures: dict[str, Any] = {"settings": settings(options), "methods": {}}
    for method in options.methods:
        rounds, work = take_turns(method, options, pythons)
        figures["methods"][method] = found = summarise(method, rounds, work, options.images * options.updates)
        print(table(method, found), flush=True)
        if options.profile or not found["goal_met"]:
            print(profile_table(found), flush=True)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(found["goal_met"] for found in figures["methods"].values()) else 1


def settings(options: argparse.Namespace) -> dict[str, int]:
    """Returns the numbers that an arm is told."""
    return {name: getattr(options, name) for name in ("images", "candidates", "updates", "warm_up", "threads")}


def arm_command(arm: str, pythons: Mapping[str, str], numbers: Mapping[str, int]) -> list[str]:
    """Returns the command line of an arm.

    Args:
        arm: Its name, which begins with the side it belongs to.
        pythons: The interpreter of each side.
        numbers: What `settings` returned.
    """
    words = [word for name, value in numbers.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [pythons[arm.split("-")[0]], str(HERE / "vs_trl_arms.py"), arm, *words]


def cache_folder() -> Path:
    """Returns where the user's caches are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def trl_python(cache: Path) -> Path:
    """Returns the interpreter of the environment with TRL 0.23.1, which is made if there is none."""
    folder = cache / "refreward_trl" / "venv-trl-0.23"
    python, finished = folder / "bin" / "python", folder / "finished"
    if not finished.exists():
        print(f"making {folder}: about 1.5 GB", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        requirements = HERE / "requirements-trl-0.23.txt"
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(requirements)], check=True)
        finished.touch()
    return python


class Arm:
    """A process that does a round of updates whenever it is asked.

    Args:
        name: The arm.
        command: Its command line.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()  # it is built and warm

    def round(self) -> dict[str, Any]:
        """Lets it do one round and returns what it took."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def finish(self) -> dict[str, Any]:
        """Ends it and returns what it did altogether."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        summary = self._read()
        if self._process.wait():
            raise SystemExit(f"{self.name} ended with {self._process.returncode}")
        return summary

    def kill(self) -> None:
        """Ends it whatever it does."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{self.name} ended with {self._process.wait()} before its report; see its messages above"
            )
        return json.loads(line)


def take_turns(
    method: str, options: argparse.Namespace, pythons: Mapping[str, str]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    """Lets the arms of a method take turns; returns the reports of their rounds, and those of their ends."""
    arms: list[Arm] = []
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS[method]}
    try:
        for name in rounds:
            arms.append(Arm(name, arm_command(name, pythons, settings(options))))
        for turn in range(options.rounds):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                rounds[arm.name].append(arm.round())
        return rounds, {arm.name: arm.finish() for arm in arms}
    finally:
        for arm in arms:
            arm.kill()


def summarise(method: str, rounds: Rounds, work: Mapping[str, Mapping[str, Any]], images: int) -> dict[str, Any]:
    """Returns the figures of a method.

    Args:
        method: ddpo or refl.
        rounds: What each arm reported, round by round.
        work: What each arm reported at its end.
        images: Images per round.

    Raises:
        SystemExit: If an arm trained nothing, or numbers that are not finite: its speed would mean nothing.
    """
    for name, report in work.items():
        if not (report["finite"] and report["moved_tensors"]):
            raise SystemExit(f"{name} did not train: {report}")
    opponent = f"trl-{method}"
    arms = {}
    for name, reports in rounds.items():
        arms[name] = {
            "images_per_second": spread([images / report["seconds"] for report in reports]),
            "images_per_cpu_second": spread([images / report["cpu_seconds"] for report in reports]),
            "profile": profile(reports),
            "rows_per_update": reports[-1]["rows"],
            **work[name],
        }
        if name != opponent:
            arms[name]["ratio"] = spread(ratios(rounds[opponent], reports, "seconds"))
            arms[name]["cpu_ratio"] = spread(ratios(rounds[opponent], reports, "cpu_seconds"))
            arms[name]["peak_ratio"] = work[name]["peak_mb"] / work[opponent]["peak_mb"]
    met = arms[f"ours-{method}"]["ratio"]["median"] >= GOALS[method]
    return {"goal": GOALS[method], "goal_met": met, "rounds": len(rounds[opponent]), "arms": arms}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Returns median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def ratios(opponent: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]], clock: str) -> list[float]:
    """Returns round by round how many times as fast as the opponent ours was, by one of the clocks."""
    return [theirs[clock] / own[clock] for theirs, own in zip(opponent, ours, strict=True)]


def profile(reports: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the share of each part of an update in all the CPU time of an arm, the largest first."""
    total = sum(report["cpu_seconds"] for report in reports)
    names = dict.fromkeys(name for report in reports for name in report["parts"])
    shares = {name: sum(report["parts"].get(name, 0.0) for report in reports) / total for name in names}
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def table(method: str, found: Mapping[str, Any]) -> str:
    """Returns the figures of a method as text."""
    verdict = "met" if found["goal_met"] else "missed"
    lines = [f"{method}, {found['rounds']} rounds; goal {found['goal']:g} times TRL's images per second: {verdict}"]
    lines += [f"{'':<20}{'images/s':>22}{'times TRL':>24}{'by CPU time':>13}{'peak MB':>9}  denoised per update"]
    for name, arm in found["arms"].items():
        ratio = _span(arm["ratio"], 2) if "ratio" in arm else ""
        cpu_ratio = f"{arm['cpu_ratio']['median']:.2f}" if "ratio" in arm else ""
        rows = {key: count for key, count in arm["rows_per_update"].items() if key.startswith("denoiser, ")}
        denoised = " + ".join(f"{count:g} {key.removeprefix('denoiser, ')}" for key, count in rows.items())
        lines.append(
            f"{name:<20}{_span(arm['images_per_second'], 1):>22}{ratio:>24}{cpu_ratio:>13}{arm['peak_mb']:>9.0f}  "
            f"{denoised}"
        )
    return "\n".join(lines)


def profile_table(found: Mapping[str, Any]) -> str:
    """Returns where each arm's CPU time goes, in milliseconds an image and in shares."""
    names = list(found["arms"])
    parts = dict.fromkeys(part for name in names for part in found["arms"][name]["profile"])
    lines = [f"{'CPU ms an image (share)':<30}" + "".join(f"{name:>20}" for name in names)]
    for part in parts:
        line = f"{part:<30}"
        for name in names:
            arm = found["arms"][name]
            share = arm["profile"].get(part, 0.0)
            cell = f"{1000 * share / arm['images_per_cpu_second']['median']:.2f} ({share:.1%})"
            line += f"{cell if share else '-':>20}"
        lines.append(line)
    return "\n".join(lines)


def _span(values: Mapping[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['lowest']:.{digits}f} to {values['highest']:.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
