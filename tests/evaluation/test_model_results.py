"""What is saved must be read again as it was, recomputed from its figures, and joined only where it may be."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isnan, nan
from pathlib import Path

import numpy as np
import pytest

from refreward_trl.cli.json_file import write_json
from refreward_trl.errors import DataError
from refreward_trl.evaluation.model_results import (
    Evaluation,
    Figure,
    MeasuredImage,
    MeasuredModel,
    join_evaluations,
    read_evaluation,
)
from refreward_trl.evaluation.protocols import Protocol
from refreward_trl.evaluation.statistics import gain_minus_control

COUNT = 6
NAMES = [f"photo{index}" for index in range(COUNT)]
PSNR = Protocol("psnr", "hr_image", "Y")
LPIPS = Protocol("lpips", "hr_image", "RGB", package="pyiqa 0.1.16")


def figure(name: str, values: dict[str, list[float]], protocol: Protocol = PSNR, better: str = "higher") -> Figure:
    return Figure(name, protocol, better, "fidelity", "dB", 2, values)  # type: ignore[arg-type]


def evaluation(*labels: str, shift: float = 1.0, seed: int = 0, protocol: Protocol = PSNR) -> Evaluation:
    random = np.random.default_rng(seed)
    base = random.normal(25, 3, COUNT)
    values = {
        label: (base + shift * place + random.normal(0, 0.1, COUNT)).tolist() for place, label in enumerate(labels)
    }
    return Evaluation(
        [MeasuredImage(name, f"lr{name}", f"hr{name}") for name in NAMES],
        [MeasuredModel(label, f"runs/{label}", tuple(f"{label}{seed}{name}" for name in NAMES)) for label in labels],
        [figure("psnr_y", values, protocol)],
        facts={"scale": "4"},
    )


def test_differences_are_paired_by_image() -> None:
    found = evaluation("before", "after")
    (psnr,) = found.figures
    before, after = (psnr.values[label] for label in ("before", "after"))
    same = [0.0] * COUNT
    expected = gain_minus_control(before, after, same, same, NAMES)
    assert found.difference(psnr, "after") == expected
    assert expected.high - expected.low < 0.4 < found.mean(psnr, "after").high - found.mean(psnr, "after").low
    assert found.win_rate(psnr, "after").mean == 1.0


def test_wins_follow_the_direction_that_is_better() -> None:
    values = {"before": [0.3, 0.3, 0.3, 0.3], "after": [0.2, 0.2, 0.3, nan]}
    images = [MeasuredImage(name, "a") for name in NAMES[:4]]
    models = [MeasuredModel(label, label, ("x",) * 4) for label in values]
    lower, neither = (figure("lpips", values, LPIPS, better) for better in ("lower", "neither"))
    found = Evaluation(images, models, [lower, neither])
    assert found.win_rate(lower, "after").mean == pytest.approx(2.5 / 3)
    assert isnan(found.win_rate(neither, "after").mean)
    assert found.mean(lower, "after").mean == pytest.approx(0.7 / 3)


def test_a_saved_result_is_read_again_with_every_number_in_its_protocol(tmp_path: Path) -> None:
    found = evaluation("before", "after")
    found = replace(
        found, figures=[*found.figures, figure("lpips", {k: [nan] * COUNT for k in found.labels}, LPIPS, "lower")]
    )
    write_json(tmp_path / "eval.json", found.as_dict())
    content = json.loads((tmp_path / "eval.json").read_text())
    for entry in content["metrics"]:
        assert set(entry["protocol"]) >= {"hash", "colour", "border", "pixels", "resampling", "package", "judge"}
        assert set(entry["models"]) == {"before", "after"}
    assert content["metrics"][0]["models"]["after"]["minus_baseline"]["mean"] == pytest.approx(1.0, abs=0.2)
    assert content["metrics"][1]["models"]["after"]["values"] == [None] * COUNT
    again = read_evaluation(tmp_path / "eval.json")
    assert again.image_set == found.image_set and again.labels == found.labels
    assert again.as_dict()["metrics"][0] == found.as_dict()["metrics"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format="x"), "this is no evaluation"),
        (lambda content: content.update(format_version=2), "format_version is 2"),
        (lambda content: content["images"].pop(), "6 images|5 images"),
        (lambda content: content["images"][0].update(lr="other"), "do not have the hash"),
        (lambda content: content["metrics"][0]["protocol"].update(border=4), "was saved with it"),
        (lambda content: content["metrics"][0].pop("protocol"), "damaged"),
        (lambda content: content["metrics"][0]["models"].pop("after"), "damaged"),
        (lambda content: content["metrics"][0].update(better="more"), "unknown kind"),
    ],
)
def test_an_edited_result_is_refused_by_name(change, message: str, tmp_path: Path) -> None:
    content = evaluation("before", "after").as_dict()
    change(content)
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_evaluation(path)
    assert str(path) in str(caught.value)


def test_no_file_and_no_json_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_evaluation(tmp_path / "none.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_evaluation(tmp_path / "a.json")


def test_results_on_the_same_images_are_joined_and_the_first_baseline_stays() -> None:
    first, second = evaluation("before", "after"), evaluation("before", "other", shift=2.0)
    joined = join_evaluations({"a.json": first, "b.json": second})
    assert joined.labels == ["before", "after", "other"] and joined.baseline == "before"
    (psnr,) = joined.figures
    assert psnr.values["other"] == second.figures[0].values["other"]
    assert joined.difference(psnr, "other").mean == pytest.approx(2.0, abs=0.2)


def test_models_that_are_called_alike_but_made_other_images_stay_apart() -> None:
    joined = join_evaluations(
        {"a.json": evaluation("before", "after"), "b.json": evaluation("before", "after", seed=1)}
    )
    assert joined.labels == ["before", "after", "before (b.json)", "after (b.json)"]


def test_other_protocols_are_refused_by_name_and_field() -> None:
    first, second = evaluation("before", "after"), evaluation("before", "other", protocol=replace(PSNR, border=4))
    with pytest.raises(DataError, match=r"psnr_y \[\w+ and \w+\]: border: 0 and 4") as caught:
        join_evaluations({"a.json": first, "b.json": second})
    assert "a.json and b.json" in str(caught.value)


def test_other_images_are_refused_by_name() -> None:
    first, second = evaluation("before", "after"), evaluation("before", "other")
    images = list(second.images)
    images[1] = replace(images[1], lr="noisier")
    images[2] = replace(images[2], hr="sharper")
    images[4] = replace(images[4], hr="")
    images[3] = replace(images[3], sample_id="stranger")
    with pytest.raises(DataError) as caught:
        join_evaluations({"a.json": first, "b.json": replace(second, images=images)})
    text = str(caught.value)
    for part in (
        "photo1: other LR pixels",
        "photo2: other HR pixels",
        "photo3: only",
        "photo4: an HR image in only one",
        "stranger: only",
    ):
        assert part in text
    with pytest.raises(DataError, match="another order"):
        join_evaluations({"a.json": first, "b.json": replace(second, images=list(reversed(second.images)))})


def test_metrics_that_only_one_has_are_left_out_and_told() -> None:
    first, second = evaluation("before", "after"), evaluation("before", "other")
    more = figure("lpips", {label: [0.1] * COUNT for label in first.labels}, LPIPS, "lower")
    joined = join_evaluations({"a.json": replace(first, figures=[*first.figures, more]), "b.json": second})
    assert [found.name for found in joined.figures] == ["psnr_y"]
    assert joined.left_out == ["lpips: only in a.json"]
    with pytest.raises(DataError, match="no metric is in both"):
        join_evaluations({"a.json": replace(first, figures=[more]), "b.json": second})
