"""What the selection of perturbation coefficients is told, and what it finds."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.perturbation_candidates import Score
from pipeline.evaluation.reliability import ReliabilityCurve
from pipeline.evaluation.temperature_scaling import Criterion
from pipeline.losses.perturbation import MAX_GROUPS, Perturbation
from pipeline.registry import Params

Predictor = Literal["teacher", "temperature_scaled", "proxy"]


class SelectionParams(Params):
    """How the coefficients of the perturbed loss are selected from validation rows.

    The paper (arXiv 2305.05010) samples candidates and keeps the one whose proxy teacher is nearest to the labels; its
    number of candidates, their range and their distribution are not known to us. Those here are ours.
    """

    scope: Literal["shared", "group", "class"] = "shared"
    """One set of coefficients for all rows, one for each group of rows, or one for each class."""
    order: int = Field(default=5, ge=1, le=10)
    """Number of coefficients; 5 in the paper."""
    upper: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Largest coefficient; the smallest is -1/m."""
    num_candidates: int = Field(default=256, ge=2)
    """Candidates in every group, zero among them."""
    score: Score = "squared"
    """Distance to the one-hot label: ``squared`` is least at the true probabilities; ``norm``, the paper's, rewards
    being sharper than that."""
    num_screening_rows: int = Field(default=2000, ge=100)
    """Rows on which all candidates are scored, over all groups; half as many in each half of the cross-fit."""
    num_finalists: int = Field(default=16, ge=1)
    """Best candidates of the screening, scored on all rows; zero is added."""
    group_by: Literal["confidence", "superclass"] = "confidence"
    """Scope ``group``: by the teacher's confidence, in groups of equal size, or by the super-class of its answer."""
    num_groups: int = Field(default=4, ge=2, le=MAX_GROUPS)
    """By confidence: how many groups; fewer where the teacher is equally sure of many rows."""
    class_groups: tuple[int, ...] = ()
    """By super-class: the group of each class, 0, 1, ... without gaps."""
    min_rows: int = Field(default=50, ge=10)
    """A class with fewer rows keeps the shared coefficients, a group with fewer keeps zero."""
    strengths: tuple[float, ...] = (0.1, 0.01, 0.001)
    """Scope ``class``: pulls towards the shared coefficients that are tried, falling; complete pull is tried too."""
    fit_temperature: bool = False
    """Divide the teacher's logits by a fitted temperature first, and perturb what comes out."""
    temperature_criterion: Criterion = "brier"
    """What the temperature is fitted by, both this one and that which the report compares with."""
    num_resamples: int = Field(default=1000, ge=100)
    """Resamples of the bootstrap, for confidence intervals."""
    seed: int = Field(default=0, ge=0)
    """Draws the candidates, the halves of the cross-fit and the bootstrap; not the seed of the run."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        by_superclass = self.scope == "group" and self.group_by == "superclass"
        if by_superclass != bool(self.class_groups):
            raise ValueError("class_groups: expected with scope 'group' and group_by 'superclass', and only then")
        groups = set(self.class_groups)
        if groups != set(range(len(groups))) or len(groups) > MAX_GROUPS:
            raise ValueError(f"class_groups: expected at most {MAX_GROUPS} groups, numbered 0, 1, ... without gaps")
        falling = all(high > low for high, low in zip(self.strengths, self.strengths[1:], strict=False))
        if not self.strengths or not falling or self.strengths[-1] <= 0:
            raise ValueError(f"strengths: {self.strengths}, expected falling numbers above 0")
        return self


class CandidateScore(Params):
    """One finalist, or zero, in one group of rows."""

    group: int
    coefficients: tuple[float, ...]
    score: Interval
    gain: Interval
    """Score of zero minus this one's, on the rows it was chosen on: of the best one it is too good to be true."""


class GroupGain(Params):
    """What the coefficients of a group gain over zero on rows that had no part in choosing them."""

    group: int
    num_rows: int
    gain: Interval
    """Of such a confidence that all groups together err as often as one interval of 95 %."""
    is_kept: bool


class StrengthScore(Params):
    """Scope ``class``: one pull towards the shared coefficients."""

    strength: float | None
    """None: complete, the shared coefficients themselves."""
    gain: Interval
    """Over zero, cross-fitted."""


class PredictorScore(Params):
    """How near a predictor is to the labels."""

    name: Predictor
    num_parameters: int
    score: Interval
    """On the rows it was fitted on."""
    cross_fitted_score: Interval
    """On rows that had no part in fitting it."""
    gain: Interval
    """Cross-fitted score of the teacher as it is minus this one's."""


class Selection(Params):
    """The perturbation that was selected, and what speaks for it."""

    params: SelectionParams
    perturbation: Perturbation
    beats_zero: bool
    verdict: str
    """In a sentence."""
    num_rows: int
    num_classes: int
    num_parameters: int
    """Fitted numbers, those that were not kept included."""
    scaling_temperature: float
    """Of the temperature-scaled teacher that the report compares with, fitted on all rows."""
    scores: tuple[PredictorScore, ...]
    """The teacher, the temperature-scaled teacher, the proxy teacher."""
    gain_over_scaling: Interval
    """Cross-fitted score of the temperature-scaled teacher minus the proxy teacher's."""
    groups: tuple[GroupGain, ...]
    strengths: tuple[StrengthScore, ...]
    """Scope ``class`` only."""
    candidates: tuple[CandidateScore, ...]
    """Best first within each group."""
    reliability: tuple[ReliabilityCurve, ...]
    """Of the three predictors, cross-fitted."""
