"""The comparison with TRL's trainers: its arithmetic, and that the arms really train, at the same number of images."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return _load("vs_trl")


def _round(seconds: float, cpu_seconds: float = 1.0) -> dict[str, Any]:
    parts = {"denoiser, with gradient": cpu_seconds / 4, "bookkeeping": 3 * cpu_seconds / 4}
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "parts": parts, "rows": {"denoiser, with gradient": 2.0}}


def _work(peak_mb: float = 100.0, **changes: Any) -> dict[str, Any]:
    return {"peak_mb": peak_mb, "finite": True, "moved_tensors": 3, **changes}


def _found(benchmark: Any, seconds: list[list[float]], **changes: Any) -> dict[str, Any]:
    rounds = {name: [_round(each) for each in own] for name, own in zip(benchmark.ARMS["ddpo"], seconds, strict=True)}
    work = {name: _work(100.0 * number) for number, name in enumerate(rounds, 1)}
    work["ours-ddpo"] |= changes
    return benchmark.summarise("ddpo", rounds, work, 12)


def test_ratio_is_the_median_over_neighbouring_turns(benchmark: Any) -> None:
    # The machine becomes ten times slower after the first turn: neighbours still agree, all medians would not.
    found = _found(benchmark, [[2.0, 20.0, 26.0], [1.0, 10.0, 10.0], [4.0, 40.0, 26.0]])
    ours = found["arms"]["ours-ddpo"]
    assert ours["ratio"] == {"median": 2.0, "lowest": 2.0, "highest": 2.6}
    assert found["arms"]["ours-ddpo-anchored"]["ratio"]["median"] == 0.5
    assert ours["images_per_second"] == {"median": 1.2, "lowest": 1.2, "highest": 12.0}
    assert ours["cpu_ratio"]["median"] == 1.0
    assert ours["peak_ratio"] == 2.0
    assert "ratio" not in found["arms"]["trl-ddpo"]


@pytest.mark.parametrize(("own", "met"), [(1.0, True), (1.01, False)])
def test_the_goal_is_that_of_the_arm_with_the_same_terms(benchmark: Any, own: float, met: bool) -> None:
    goal = benchmark.GOALS["ddpo"]
    assert _found(benchmark, [[goal], [own], [0.1]])["goal_met"] is met


@pytest.mark.parametrize("broken", [{"finite": False}, {"moved_tensors": 0}])
def test_the_speed_of_an_arm_that_did_not_train_is_no_figure(benchmark: Any, broken: dict[str, Any]) -> None:
    with pytest.raises(SystemExit, match="ours-ddpo did not train"):
        _found(benchmark, [[1.0], [1.0], [1.0]], **broken)


def test_profile_shares_are_of_all_the_cpu_time(benchmark: Any) -> None:
    first = _round(1.0, 1.0) | {"parts": {"bookkeeping": 1.0}}
    second = _round(30.0, 3.0) | {"parts": {"denoiser, with gradient": 1.0, "bookkeeping": 2.0}}
    shares = benchmark.profile([first, second])
    assert list(shares) == ["bookkeeping", "denoiser, with gradient"]
    assert shares == {"bookkeeping": 0.75, "denoiser, with gradient": 0.25}


def test_tables_name_every_arm_and_say_whether_the_goal_was_met(benchmark: Any) -> None:
    found = _found(benchmark, [[2.0], [1.0], [4.0]])
    text = benchmark.table("ddpo", found)
    assert "goal 1.3 times TRL's images per second: met" in text
    assert [line.split()[0] for line in text.splitlines()[2:]] == benchmark.ARMS["ddpo"]
    assert "2.00 (2.00 to 2.00)" in text
    assert "missed" in benchmark.table("ddpo", found | {"goal_met": False})
    # 12 images in one CPU second, of which three quarters are bookkeeping.
    assert "62.50 (75.0%)" in benchmark.profile_table(found)


def test_each_side_runs_in_its_own_interpreter_with_the_same_numbers(benchmark: Any) -> None:
    numbers = benchmark.settings(Namespace(images=8, candidates=4, updates=3, warm_up=2, threads=1, rounds=7))
    pythons = {"trl": "/old/python", "ours": "/new/python"}
    theirs, own = (benchmark.arm_command(name, pythons, numbers) for name in benchmark.ARMS["refl"][:2])
    assert (theirs[0], own[0]) == ("/old/python", "/new/python")
    assert (theirs[2], own[2]) == ("trl-refl", "ours-refl")
    assert theirs[3:] == own[3:]
    assert " ".join(own[3:]) == "--images 8 --candidates 4 --updates 3 --warm-up 2 --threads 1"


def test_the_environment_of_trl_is_made_once(benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = benchmark.cache_folder() / "refreward_trl" / "venv-trl-0.23"
    folder.mkdir(parents=True)
    (folder / "finished").touch()
    assert benchmark.trl_python(benchmark.cache_folder()) == folder / "bin" / "python"
    assert [path.name for path in folder.iterdir()] == ["finished"]


def test_every_arm_exists(benchmark: Any) -> None:
    known = _load("vs_trl_arms").ARMS
    assert sorted(name for method in benchmark.GOALS for name in benchmark.ARMS[method]) == sorted(known)


def _run(python: str, benchmark: Any, arm: str) -> list[dict[str, Any]]:
    numbers = {"images": 4, "candidates": 2, "updates": 1, "warm_up": 1, "threads": 1}
    command = benchmark.arm_command(arm, {"trl": python, "ours": python}, numbers)
    done = subprocess.run(command, input="\n\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check_reports(reports: list[dict[str, Any]], denoised: int) -> None:
    ready, *rounds, summary = reports
    assert ready == {"ready": True}
    assert len(rounds) == 2
    for report in rounds:
        assert sum(report["parts"].values()) == pytest.approx(report["cpu_seconds"])
        assert all(seconds > 0 for seconds in report["parts"].values())
        assert report["rows"]["denoiser, with gradient"] == denoised
        decoded = {name: rows for name, rows in report["rows"].items() if name.startswith("decoder")}
        assert set(decoded.values()) == {4}  # every image, and with an anchor the reference's
    assert summary["updates"] == 3
    assert summary["finite"] and summary["moved_tensors"] == 256
    assert summary["trained_parameters"] == 99648
    assert summary["peak_mb"] > 10


@pytest.mark.slow
@pytest.mark.parametrize(("arm", "denoised"), [("ours-ddpo", 2), ("ours-refl-anchored", 4)])
def test_our_arms_train(benchmark: Any, arm: str, denoised: int) -> None:
    _check_reports(_run(sys.executable, benchmark, arm), denoised)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["trl-ddpo", "trl-refl"])
def test_trl_arms_train_the_same_adapter(benchmark: Any, arm: str) -> None:
    folder = benchmark.cache_folder() / "refreward_trl" / "venv-trl-0.23"
    if not (folder / "finished").exists():
        pytest.skip(f"{folder} is made by the first run of benchmarks/vs_trl.py")
    _check_reports(_run(str(folder / "bin" / "python"), benchmark, arm), 4)
