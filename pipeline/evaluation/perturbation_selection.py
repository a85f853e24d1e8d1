"""Selection of the coefficients of the perturbed loss from validation rows, without training anything."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.bootstrap import Interval, bootstrap_means
from pipeline.evaluation.perturbation_candidates import draw_candidates, score_rows
from pipeline.evaluation.perturbation_fit import Fit, Rows, fit_perturbation
from pipeline.evaluation.proxy_teacher import log_probabilities
from pipeline.evaluation.reliability import reliability_curve
from pipeline.evaluation.selection import (
    CandidateScore,
    GroupGain,
    PredictorScore,
    Selection,
    SelectionParams,
    StrengthScore,
)
from pipeline.losses.perturbation import Perturbation

MIN_ROWS = 100
_ERROR = 0.05  # of an interval, or of all groups' intervals together


def select_perturbation(teacher_logits: np.ndarray, labels: np.ndarray, params: SelectionParams) -> Selection:
    """Finds the coefficients whose proxy teacher is nearest to the truth, as far as one label a row tells.

    Groups are treated separately, each on its own rows; coefficients of classes start from the shared ones.

    Coefficients are kept only where they *beat zero*: the rows are split in two halves, each chooses for the
    other as if it were all there is (temperature, candidates and descent), and the 95 % bootstrap interval of what
    the other half gains over zero must lie above 0. On the rows that chose it the best of many candidates always
    looks good, and most so where it fits noise; on rows that had no part in the choice chance alone passes in one
    case of forty, and groups share that error (Bonferroni). The pull of scope ``class`` is the exception: it is the
    best of a few by the cross-fitted score itself.

    Args:
        teacher_logits: (N, C) of the validation rows, free of temperature; 500 rows or more are advisable.
        labels: (N,) class numbers.
        params: how.

    Returns:
        The same for the same arguments.

    Raises:
        DataError: too few rows, or labels that are no class numbers.
        ModelError: logits that give no probabilities.
        ConfigError: ``class_groups`` for another number of classes.

    Source: in the style of arXiv 2305.05010, eq. 11, which keeps that of several candidates whose proxy teacher is at
    the least mean distance to the one-hot labels. Ours are the squared norm, the Sobol points, the groups, the descent
    and the test against zero.
    """
    labels = np.asarray(labels)
    logits = log_probabilities(teacher_logits)
    _check(logits, labels, params)
    template = _group_rows(logits, params)
    rows = Rows(logits, labels, template.groups_of(torch.from_numpy(logits)).numpy())
    is_free = np.bincount(labels, minlength=logits.shape[1]) >= params.min_rows
    if params.scope == "class" and not is_free.any():
        raise DataError(
            f"no class has the {params.min_rows} validation rows that coefficients of its own need, all together have "
            f"{len(labels)}: use scope=shared, or give more rows."
        )
    candidates = draw_candidates(params.order, params.num_candidates, upper=params.upper, seed=params.seed)

    def fit(selected: Rows, num_screening_rows: int) -> Fit:
        return fit_perturbation(
            selected,
            candidates,
            params,
            num_groups=len(template.coefficients),
            num_screening_rows=num_screening_rows,
            is_free=is_free if params.scope == "class" else None,
        )

    halves = split_halves(labels, params.seed)
    whole = fit(rows, params.num_screening_rows)
    crossed = _CrossFit(rows, halves, [fit(rows[halves != half], params.num_screening_rows // 2) for half in (0, 1)])
    return _judge(rows, whole, crossed, template, params, num_free=int(is_free.sum()))


def check_size(num_rows: int, num_classes: int, params: SelectionParams) -> None:
    """Refuses what coefficients cannot be selected from.

    Args:
        num_rows: of validation.

    Raises:
        DataError: too few rows.
        ConfigError: ``class_groups`` for another number of classes.
    """
    if num_rows < MIN_ROWS:
        raise DataError(
            f"{num_rows} validation rows are too few to select coefficients from: at least {MIN_ROWS} are needed, and "
            "500 are advisable."
        )
    if params.class_groups and len(params.class_groups) != num_classes:
        raise ConfigError(
            f"class_groups has {len(params.class_groups)} numbers but the teacher has {num_classes} classes: give the "
            "super-class of each class."
        )


def split_halves(labels: np.ndarray, seed: int) -> np.ndarray:
    """(N,) 0 or 1, at random but with half of every class in each."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    halves = np.empty(len(labels), dtype=np.int64)
    halves[order] = np.arange(len(labels)) % 2
    return halves


class _CrossFit:
    """Predictions for each half by what the other half chose; all are (N, C) log-probabilities."""

    def __init__(self, rows: Rows, halves: np.ndarray, fits: list[Fit]) -> None:
        self.base, self.scaled = np.empty_like(rows.logits), np.empty_like(rows.logits)
        self.proxies = {strength: np.empty_like(rows.logits) for strength in fits[0].tables}
        for half, fit in enumerate(fits):
            inside = halves == half
            part = rows[inside]
            self.base[inside], self.scaled[inside] = fit.base(part), fit.scaled(part)
            for strength, proxy in self.proxies.items():
                proxy[inside] = fit.proxy(part, strength)


def _judge(
    rows: Rows, whole: Fit, crossed: _CrossFit, template: Perturbation, params: SelectionParams, *, num_free: int
) -> Selection:
    """Keeps what beats zero, and compares it with the teacher and the temperature-scaled teacher."""
    zero = score_rows(crossed.base, rows.labels, params.score)
    gains = {
        strength: zero - score_rows(proxy, rows.labels, params.score) for strength, proxy in crossed.proxies.items()
    }
    strength = max(gains, key=lambda key: gains[key].mean())
    groups = _judge_groups(gains[strength], rows.groups, whole.tables[strength], len(template.coefficients), params)
    kept = np.array([group.is_kept for group in groups])
    perturbation = _keep(whole.tables[strength], kept, template, is_of_classes=strength is not None)
    is_perturbed = kept[rows.groups][:, None]
    fitted = [rows.logits, whole.scaled(rows), np.where(is_perturbed, whole.proxy(rows, strength), whole.base(rows))]
    cross_fitted = [rows.logits, crossed.scaled, np.where(is_perturbed, crossed.proxies[strength], crossed.base)]
    num_kept = (int(kept.sum()) if strength is None else num_free) * params.order * bool(kept.any())
    scores, gain_over_scaling = _compare(rows, fitted, cross_fitted, (0, 1, num_kept + params.fit_temperature), params)
    return Selection(
        params=params,
        perturbation=perturbation.model_copy(update={"teacher_temperature": whole.temperature}),
        beats_zero=bool(kept.any()),
        verdict=_verdict(groups),
        num_rows=len(rows),
        num_classes=rows.logits.shape[1],
        num_parameters=(len(groups) + num_free * (params.scope == "class")) * params.order + params.fit_temperature,
        scaling_temperature=whole.scaling_temperature,
        scores=scores,
        gain_over_scaling=gain_over_scaling,
        groups=groups,
        strengths=_compare_strengths(gains, params) if params.scope == "class" else (),
        candidates=_list_candidates(whole, params),
        reliability=tuple(
            reliability_curve(score.name, np.exp(log_q), rows.labels)
            for score, log_q in zip(scores, cross_fitted, strict=True)
        ),
    )


def _check(logits: np.ndarray, labels: np.ndarray, params: SelectionParams) -> None:
    num_rows, num_classes = logits.shape
    if labels.shape != (num_rows,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"labels of shape {labels.shape} and type {labels.dtype} for {num_rows} rows of validation logits: "
            "expected one class number a row."
        )
    check_size(num_rows, num_classes, params)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"validation labels run from {labels.min()} to {labels.max()} but the teacher has {num_classes} classes: "
            "select with the data that the teacher was trained for."
        )


def _group_rows(logits: np.ndarray, params: SelectionParams) -> Perturbation:
    """A perturbation of zeros that has the groups; no label has a part in them."""
    zero, num_classes = (0.0,) * params.order, logits.shape[1]
    if params.scope == "group" and params.group_by == "superclass":
        return Perturbation(
            kind="superclass",
            coefficients=(zero,) * (max(params.class_groups) + 1),
            num_classes=num_classes,
            class_groups=params.class_groups,
        )
    if params.scope == "group":
        confidence = np.exp(logits.max(axis=1))
        quantiles = np.quantile(confidence, np.arange(1, params.num_groups) / params.num_groups)
        # A teacher that is quite sure of many rows has the same quantile several times, or one of 1.
        edges = tuple(edge for edge in np.unique(quantiles).tolist() if edge < confidence.max())
        if edges:
            return Perturbation(
                kind="confidence", coefficients=(zero,) * (len(edges) + 1), num_classes=num_classes, edges=edges
            )
    return Perturbation.shared(zero, num_classes)


def _judge_groups(
    gains: np.ndarray, groups: np.ndarray, table: np.ndarray, num_groups: int, params: SelectionParams
) -> tuple[GroupGain, ...]:
    judged = []
    for group in range(num_groups):
        inside = gains[groups == group]
        if len(inside):
            (interval,) = bootstrap_means(
                inside[:, None],
                seed=params.seed,
                num_resamples=params.num_resamples,
                confidence=1 - _ERROR / num_groups,
            )
        else:
            interval = Interval(mean=0.0, low=0.0, high=0.0)
        is_perturbed = bool((table[group] if num_groups == len(table) else table).any())
        is_kept = interval.low > 0 and len(inside) >= params.min_rows and is_perturbed
        judged.append(GroupGain(group=group, num_rows=len(inside), gain=interval, is_kept=is_kept))
    return tuple(judged)


def _keep(table: np.ndarray, kept: np.ndarray, template: Perturbation, *, is_of_classes: bool) -> Perturbation:
    """The coefficients of the groups that are kept and zero elsewhere; shared zeros where none is."""
    values = [tuple(row) for row in table.tolist()]
    zero = (0.0,) * table.shape[1]
    if not kept.any():
        return Perturbation.shared(zero, template.num_classes)
    if is_of_classes:
        return Perturbation(kind="class", coefficients=tuple(values), num_classes=template.num_classes)
    rows = tuple(row if is_kept else zero for row, is_kept in zip(values, kept, strict=True))
    return template.model_copy(update={"coefficients": rows})


def _verdict(groups: tuple[GroupGain, ...]) -> str:
    if len(groups) == 1:
        found = f"over zero the coefficients gain {groups[0].gain.show(6)} on rows that had no part in choosing them"
        return f"Beats zero: {found}." if groups[0].is_kept else f"Zero is kept: {found}; all of it must be above 0."
    kept = [str(group.group) for group in groups if group.is_kept]
    if not kept:
        return f"Zero is kept: on rows that had no part in choosing none of {len(groups)} groups gains over zero."
    if len(kept) == len(groups):
        return f"Beats zero in all {len(groups)} groups, on rows that had no part in choosing the coefficients."
    return f"Beats zero in {len(kept)} of {len(groups)} groups ({', '.join(kept)}); the others keep zero."


def _compare(
    rows: Rows,
    fitted: list[np.ndarray],
    cross_fitted: list[np.ndarray],
    num_parameters: tuple[int, int, int],
    params: SelectionParams,
) -> tuple[tuple[PredictorScore, ...], Interval]:
    """Scores of teacher, temperature-scaled and proxy teacher, and the gain of the last over the second."""
    on_fitted, on_others = (
        np.stack([score_rows(log_q, rows.labels, params.score) for log_q in predictions], axis=1)
        for predictions in (fitted, cross_fitted)
    )
    gains = on_others[:, :1] - on_others
    columns = np.concatenate([on_fitted, on_others, gains, on_others[:, 1:2] - on_others[:, 2:]], axis=1)
    intervals = bootstrap_means(columns, seed=params.seed, num_resamples=params.num_resamples)
    return tuple(
        PredictorScore(
            name=name,
            num_parameters=number,
            score=intervals[index],
            cross_fitted_score=intervals[3 + index],
            gain=intervals[6 + index],
        )
        for index, (name, number) in enumerate(
            zip(("teacher", "temperature_scaled", "proxy"), num_parameters, strict=True)
        )
    ), intervals[9]


def _compare_strengths(gains: dict[float | None, np.ndarray], params: SelectionParams) -> tuple[StrengthScore, ...]:
    columns = np.stack(list(gains.values()), axis=1)
    intervals = bootstrap_means(columns, seed=params.seed, num_resamples=params.num_resamples)
    return tuple(StrengthScore(strength=key, gain=gain) for key, gain in zip(gains, intervals, strict=True))


def _list_candidates(fit: Fit, params: SelectionParams) -> tuple[CandidateScore, ...]:
    listed = []
    for group, ranking in enumerate(fit.rankings):
        if ranking is None:
            continue
        zero = int(np.flatnonzero(~ranking.coefficients.any(axis=1))[0])
        values = np.concatenate([ranking.row_scores, ranking.row_scores[:, [zero]] - ranking.row_scores], axis=1)
        intervals = bootstrap_means(values, seed=params.seed, num_resamples=params.num_resamples)
        size = len(ranking.coefficients)
        listed += [
            CandidateScore(group=group, coefficients=tuple(row), score=score, gain=gain)
            for row, score, gain in zip(ranking.coefficients.tolist(), intervals[:size], intervals[size:], strict=True)
        ]
    return tuple(listed)
