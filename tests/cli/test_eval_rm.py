"""`refreward eval-rm`, from the words to the files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from preference_sets import group
from tiny_judges import family_judge

from refreward_trl.cli import app
from refreward_trl.data.preferences import write_preferences

REWARDS = """
def bright(completions, **columns):
    return [float(image.mean()) for image in completions]
def dark(completions, **columns):
    return [-float(image.mean()) for image in completions]
def broken(completions, **columns):
    raise ZeroDivisionError("oh")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """`prefs/` with two splits, `my_eval_rm_rewards.py`, and a tiny `judge/`; the current folder."""
    makers = ("a", "b", "c")
    records = [
        group(n, generators=makers, kinds=("", "blur", "noise"), split="test" if n < 4 else "train", side=32)
        for n in range(6)
    ]
    write_preferences(records, tmp_path / "prefs")
    (tmp_path / "my_eval_rm_rewards.py").write_text(REWARDS)
    family_judge("qwen2_5_vl").save_pretrained(tmp_path / "judge")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_eval_rm_rewards", raising=False)
    return tmp_path


def run(*words: str, out: str = "out") -> dict[str, Any]:
    assert app.main(["eval-rm", *words, "--data", "prefs", "--device", "cpu", "--output-dir", out]) == 0
    return json.loads(Path(out, "summary.json").read_text())


BRIGHT, DARK = "my_eval_rm_rewards.bright", "my_eval_rm_rewards.dark"


def test_models_and_baselines_stand_in_one_table_with_protocol_and_hashes(folder: Path, capsys) -> None:
    models = [f"good={BRIGHT}", f"bad={DARK}", "judge:compare", "judge:reason_compare"]
    found = run(*(word for model in models for word in ("--model", model)))
    accuracies = {name: model["accuracy"]["mean"] for name, model in found["models"].items()}
    assert accuracies | {"judge-compare": None} == {
        "good": 1.0,
        "bad": 0.0,
        "judge-compare": None,
        "judge-reason_compare": None,  # what an untrained judge writes names no choice
    }
    protocol, hashes = found["protocol"], found["hashes"]
    assert (protocol["split"], protocol["aspect"], protocol["seed"]) == ("test", "overall", 0)
    assert (protocol["groups"], protocol["photos"], protocol["pairs"], protocol["ties"]) == (4, 4, 12, 0)
    assert "torch" in protocol["versions"] and "accuracy" in protocol["definitions"]
    assert len(hashes["dataset"]) == 64 and set(hashes["models"]["judge-compare"]) == {"spec_hash", "weights_digest"}
    assert next(iter(found["baselines"])) == "generator_identity"
    assert {"method_identity", "lr_consistency", "psnr_to_upsampled_lr", "laplacian_variance"} <= set(
        found["baselines"]
    )
    assert found["models"]["good"]["swap_consistency"]["by_definition"]
    swap = found["models"]["judge-compare"]["swap_consistency"]
    assert not swap["by_definition"] and 0 <= swap["mean"] <= 1
    assert found["models"]["good"]["lr_ablation"]["shuffled"]["drop"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert len(found["worst_errors"]["bad"]) == 12 and not found["worst_errors"]["good"]
    assert "<!doctype html>" in Path("out/report.html").read_text()
    shown = capsys.readouterr()
    assert "generator_identity" in shown.out and "wrote out/summary.json" in shown.out
    assert "good: 100%" in shown.err and "baselines: 100%" in shown.err


def test_the_same_words_give_the_same_bytes(folder: Path) -> None:
    run("--model", "judge")
    run("--model", "judge", out="again")
    for name in ("summary.json", "report.html"):
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()


def test_split_seed_metrics_cache_and_precision_reach_the_evaluation(folder: Path) -> None:
    words = ("--model", "judge", "--split", "train+test", "--seed", "3", "--cache", "scores.sqlite")
    found = run(*words, "--dtype", "bfloat16", "--metrics", "ssim_rgb", DARK)
    assert found["protocol"]["groups"] == 6 and found["protocol"]["seed"] == 3
    assert found["protocol"]["split"] == "train+test" and found["protocol"]["dtype"] == "bfloat16"
    assert found["baselines"]["ssim_rgb"]["scored_pairs"] == 18
    assert found["baselines"][DARK]["accuracy"]["mean"] == 0
    assert Path("scores.sqlite").is_file()
    again = run(*words, "--dtype", "bfloat16", out="again")
    assert again["models"] == found["models"]


def test_all_groups_are_used_where_no_split_is_called_test(folder: Path) -> None:
    write_preferences([group(n) for n in range(3)], folder / "plain")
    assert app.main(["eval-rm", "--model", BRIGHT, "--data", "plain", "--output-dir", "out"]) == 0
    assert json.loads(Path("out/summary.json").read_text())["protocol"]["split"] == "all groups"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "the following arguments are required: --model, --data"),
        (["--model", BRIGHT], 2, "required: --data"),
        (["--model", BRIGHT, "--data", "gone"], 3, "gone: the dataset does not exist"),
        (["--model", BRIGHT, "--data", "prefs", "--split", "val"], 2, "has no split 'val'"),
        (["--model", BRIGHT, "--data", "prefs", "--aspect", "beauty"], 2, "there is no aspect 'beauty'"),
        (["--model", BRIGHT, "--data", "prefs", "--aspect", "naturalness"], 3, "says anything about 'naturalness'"),
        (["--model", "no/such/folder", "--data", "prefs"], 5, "no judge at 'no/such/folder'"),
        (["--model", "my_eval_rm_rewards.nothing", "--data", "prefs"], 2, "has no 'nothing'"),
        (["--model", f"{BRIGHT}:compare", "--data", "prefs"], 2, "only rates"),
        (["--model", "judge", "--model", "judge", "--data", "prefs"], 2, "two models are called 'judge'"),
        (["--model", "my_eval_rm_rewards.broken", "--data", "prefs"], 4, "raised ZeroDivisionError: oh"),
        (["--model", BRIGHT, "--data", "prefs", "--metrics", "psnr"], 2, "several kinds of psnr"),
        (["--model", BRIGHT, "--data", "prefs", "--metrics", "gradient_energy"], 2, "neither direction"),
        (["--model", BRIGHT, "--data", "prefs", "--device", "gpu"], 2, "there is no device 'gpu'"),
        (["--model", BRIGHT, "--data", "prefs", "--device", "cuda:99"], 2, "there is no device 'cuda:99'"),
        (["--model", BRIGHT, "--data", "prefs", "--spec", "other=spec.json"], 2, "no NAME=FILE"),
        (["--model", BRIGHT, "--data", "prefs", "--batch-size", "0"], 2, "--batch-size must be at least 1"),
        (["--model", BRIGHT, "--data", "prefs", "--out", "x"], 2, "unknown argument '--out'"),
    ],
)
def test_mistakes_are_told_with_their_exit_code(
    words: list[str], code: int, message: str, folder: Path, capsys
) -> None:
    assert app.main(["eval-rm", *words]) == code
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_missing_image_is_told_before_any_model_is_asked(folder: Path, capsys) -> None:
    (folder / "prefs/images/p001@0/1.png").write_bytes(b"")
    assert app.main(["eval-rm", "--model", "my_eval_rm_rewards.broken", "--data", "prefs"]) == 3
    assert "p001@0/1.png" in capsys.readouterr().err
