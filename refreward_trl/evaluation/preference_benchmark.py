"""Judges and baselines on the labelled pairs of a preference dataset: one model at a time, baselines together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from refreward_trl.evaluation.calibration import BINS, FOLDS
from refreward_trl.evaluation.preference_answers import Progress, ask, from_margins
from refreward_trl.evaluation.preference_baselines import (
    IDENTITY,
    METHOD_IDENTITY,
    Baselines,
    identity_margins,
    identity_problem,
)
from refreward_trl.evaluation.preference_pairs import PairTable, dataset_digest
from refreward_trl.evaluation.preference_results import PreferenceEvaluation, ScorerResult, summarise
from refreward_trl.evaluation.preference_scorers import Scorer

FORMAT, FORMAT_VERSION = "refreward eval-rm", 1
RESAMPLES = 2000

DEFINITIONS = {
    "accuracy": "share of the pairs with an order that a scorer puts in that order; a margin of 0 counts one half; "
    "labelled ties and pairs without an answer play no role; each pair counts once, whatever its weight",
    "accuracy_with_ties": "acc_eq (Deutsch, Foster and Freitag 2023): share of all answered pairs, where a scorer "
    "says 'tie' if |margin| is at most a threshold that is chosen on the photos of the other folds",
    "auc": "chance that the margin of a pair in its right order is above that of a pair in its wrong order",
    "ece": f"expected calibration error of sigmoid(|margin| / temperature) in {BINS} bins between 0.5 and 1; the "
    "temperature is fitted on the photos of the other folds",
    "kendall_tau_b": "over the labelled pairs of a group, ties included; mean over groups",
    "spearman_rho": "of scores and wins in groups of which all pairs are labelled; mean over groups",
    "swap_consistency": "share of pairs with the same answer in both orders of the candidates; 1 by definition for a "
    "scorer that sees one candidate at a time",
    "lr_ablation": "the scorer beside the LR image of another photo (shuffled) and one of the mean colour (blanked); "
    "drop: own accuracy minus that, on the same pairs",
    "generator_identity": "log odds of the two generators' wins against each other in all other photos",
    "intervals": f"95 %, bootstrap of {RESAMPLES} resamples of whole photos",
}
"""How each figure is taken: part of every result."""


def evaluate_preferences(
    table: PairTable,
    models: Sequence[Callable[[], Scorer]],
    baselines: Baselines,
    *,
    seed: int = 0,
    facts: Mapping[str, str] | None = None,
    progress: Progress = lambda records, _: records,
) -> PreferenceEvaluation:
    """Measures models and baselines on the same pairs.

    Args:
        table: The pairs.
        models: Each opens a model; it is dropped before the next one is opened.
        baselines: What `open_baselines` made; the generators' identity is added.
        seed: Of wrong LR images, folds and intervals.
        facts: What else is to be said of the evaluation.
        progress: Wraps the groups, once for each model and once for all baselines.

    Raises:
        DataError: An image cannot be read.
        RewardError: A model raised, or answered with something that is no number.
        RefRewardError: Whatever opening a model raises.
    """
    found = [_measured(open_model, table, seed, progress) for open_model in models]
    answers = ask(baselines.scorers, table, label="baselines", seed=seed, progress=progress)
    known = [
        summarise(
            scorer.name, "baseline", answers[scorer.name], table, sees=scorer.sees, facts=scorer.facts, seed=seed
        )
        for scorer in baselines.scorers
    ]
    return PreferenceEvaluation(
        table=table,
        models=found,
        baselines=[*_identities(table, seed), *known],
        not_computed=baselines.not_made,
        facts=dict(facts or {}),
        dataset=dataset_digest(table),
        seed=seed,
    )


def _measured(open_model: Callable[[], Scorer], table: PairTable, seed: int, progress: Progress) -> ScorerResult:
    model = open_model()
    answers = ask([model], table, label=model.name, seed=seed, progress=progress)[model.name]
    return summarise(model.name, "model", answers, table, facts=model.facts, seed=seed)


def _identities(table: PairTable, seed: int) -> list[ScorerResult]:
    """The generators' identity, and where artefacts are named what both together tell."""
    has_kinds = any(pair.kind for pair in table.pairs)
    found = []
    for name, methods in ((IDENTITY, False), (METHOD_IDENTITY, True))[: 2 if has_kinds else 1]:
        margins = identity_margins(table, methods=methods)
        what = "generators and artefacts" if methods else "generators"
        facts = {"formula": f"wins of the two {what} against each other in all other photos; sees no image"}
        result = summarise(name, "baseline", from_margins(margins), table, sees="no image", facts=facts, seed=seed)
        found.append(replace(result, problem=identity_problem(table, margins, methods=methods)))
    return found


def as_dict(evaluation: PreferenceEvaluation) -> dict[str, Any]:
    """Returns the whole evaluation with its protocol and hashes, for `summary.json`."""
    table, seed = evaluation.table, evaluation.seed
    protocol = {"aspect": table.aspect, **table.counts(), "seed": seed, "folds": FOLDS, "resamples": RESAMPLES}
    hashes = {"dataset": evaluation.dataset, "models": {model.name: _hashes(model) for model in evaluation.models}}
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "protocol": {**protocol, **evaluation.facts, "definitions": DEFINITIONS},
        "hashes": hashes,
        "models": {model.name: model.as_dict() for model in evaluation.models},
        "baselines": {baseline.name: baseline.as_dict() for baseline in evaluation.baselines},
        "not_computed": dict(evaluation.not_computed),
        "differences": {
            model.name: {
                other.name: evaluation.difference(model, other).as_dict() for other in evaluation.compared_with(model)
            }
            for model in evaluation.models
        },
        "worst_errors": {
            model.name: [_error(evaluation, model, row) for row in evaluation.worst_errors(model)]
            for model in evaluation.models
        },
    }


def _error(evaluation: PreferenceEvaluation, model: ScorerResult, row: int) -> dict[str, Any]:
    labelled = evaluation.table.pairs[row]
    better, worse = model.answers.scores[row].tolist()
    return {
        "sample_id": labelled.sample_id,
        "better": labelled.pair.better,
        "worse": labelled.pair.worse,
        "margin": float(model.answers.margins[row]),
        "scores": None if model.compares else [better, worse],
        "generators": list(labelled.generators),
        "kind": labelled.kind,
    }


def _hashes(model: ScorerResult) -> dict[str, str]:
    return {name: model.facts[name] for name in ("spec_hash", "weights_digest", "code") if name in model.facts}
