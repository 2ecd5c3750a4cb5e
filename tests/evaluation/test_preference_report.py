"""The page and the text: complete, self-contained, and no accuracy without the generators' identity beside it."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from preference_sets import Refusing, brightness, group, guess, scorer

from refreward_trl.data.image_sources import ImageTensor
from refreward_trl.data.preferences import Candidate
from refreward_trl.evaluation.preference_baselines import Baselines, open_baselines
from refreward_trl.evaluation.preference_benchmark import evaluate_preferences
from refreward_trl.evaluation.preference_errors import SHOWN_SIDE, WORST
from refreward_trl.evaluation.preference_pairs import pair_table
from refreward_trl.evaluation.preference_report import as_text, preference_report
from refreward_trl.evaluation.preference_results import PreferenceEvaluation
from refreward_trl.evaluation.preference_scorers import Scorer
from refreward_trl.evaluation.report import Gallery, Report, render_report

VOID = {"meta", "img", "input", "br", "link", "path"}


class Nesting(HTMLParser):
    """Raises where tags are not closed in the order in which they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, (tag, self.getpos())


def evaluate(records: list[Any], *models: Scorer, baselines: Baselines | None = None) -> PreferenceEvaluation:
    table = pair_table(records, "overall")
    given = models or (scorer(),)
    return evaluate_preferences(
        table, [lambda model=model: model for model in given], baselines or Baselines(), facts={"split": "test"}
    )


def galleries(page: Report) -> list[Gallery]:
    return [block for section in page.sections for block in section.blocks if isinstance(block, Gallery)]


def test_the_page_loads_nothing_and_is_well_formed() -> None:
    makers = ("a<b>", "b&c", "c")
    records = [group(n, generators=makers, kinds=makers, degradation="x4") for n in range(10)]
    html = render_report(
        preference_report(evaluate(records, scorer(guess), scorer(name="other"), baselines=open_baselines()))
    )
    nesting = Nesting()
    nesting.feed(html)
    assert not nesting.open
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html) and "http" not in html.partition("<body>")[2]
    assert "a<b>" not in html and "a&lt;b&gt;" in html
    for text in ("generator_identity", "method_identity", "lr_consistency", "psnr_y", "Reliability", "LR ablation"):
        assert text in html
    for word in ("artefact", "degradation", "pair of generators", "who labelled"):
        assert f"By {word}" in html


@pytest.mark.parametrize("known", [True, False])
def test_no_accuracy_without_the_generators_identity(known: bool) -> None:
    makers = ("a", "b", "c") if known else None
    evaluation = evaluate([group(n, generators=makers) for n in range(6)])
    page = preference_report(evaluation)
    expected = "100.0 %" if known else "cannot be computed: generators unknown"
    assert expected in [page.headlines[1].value, page.headlines[1].detail]
    assert any(("predicts 100.0 %" if known else "cannot be computed") in text for text in page.caveats)
    line = next(line for line in as_text(evaluation).splitlines() if "generator_identity" in line)
    assert ("100.0 %" if known else "cannot be computed: generators unknown") in line


def test_the_twenty_worst_errors_are_shown_with_their_scores() -> None:
    wrong = scorer(lambda lr, sr: -brightness(lr, sr))
    page = preference_report(evaluate([group(n, kinds=("", "blur", "blur")) for n in range(9)], wrong))
    (gallery,) = galleries(page)
    assert len(gallery.comparisons) == WORST
    assert len({comparison.name for comparison in gallery.comparisons[:9]}) == 9
    first = gallery.comparisons[0]
    assert first.remark.startswith("1: margin \N{MINUS SIGN}")
    assert first.before.mean() > first.after.mean() and first.hr_image is not None
    assert first.figures[0][0] == "score" and first.figures[1][0] == "made by"
    assert [name for _, name, _ in first.figures][1] == "(unknown)"
    assert not galleries(preference_report(evaluate([group(n) for n in range(3)])))


def test_large_images_are_cut_to_where_they_differ() -> None:
    record = group(1, (0, 1), side=640)
    better = torch.full((3, 640, 960), 100, dtype=torch.uint8)
    worse = better.clone()
    worse[:, 600:620, 900:930] = 180
    lr_image = torch.full((3, 320, 480), 100, dtype=torch.uint8)
    lr_image[:, 300:310, 450:465] = 7
    candidates = tuple(Candidate(ImageTensor(image)) for image in (better, worse))
    records = [replace(record, candidates=candidates, lr_image=ImageTensor(lr_image), hr_image=ImageTensor(better))]
    (gallery,) = galleries(preference_report(evaluate(records)))
    (shown,) = gallery.comparisons
    assert shown.before.shape[1] == shown.before.shape[2] == SHOWN_SIDE == 2 * shown.lr_image.shape[1]
    assert int((shown.after != shown.before).any(dim=0).sum()) == 20 * 30
    assert int((shown.lr_image == 7).all(dim=0).sum()) == 10 * 15
    assert shown.hr_image is not None and shown.hr_image.shape == shown.before.shape


def test_missing_answers_ties_and_baselines_that_could_not_be_made_are_told() -> None:
    evaluation = evaluate([group(n, (0, 0, 1)) for n in range(5)], Refusing("shy", [0, 1, 2]))
    evaluation = replace(evaluation, not_computed={"stlpips": "not installed"})
    page = preference_report(evaluation)
    assert any("shy gave no answer to 6 of 15 pairs (it did not want to)" in text for text in page.caveats)
    assert ("not computed: stlpips", "not installed") in page.facts
    assert "5 ties" in page.lead
    assert "shy 6" in as_text(evaluation)
    render_report(page)


def test_a_page_of_one_photo_and_of_a_scorer_without_any_answer_can_be_read() -> None:
    for records in ([group(0)], [group(n) for n in range(3)]):
        evaluation = evaluate(records, Refusing("mute", []), scorer(name="other"))
        render_report(preference_report(evaluation))
        assert "cannot be computed" in as_text(evaluation)
