"""The page's words must follow the figures: no claim where an interval holds zero, and bad news is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from refreward_trl.evaluation.alignment_benchmark import AlignmentResult
from refreward_trl.evaluation.charts import DotPlot, LineChart
from refreward_trl.evaluation.demo_report import Alignment, Evidence, Run, demo_report
from refreward_trl.evaluation.report import Gallery, Report, Table, render_report
from refreward_trl.evaluation.reward_benchmark import BASELINES, ColumnResult, JudgeReport
from refreward_trl.evaluation.sr_benchmark import GeneratorReport, Row
from refreward_trl.evaluation.statistics import estimate

PHOTOS = [f"photo{index}" for index in range(8)]


def rows(reward: float, heldout: float, lr_psnr: float, *, scatter: float = 0.01) -> list[Row]:
    noise = np.random.default_rng(abs(round(1000 * reward)) + 7).normal(scale=scatter, size=len(PHOTOS))
    return [
        {
            "sample_id": photo,
            "reward/refreward": 2.0 + index + reward + noise[index],
            "reward/heldout_judge": 0.5 + heldout + noise[index],
            "lr_psnr": 35.0 + lr_psnr + noise[index],
            "hr_psnr": 24.0 + lr_psnr + noise[index],
            "ssim": 0.7,
            "gradient_energy": 0.002,
        }
        for index, photo in enumerate(PHOTOS)
    ]


def images(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {photo: torch.rand((3, 16, 24), generator=random) for photo in PHOTOS}


def history(reward: float, heldout: float) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "rewards/refreward/mean": reward * step,
            "eval_rewards/refreward": reward * step,
            "eval_heldout/heldout_judge": heldout * step,
            "eval_lr_psnr": 35.0,
            "eval_hr_psnr": 24.0,
        }
        for step in (0, 10, 20)
    ]


def column(name: str, accuracy: float) -> ColumnResult:
    outcomes = np.array([1.0] * round(accuracy * 40) + [0.0] * (40 - round(accuracy * 40)))
    photos = tuple(PHOTOS[index % 8] for index in range(40))
    return ColumnResult(name, estimate(outcomes, photos), outcomes, photos, ("noise",) * 40)


def evidence(
    *, gain: float, heldout: float, hacked: tuple[float, float, float], projected: float = 0.85, lr_psnr: float = -0.1
) -> Evidence:
    names = ("artefact", "severity", "unseen_artefact", "projected_artefact")
    own = {name: column(name, projected if "projected" in name else 0.95) for name in names}
    baselines = {baseline: {name: column(name, 0.7) for name in names} for baseline in BASELINES}
    start = rows(0, 0, 0)
    before = Run("generator", start, images(0))
    run = Run("ReFL", rows(gain, heldout, lr_psnr), images(1), history(0.1, 0.01), "refreward refl")
    control = Run("ReFL, control", rows(0.001, 0, 0), images(2), history(0.0, 0.0))
    result = AlignmentResult("ReFL", "refreward", "heldout_judge", 20, 160, 9.0, before.rows, run.rows, control.rows)
    lr_images = {photo: image[:, ::4, ::4] for photo, image in images(3).items()}
    photos = [{"sample_id": photo, "lr_image": lr_images[photo], "hr_image": images(4)[photo]} for photo in PHOTOS]
    bicubic = rows(-1, 0, -0.5)
    return Evidence(
        photos=photos,
        judge=JudgeReport(own, {"artefact": column("artefact", 0.5)}, baselines),
        generator=GeneratorReport(1.0, start, bicubic, bicubic, bicubic, None),
        before=before,
        alignments=[Alignment(result, run, control, "the reward's weight at 0")],
        hacking=Run("ReFL, no anchor", rows(*hacked), images(5), history(0.2, -0.1)),
        facts=[("seed", "0")],
    )


def words(report: Report, anchor: str) -> str:
    section = next(section for section in report.sections if section.anchor == anchor)
    return " ".join(section.paragraphs)


def test_a_clear_gain_is_claimed_with_its_interval() -> None:
    report = demo_report(evidence(gain=0.4, heldout=0.1, hacked=(1, 0, 0)))
    assert "raised the reward more than its control did" in report.lead
    assert report.headlines[0].value.startswith("+0.4")
    assert report.headlines[0].tone == "good"
    assert "95 % CI" in report.headlines[0].detail


@pytest.mark.parametrize("gain", [0.0, 0.001])
def test_no_gain_is_not_dressed_up(gain: float) -> None:
    report = demo_report(evidence(gain=gain, heldout=0.0, hacked=(1, 0, 0)))
    assert "did not move the reward beyond" in report.lead
    assert report.headlines[0].tone == "muted"


def test_a_loss_is_told() -> None:
    report = demo_report(evidence(gain=-0.4, heldout=-0.2, hacked=(1, 0, 0)))
    assert "raised the reward less than its control did" in report.lead
    assert [headline.tone for headline in report.headlines[:2]] == ["bad", "bad"]


def test_hacking_is_only_called_so_when_a_guard_fell() -> None:
    hacked = demo_report(evidence(gain=0.4, heldout=0.1, hacked=(2.0, -0.5, -1.0)))
    assert "learnt to please the judge" in words(hacked, "hacking")
    assert "held-out judge and LR-PSNR and HR-PSNR fell" in words(hacked, "hacking")
    innocent = demo_report(evidence(gain=0.4, heldout=0.1, hacked=(2.0, 0.5, 0.5)))
    assert "shows no hacking" in words(innocent, "hacking")


def test_fidelity_that_was_sold_is_told() -> None:
    fair = demo_report(evidence(gain=0.4, heldout=0.1, hacked=(1, 0, 0)))
    sold = demo_report(evidence(gain=0.4, heldout=0.1, hacked=(1, 0, 0), lr_psnr=-2.0))
    assert "bought with fidelity" not in words(fair, "alignment")
    assert "LR-PSNR and HR-PSNR fell too far: this gain was bought with fidelity" in words(sold, "alignment")
    tones = [next(h.tone for h in report.headlines if "fidelity" in h.label) for report in (fair, sold)]
    assert tones == ["", "bad"]


def test_a_judge_below_its_baselines_is_shown_as_such() -> None:
    good = demo_report(evidence(gain=0.4, heldout=0.1, hacked=(1, 0, 0), projected=0.85))
    bad = demo_report(evidence(gain=0.4, heldout=0.1, hacked=(1, 0, 0), projected=0.6))
    tones = [next(h.tone for h in report.headlines if "back-projected" in h.label) for report in (good, bad)]
    assert tones == ["", "bad"]


def test_caveats_come_first_and_say_what_the_preferences_are() -> None:
    report = demo_report(evidence(gain=0.4, heldout=0.1, hacked=(1, 0, 0)))
    text = " ".join(report.caveats)
    assert "constructed" in text and "Nobody was asked" in text and "small default weights" in text


def test_every_section_has_its_figures_and_the_page_renders() -> None:
    shown = evidence(gain=0.4, heldout=0.1, hacked=(1, -1, 0))
    report = demo_report(shown)
    kinds = {section.anchor: [type(block) for block in section.blocks] for section in report.sections}
    assert kinds == {
        "pictures": [Gallery],
        "alignment": [DotPlot, Table, LineChart, LineChart],
        "hacking": [Gallery, LineChart, LineChart],
        "generator": [Table],
        "judge": [DotPlot, Table],
    }
    guards = next(block for block in report.sections[1].blocks if isinstance(block, LineChart) and block.zero)
    assert all(line.y[0] == 0.0 for line in guards.lines)
    judge, other = guards.lines[:2]
    assert (judge.label, other.label) == ("judge, sd", "held-out judge, sd")
    for line, name, change in ((judge, "refreward", 2.0), (other, "heldout_judge", 0.2)):
        spread = np.std([row[f"reward/{name}"] for row in shown.before.rows], ddof=1)
        assert line.y[-1] == pytest.approx(change / spread)
    assert "ReFL, no anchor" in render_report(report)
