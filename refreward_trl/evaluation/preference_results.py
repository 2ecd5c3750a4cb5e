"""What follows from a scorer's answers: accuracy and its kin, each with an interval that resamples whole photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from typing import Any, Literal, TypeAlias

import numpy as np

from refreward_trl.data.preference_stats import UNKNOWN
from refreward_trl.evaluation.calibration import Calibration, calibrate, margin_auc, outcomes_with_ties, tie_threshold
from refreward_trl.evaluation.preference_answers import Answers, Floats
from refreward_trl.evaluation.preference_pairs import LabelledPair, PairTable
from refreward_trl.evaluation.preference_scorers import Sees
from refreward_trl.evaluation.statistics import Estimate, estimate, pairwise_outcomes, spearman_rho, tau_b

Role: TypeAlias = Literal["model", "baseline"]

SLICES = ("kind", "degradation", "generators", "source")
"""What accuracy is sliced by: artefact, degradation, pair of generators, and who labelled."""
NOTHING_KNOWN = Estimate(nan, nan, nan)


@dataclass(frozen=True)
class Ablation:
    """A scorer beside another LR image: its accuracy there, and how much lower that is on the same pairs."""

    accuracy: Estimate
    drop: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Returns both with their intervals."""
        return {"accuracy": self.accuracy.as_dict(), "drop": self.drop.as_dict()}


@dataclass(frozen=True)
class GroupMean:
    """A mean over the groups in which something is defined, and their number."""

    value: Estimate
    groups: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the mean with its interval, and the number."""
        return {**self.value.as_dict(), "groups": self.groups}


@dataclass(frozen=True)
class Slice:
    """Accuracy on some of the pairs, and how many of them were answered."""

    accuracy: Estimate
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        """Returns the accuracy with its interval, and the number."""
        return {**self.accuracy.as_dict(), "pairs": self.pairs}


@dataclass(frozen=True)
class ScorerResult:
    """One scorer on all pairs.

    Attributes:
        name: What it is called.
        role: A model that is evaluated, or a baseline.
        sees: Which images it looks at.
        facts: What it is, see `Scorer.facts`.
        answers: What it said.
        outcomes: `(N,)` 1, 0.5 for a margin of 0, or 0; NaN for labelled ties and where it said nothing.
        accuracy: Mean outcome: pairs that are labelled ties play no role.
        with_ties: acc_eq of a scorer that may say "tie" (see `outcomes_with_ties`); None without labelled ties.
        tie_threshold: The threshold for ties that is best on all pairs, for use elsewhere.
        auc: See `margin_auc`.
        calibration: See `calibrate`.
        kendall: tau-b inside groups.
        spearman: Rank correlation inside groups of which all pairs are labelled.
        swap: Share of pairs whose answer does not depend on the order of the candidates.
        ablations: "shuffled" and "blanked" -> what that does; empty for a scorer that does not look at the LR image.
        slices: See `SLICES`: by what -> value -> accuracy.
        problem: Why nothing, or not everything, could be computed.
    """

    name: str
    role: Role
    sees: Sees
    facts: Mapping[str, str]
    answers: Answers
    outcomes: Floats
    accuracy: Estimate
    with_ties: Estimate | None
    tie_threshold: float
    auc: float
    calibration: Calibration
    kendall: GroupMean
    spearman: GroupMean
    swap: Estimate
    ablations: Mapping[str, Ablation]
    slices: Mapping[str, Mapping[str, Slice]]
    problem: str = ""

    @property
    def is_known(self) -> bool:
        """Whether there is an accuracy at all."""
        return isfinite(self.accuracy.mean)

    @property
    def compares(self) -> bool:
        """Whether it is shown two candidates at once, so that their order could matter."""
        return self.answers.agrees is not None

    def as_dict(self) -> dict[str, Any]:
        """Returns all figures, for a JSON file."""
        swap = {**self.swap.as_dict(), "by_definition": not self.compares}
        return {
            "sees": self.sees,
            **({"problem": self.problem} if self.problem else {}),
            "accuracy": self.accuracy.as_dict(),
            "accuracy_with_ties": None if self.with_ties is None else self.with_ties.as_dict(),
            "tie_threshold": None if self.with_ties is None else self.tie_threshold,
            "scored_pairs": int((~np.isnan(self.outcomes)).sum()),
            "missing_pairs": self.answers.missing,
            "auc": self.auc,
            "ece": self.calibration.ece,
            "temperature": self.calibration.temperature,
            "reliability": [asdict(part) for part in self.calibration.bins],
            "kendall_tau_b": self.kendall.as_dict(),
            "spearman_rho": self.spearman.as_dict(),
            "swap_consistency": swap,
            "lr_ablation": {name: ablation.as_dict() for name, ablation in self.ablations.items()},
            "slices": {
                by: {value: part.as_dict() for value, part in parts.items()} for by, parts in self.slices.items()
            },
            "facts": dict(self.facts),
        }


@dataclass(frozen=True)
class PreferenceEvaluation:
    """All scorers on the same pairs.

    Attributes:
        table: The pairs.
        models: What is evaluated.
        baselines: What it has to beat; the generators' identity comes first, always.
        not_computed: Baselines that could not be made, and why.
        facts: Data, split, versions, and what else is to be said.
        dataset: See `dataset_digest`.
        seed: Of wrong LR images, folds and intervals.
    """

    table: PairTable
    models: Sequence[ScorerResult]
    baselines: Sequence[ScorerResult]
    not_computed: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    dataset: str = ""
    seed: int = 0

    @property
    def identities(self) -> list[ScorerResult]:
        """The baselines that know who made the images and see none: by generator, and by artefact if any is named."""
        return [result for result in self.baselines if result.sees == "no image"]

    @property
    def best_baseline(self) -> ScorerResult | None:
        """The baseline of the highest accuracy among those that see no more than a judge: no HR image, no labels."""
        known = [result for result in self.baselines if result.is_known and result.sees in ("SR", "SR and LR")]
        return max(known, key=lambda result: result.accuracy.mean, default=None)

    def worst_errors(self, model: ScorerResult, most: int = 20) -> list[int]:
        """Returns rows of the pairs that a model is most certain of and wrong about, the worst first; of each group
        first one, further ones only where there are not enough groups."""
        wrong = np.flatnonzero(model.outcomes < 0.5)
        ordered = [int(row) for row in wrong[np.argsort(model.answers.margins[wrong], kind="stable")]]
        firsts: dict[str, int] = {}
        for row in ordered:
            firsts.setdefault(self.table.pairs[row].sample_id, row)
        chosen = set(firsts.values())
        return [*firsts.values(), *(row for row in ordered if row not in chosen)][:most]

    def compared_with(self, model: ScorerResult) -> list[ScorerResult]:
        """What a model is compared with: the known baselines, and the models that were named before it."""
        earlier = self.models[: [each.name for each in self.models].index(model.name)]
        return [other for other in (*self.baselines, *earlier) if other.is_known]

    def difference(self, model: ScorerResult, other: ScorerResult) -> Estimate:
        """Accuracy of a model minus that of another scorer, over the pairs that both answered."""
        return estimate(model.outcomes - other.outcomes, self.table.photos, seed=self.seed)


def summarise(
    name: str,
    role: Role,
    answers: Answers,
    table: PairTable,
    *,
    sees: Sees = "SR and LR",
    facts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> ScorerResult:
    """Computes everything that follows from answers.

    Args:
        name: What the scorer is called.
        role: What it is here.
        answers: What it said about the pairs of `table`.
        table: The pairs.
        sees: Which images it looks at.
        facts: What it is.
        seed: Of folds and intervals.
    """
    outcomes = _outcomes(answers.margins, table)
    ordered = ~table.ties
    photos = [photo for photo, keep in zip(table.photos, ordered, strict=True) if keep]
    tied = outcomes_with_ties(answers.margins, table.ties, table.photos, seed=seed) if table.ties.any() else None
    agrees = np.where(np.isnan(answers.margins), nan, 1.0) if answers.agrees is None else answers.agrees
    return ScorerResult(
        name=name,
        role=role,
        sees=sees,
        facts=facts or {},
        answers=answers,
        outcomes=outcomes,
        accuracy=estimate(outcomes, table.photos, seed=seed),
        with_ties=None if tied is None else estimate(tied, table.photos, seed=seed),
        tie_threshold=tie_threshold(answers.margins, table.ties),
        auc=margin_auc(answers.margins[ordered]),
        calibration=calibrate(answers.margins[ordered], photos, seed=seed),
        kendall=_by_group(table, [_kendall(answers, table, rows) for rows in table.groups.values()], seed),
        spearman=_by_group(table, [_spearman(answers, table, rows) for rows in table.groups.values()], seed),
        swap=estimate(agrees, table.photos, seed=seed),
        ablations=_ablations(answers, outcomes, table, seed),
        slices=slices(outcomes, table, seed=seed),
        problem=answers.problem if answers.missing else "",
    )


def slices(outcomes: Floats, table: PairTable, *, seed: int = 0) -> dict[str, dict[str, Slice]]:
    """Returns accuracy by each of `SLICES`; a value that no answered pair has is left out."""
    found: dict[str, dict[str, Slice]] = {}
    for by in SLICES:
        values = np.array([_value(pair, by) for pair in table.pairs])
        found[by] = {}
        for value in sorted(set(values[~np.isnan(outcomes)])):
            rows = np.flatnonzero(values == value)
            photos = [table.photos[row] for row in rows]
            answered = int((~np.isnan(outcomes[rows])).sum())
            found[by][str(value)] = Slice(estimate(outcomes[rows], photos, seed=seed), answered)
    return found


def _value(pair: LabelledPair, by: str) -> str:
    value = pair.generator_pair if by == "generators" else getattr(pair, by)
    return value or UNKNOWN


def _outcomes(margins: Floats, table: PairTable) -> Floats:
    return np.where(table.ties, nan, pairwise_outcomes(margins, np.zeros_like(margins)))


def _ablations(answers: Answers, outcomes: Floats, table: PairTable, seed: int) -> dict[str, Ablation]:
    found = {}
    for name, margins in (("shuffled", answers.shuffled), ("blanked", answers.blanked)):
        if margins is not None:
            ablated = _outcomes(margins, table)
            drop = estimate(outcomes - ablated, table.photos, seed=seed)
            found[name] = Ablation(estimate(ablated, table.photos, seed=seed), drop)
    return found


def _by_group(table: PairTable, values: Sequence[float], seed: int) -> GroupMean:
    photos = [record.photo for record in table.records]
    return GroupMean(estimate(values, photos, seed=seed), int(np.isfinite(values).sum()))


def _kendall(answers: Answers, table: PairTable, rows: slice) -> float:
    """tau-b over the labelled pairs of a group; NaN where either side ties all of them."""
    margins = answers.margins[rows]
    answered = ~np.isnan(margins)
    label = np.where(table.ties[rows], 0.0, 1.0)
    return tau_b(label[answered], margins[answered])


def _spearman(answers: Answers, table: PairTable, rows: slice) -> float:
    """Rank correlation of scores with wins in a group; NaN unless all pairs of its candidates are labelled, answered.

    A scorer without scores for single candidates is ranked by its mean chance of winning, `sigmoid(margin)`.
    """
    pairs = [labelled.pair for labelled in table.pairs[rows]]
    members = sorted({index for pair in pairs for index in (pair.better, pair.worse)})
    if len(pairs) < len(members) * (len(members) - 1) // 2 or np.isnan(answers.margins[rows]).any():
        return nan
    wins, chances, scores = dict.fromkeys(members, 0.0), dict.fromkeys(members, 0.0), {}
    for pair, margin, (better, worse) in zip(pairs, answers.margins[rows], answers.scores[rows], strict=True):
        wins[pair.better] += 0.5 if pair.tie else 1.0
        wins[pair.worse] += 0.5 if pair.tie else 0.0
        chance = float(np.exp(-np.logaddexp(0.0, -margin)))
        chances[pair.better] += chance
        chances[pair.worse] += 1 - chance
        scores |= {pair.better: float(better), pair.worse: float(worse)}
    ranked = chances if any(np.isnan(value) for value in scores.values()) else scores
    return spearman_rho([wins[index] for index in members], [ranked[index] for index in members])
