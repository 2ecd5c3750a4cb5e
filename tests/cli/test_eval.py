from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from refreward_trl.cli import app
from refreward_trl.data.images import to_uint8, write_png
from refreward_trl.generators.tiny import build_tiny_generator
from refreward_trl.resampling import downscale, upscale

METRICS = ("psnr_y", "ssim_y", "lr_consistency", "gradient_energy", "my_eval_cli_rewards.contrast")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch) -> Path:
    """`hr/`, `lr/` (reduced), `sr/` (enlarged nearest), an untrained `generator/` and a reward; the current folder."""
    random = torch.Generator().manual_seed(0)
    for name in ("a", "b", "c"):
        hr_image = upscale(torch.rand(1, 3, 8, 8, generator=random), 4)
        lr_image = downscale(hr_image, 4).clamp(0, 1)
        nearest = lr_image.repeat_interleave(4, 2).repeat_interleave(4, 3)
        for folder, image in (("hr", hr_image), ("lr", lr_image), ("sr", nearest)):
            write_png(tmp_path / folder / f"{name}.png", to_uint8(image[0]))
    build_tiny_generator(seed=1, vae_width=8, unet_channels=(8, 16)).save_pretrained(tmp_path / "generator")
    (tmp_path / "my_eval_cli_rewards.py").write_text(
        "def contrast(*, completions, **columns):\n    return [float(image.std()) for image in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_eval_cli_rewards", raising=False)
    return tmp_path


def evaluate(*words: str, out: str = "out", metrics: tuple[str, ...] = METRICS) -> dict[str, Any]:
    assert app.main(["eval", *words, "--metrics", *metrics, "--output-dir", out, "--device", "cpu"]) == 0
    return json.loads(Path(out, "eval.json").read_text())


PAIRS = ("--lr", "lr", "--hr", "hr")
MODELS = ("--models", "bicubic", "net=generator", "nearest=sr")


def test_generators_and_folders_are_compared_on_one_page(folders: Path, capsys) -> None:
    found = evaluate(*PAIRS, *MODELS)
    assert [model["label"] for model in found["models"]] == ["bicubic", "net", "nearest"]
    assert [entry["name"] for entry in found["metrics"]] == list(METRICS)
    psnr = found["metrics"][0]["models"]
    assert psnr["bicubic"]["mean"]["mean"] > psnr["nearest"]["mean"]["mean"]
    assert psnr["nearest"]["win_rate"]["mean"] == 0.0
    assert psnr["nearest"]["minus_baseline"]["high"] < 0
    assert found["facts"]["seed"].startswith("0, of degradations")
    page = Path("out/eval.html").read_text()
    sources = re.findall(r'src="(.{0,20})', page)
    assert sources and all(source.startswith("data:image/webp") for source in sources)
    assert page.count('class="before"') == page.count('class="lr"') >= 2
    assert page.count('<figure class="chart">') == 3
    assert all(entry["protocol"]["hash"] in page for entry in found["metrics"])
    printed = capsys.readouterr().out
    assert "wrote out/eval.json" in printed and all(f"{name}: " in printed for name in METRICS)


def test_the_same_words_give_the_same_bytes(folders: Path) -> None:
    evaluate(*PAIRS, *MODELS)
    evaluate(*PAIRS, *MODELS, out="again")
    for name in ("eval.json", "eval.html", "images/net/a.png"):
        assert Path("out", name).read_bytes() == Path("again", name).read_bytes()


@pytest.mark.parametrize("images", [["--lr", "lr"], ["--dataset", "lr:lr"]], ids=" ".join)
def test_the_judges_are_measured_without_hr_images_by_default(images: list[str], folders: Path) -> None:
    assert app.main(["eval", *images, "--models", "bicubic", "sr", "--output-dir", "out"]) == 0
    found = json.loads(Path("out/eval.json").read_text())
    assert [entry["name"] for entry in found["metrics"]] == [
        "lr_consistency",
        "gradient_energy",
        "refreward",
        "heldout_judge",
    ]
    assert all(image["hr"] == "" for image in found["images"])
    assert "weights" in found["metrics"][2]["protocol"]["judge"]


def test_the_seed_reaches_degradations_and_intervals(folders: Path) -> None:
    words = ("--dataset", "hr:hr", "--models", "bicubic", "sr")
    first, other = (evaluate(*words, "--seed", seed, metrics=("lr_consistency",)) for seed in ("0", "5"))
    assert (first["bootstrap"]["seed"], other["bootstrap"]["seed"]) == (0, 5)
    assert all(
        a["hr"] == b["hr"] and a["lr"] != b["lr"] for a, b in zip(first["images"], other["images"], strict=True)
    )
    assert "preset seesr, seed 5" in other["facts"]["LR images"]


def test_saved_results_of_one_set_and_protocol_are_joined(folders: Path, capsys) -> None:
    evaluate(*PAIRS, "--models", "bicubic", "sr", out="one")
    evaluate(*PAIRS, "--models", "bicubic", "generator", out="two", metrics=METRICS[:2])
    joined = ["eval", "--compare", "one/eval.json", "two/eval.json"]
    capsys.readouterr()
    assert app.main([*joined, "--output-dir", "both"]) == 0
    found = json.loads(Path("both/eval.json").read_text())
    assert [model["label"] for model in found["models"]] == ["bicubic", "sr", "generator"]
    assert [entry["name"] for entry in found["metrics"]] == ["psnr_y", "ssim_y"]
    assert "not joined: lr_consistency: only in one/eval.json" in capsys.readouterr().out
    assert "<svg" not in Path("both/eval.html").read_text().partition("<script>")[0].partition("</style>")[2]


def test_unlike_protocols_and_other_images_are_refused(folders: Path, capsys) -> None:
    evaluate(*PAIRS, "--models", "bicubic", "sr", out="one", metrics=("psnr_y", METRICS[-1]))
    reward = folders / "my_eval_cli_rewards.py"
    reward.write_text(reward.read_text().replace("std", "mean"))
    evaluate(*PAIRS, "--models", "bicubic", "sr", out="two", metrics=("psnr_y", METRICS[-1]))
    assert app.main(["eval", "--compare", "one/eval.json", "two/eval.json"]) == 3
    assert f"{METRICS[-1]} [" in capsys.readouterr().err
    write_png(folders / "lr/b.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    evaluate(*PAIRS, "--models", "bicubic", "sr", out="three", metrics=("psnr_y",))
    assert app.main(["eval", "--compare", "one/eval.json", "three/eval.json"]) == 3
    assert "b: other LR pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "bicubic", "sr"], "either --lr DIR or --dataset SOURCE"),
        (["--lr", "lr", "--dataset", "default", "--models", "bicubic", "sr"], "either --lr DIR or --dataset SOURCE"),
        (["--dataset", "default", "--hr", "hr", "--models", "bicubic", "sr"], "--hr belongs to --lr"),
        (["--lr", "lr", "--split", "test", "--models", "bicubic", "sr"], "--split belongs to --dataset"),
        (["--lr", "lr"], "name the --models"),
        (["--lr", "lr", "--models", "bicubic"], "nothing to compare"),
        (["--compare", "a.json"], "at least two files"),
        (["--compare", "a.json", "b.json", "--lr", "lr"], "does not go with --lr"),
        (["--lr", "lr", "--models", "bicubic", "sr", "--metrics", "psnr"], "several kinds of psnr"),
        (["--lr", "lr", "--models", "bicubic", "sr", "--metrics", "psnr_y"], "psnr_y compare with HR images"),
        (["--lr", "lr", "--models", "bicubic", "gone", "--metrics", "lr_consistency"], "nothing at 'gone'"),
        (["--lr", "lr", "--models", "bicubic", "generator", "--metrics", "lr_consistency", "--scale", "2"], "scale"),
    ],
)
def test_words_that_contradict_each_other_are_told(words: list[str], message: str, folders: Path, capsys) -> None:
    assert app.main(["eval", *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_bad_image_ends_it_before_anything_is_written(folders: Path, capsys) -> None:
    (folders / "sr/b.png").write_bytes(b"")
    (folders / "hr/c.png").unlink()
    assert app.main(["eval", *PAIRS, *MODELS, "--metrics", "psnr_y"]) == 3
    shown = capsys.readouterr().err
    assert "sr/b.png: the image is empty" in shown and "lr/c.png: no image of this name in hr" in shown
    assert not Path("runs").exists()


def test_a_file_cannot_be_compared_with_itself(folders: Path, capsys) -> None:
    assert app.main(["eval", "--compare", "a.json", "a.json"]) == 3
    assert "named twice" in capsys.readouterr().err
