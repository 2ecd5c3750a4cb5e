"""The page must keep protocols apart, draw what the figures say, and not claim what an interval does not show."""

from __future__ import annotations

from dataclasses import replace
from math import nan

import pytest

from refreward_trl.evaluation.model_report import as_text, evaluation_report, trade_offs
from refreward_trl.evaluation.model_results import Evaluation, Figure, MeasuredImage, MeasuredModel
from refreward_trl.evaluation.protocols import Protocol
from refreward_trl.evaluation.report import Table, render_report

COUNT = 8
SPREAD = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
STEP = [-0.1, 0.1, 0.0, 0.0, 0.1, -0.1, 0.0, 0.0]
PSNR_Y = Protocol("psnr", "hr_image", "Y")
PSNR_RGB = Protocol("psnr", "hr_image", "RGB")
LPIPS = Protocol("lpips", "hr_image", "RGB")
JUDGE = Protocol("refreward", "lr_image", "RGB", judge="weights 1")


def values(*shifts: float) -> dict[str, list[float]]:
    labels = ["before", "after", "hacked"]
    return {
        labels[place]: [base + shift + (noise if place else 0.0) for base, noise in zip(SPREAD, STEP, strict=True)]
        for place, shift in enumerate(shifts)
    }


def evaluation() -> Evaluation:
    figures = [
        Figure("psnr_y", PSNR_Y, "higher", "fidelity", "dB", 2, values(0.0, 0.0, -2.0)),
        Figure("psnr_rgb", PSNR_RGB, "higher", "fidelity", "dB", 2, values(0.0, 0.5, -2.0)),
        Figure("pyiqa:lpips", LPIPS, "lower", "fidelity", "", 4, values(0.0, -0.5, 1.0)),
        Figure("refreward", JUDGE, "higher", "reward", "", 3, values(0.0, 1.0, 3.0)),
        Figure("gradient_energy", replace(LPIPS, metric="energy"), "neither", "figure", "", 3, values(0.0, 1.0, 3.0)),
    ]
    return Evaluation(
        [MeasuredImage(f"photo{index}", "lr", "hr") for index in range(COUNT)],
        [MeasuredModel(label, f"runs/{label}", ("sr",) * COUNT) for label in ("before", "after", "hacked")],
        figures,
        facts={"scale": "4"},
    )


def tables(found: Evaluation) -> list[Table]:
    return [block for block in evaluation_report(found).sections[0].blocks if isinstance(block, Table)]


def test_no_table_holds_two_protocols() -> None:
    found = evaluation()
    shown = tables(found)
    assert len(shown) == len(found.figures)
    hashes = [figure.protocol.hash for figure in found.figures]
    for table, own in zip(shown, hashes, strict=True):
        assert [name for name in hashes if name in table.note] == [own]
        assert [row[0].text for row in table.cells] == ["before", "after", "hacked"]


def test_better_and_worse_follow_the_direction_and_zero_stays_unclaimed() -> None:
    tones = {table.title.split(":")[0]: [row[2].tone for row in table.cells] for table in tables(evaluation())}
    assert tones["psnr_y"] == ["muted", "muted", "bad"]
    assert tones["psnr_rgb"] == ["muted", "good", "bad"]
    assert tones["pyiqa"] == ["muted", "good", "bad"]
    assert tones["gradient_energy"] == ["muted", "muted", "muted"]


def test_win_rates_stand_where_there_is_a_better() -> None:
    for table in tables(evaluation()):
        assert len(table.header) == (3 if table.title.startswith("gradient_energy") else 4)
    lpips = tables(evaluation())[2]
    assert [row[3].text for row in lpips.cells] == ["", "100 %", "0 %"]


def test_curves_show_reward_against_each_fidelity_with_right_as_closer() -> None:
    charts = list(trade_offs(evaluation()))
    assert [chart.title for chart in charts] == [f"Reward against {n}" for n in ("psnr_y", "psnr_rgb", "pyiqa:lpips")]
    psnr, _, lpips = (chart.lines[0] for chart in charts)
    spread = evaluation().spread(evaluation().figures[3])
    assert psnr.names == ["before", "after", "hacked"]
    assert psnr.x == pytest.approx([0.0, 0.0, -2.0], abs=1e-9)
    assert psnr.y == pytest.approx([0.0, 1 / spread, 3 / spread])
    assert lpips.x == pytest.approx([0.0, 0.5, -1.0])
    assert JUDGE.hash in charts[0].note and PSNR_Y.hash in charts[0].note


def test_without_rewards_or_spread_there_are_no_curves() -> None:
    found = evaluation()
    assert list(trade_offs(replace(found, figures=found.figures[:3]))) == []
    flat = replace(found.figures[3], values={label: [1.0] * COUNT for label in found.labels})
    assert list(trade_offs(replace(found, figures=[found.figures[0], flat]))) == []


def test_what_was_not_scored_is_counted_and_leaves_no_point() -> None:
    found = evaluation()
    gaps = {**found.figures[3].values, "after": [nan, *found.figures[3].values["after"][1:]], "hacked": [nan] * COUNT}
    found = replace(found, figures=[found.figures[0], replace(found.figures[3], values=gaps)])
    rows = tables(found)[1].cells
    assert "7 of 8 images scored" in rows[1][1].detail and "0 of 8" in rows[2][1].detail
    (chart,) = trade_offs(found)
    assert len(chart.points(chart.lines[0])) == 2
    render_report(evaluation_report(found))


def test_the_page_has_its_charts_and_two_models_have_headlines() -> None:
    found = evaluation()
    page = render_report(evaluation_report(found))
    assert page.count('<figure class="chart">') == 3 and "<svg" in page
    assert page.count('class="point') == 9 and found.image_set in page
    assert evaluation_report(found).headlines == []
    pair = replace(found, models=found.models[:2])
    headlines = {item.label: item for item in evaluation_report(pair).headlines}
    assert len(headlines) == 4
    assert headlines["psnr_rgb: after minus before"].value == "+0.50 dB"
    assert headlines["psnr_rgb: after minus before"].tone == "good"
    assert headlines["psnr_y: after minus before"].tone == "muted"


def test_what_was_not_joined_is_a_caveat() -> None:
    report = evaluation_report(replace(evaluation(), left_out=["pyiqa:musiq: only in a.json"]))
    assert "Not joined: pyiqa:musiq: only in a.json." in report.caveats


def test_the_terminal_gets_every_table_and_hash() -> None:
    text = as_text(evaluation())
    assert all(figure.protocol.hash in text for figure in evaluation().figures)
    assert max(map(len, text.splitlines())) < 130
    one = replace(evaluation(), images=evaluation().images[:1])
    one = replace(one, figures=[replace(f, values={k: v[:1] for k, v in f.values.items()}) for f in one.figures])
    assert "no interval: one photo" in as_text(one)
