"""Tables of a selection of perturbation coefficients: for the terminal, and for the tracker's page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.selection import Selection
from pipeline.report.perturbation_plots import PREDICTOR_NAMES
from pipeline.report.tables import render_table

_CANDIDATES_SHOWN = 5


def render_selection(selection: Selection) -> str:
    """What was compared, what was chosen, and what speaks for it, at most 100 characters wide."""
    params = selection.params
    distance = "squared distance" if params.score == "squared" else "distance (which rewards sharpness)"
    parts = [
        render_table(
            f"mean {distance} to the label, {selection.num_rows:,} validation rows, {selection.num_classes} classes "
            "(95 % intervals)",
            ("predictor", "numbers fitted", "where fitted", "on other rows", "gain there over the teacher"),
            [
                [
                    PREDICTOR_NAMES[score.name],
                    score.num_parameters,
                    score.score.mean,
                    score.cross_fitted_score.mean,
                    "-" if score.name == "teacher" else _show_gain(score.gain),
                ]
                for score in selection.scores
            ],
        )
    ]
    if len(selection.groups) > 1:
        parts.append(
            render_table(
                "groups",
                ("group", "rows", "gain over zero, on others", "kept", "coefficients"),
                [
                    [group.group, group.num_rows, _show_gain(group.gain), group.is_kept, coefficients]
                    for group, coefficients in zip(selection.groups, _coefficients_of_groups(selection), strict=True)
                ],
            )
        )
    if selection.strengths:
        parts.append(
            render_table(
                "pull of the classes' coefficients towards the shared ones",
                ("strength", "gain over zero, on others"),
                [
                    ["complete" if row.strength is None else f"{row.strength:g}", _show_gain(row.gain)]
                    for row in selection.strengths
                ],
            )
        )
    elif len(selection.groups) == 1:
        parts.append(
            render_table(
                f"best of {params.num_candidates} candidates, on the rows that chose them",
                ("coefficients", "gain over zero"),
                [
                    [_list(candidate.coefficients), _show_gain(candidate.gain)]
                    for candidate in selection.candidates[:_CANDIDATES_SHOWN]
                ],
            )
        )
    return "\n".join([*parts, *_sentences(selection)]) + "\n"


def candidates_csv(selection: Selection) -> str:
    """All finalists: group, coefficients, score and gain with their intervals."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    powers = [f"eps_{power}" for power in range(1, selection.params.order + 1)]
    bounds = ("score", "score_low", "score_high", "gain", "gain_low", "gain_high")
    writer.writerow(("group", *powers, *bounds))
    for candidate in selection.candidates:
        intervals = (getattr(interval, name) for interval in (candidate.score, candidate.gain) for name in _BOUNDS)
        writer.writerow((candidate.group, *candidate.coefficients, *intervals))
    return file.getvalue()


_BOUNDS = ("mean", "low", "high")


def _sentences(selection: Selection) -> list[str]:
    perturbation, over_scaling = selection.perturbation, selection.gain_over_scaling
    sentences = [
        f"{selection.num_parameters} numbers were fitted on {selection.num_rows:,} rows. {selection.verdict}",
        f"Over temperature scaling ({selection.scaling_temperature:.3g}, one number) the proxy teacher gains "
        f"{_show_gain(over_scaling)} on rows that fitted neither"
        + (": scaling alone is the better." if over_scaling.high < 0 else "."),
    ]
    if perturbation.kind == "shared" and selection.beats_zero:
        sentences.append(f"Coefficients: {_list(perturbation.coefficients[0])}.")
    if perturbation.teacher_temperature != 1:
        sentences.append(f"The teacher's logits are divided by {perturbation.teacher_temperature:.4g} first.")
        if selection.scores[-1].gain.high < 0:
            sentences.append("All in all that is worse than the teacher as it is: set selection.fit_temperature=false.")
    return sentences


def _coefficients_of_groups(selection: Selection) -> Sequence[str]:
    rows = selection.perturbation.coefficients
    if len(rows) != len(selection.groups):  # shared zeros, where no group was kept
        rows = rows * len(selection.groups)
    return [_list(row) if any(row) else "zero" for row in rows]


def _list(coefficients: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in coefficients) if any(coefficients) else "zero, the teacher itself"


def _show_gain(gain: Interval) -> str:
    return f"{gain.mean:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
