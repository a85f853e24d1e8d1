"""Plots of a selection of perturbation coefficients: its candidates, and the calibration of what came out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.evaluation.selection import CandidateScore, Predictor, Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PREDICTOR_NAMES: dict[Predictor, str] = {
    "teacher": "teacher",
    "temperature_scaled": "temperature-scaled",
    "proxy": "proxy teacher",
}
# Dark enough on white, and apart for all common kinds of colour blindness.
_COLOURS: dict[Predictor, str] = {"teacher": "#555555", "temperature_scaled": "#0072b2", "proxy": "#d55e00"}
_MARKERS: dict[Predictor, str] = {"teacher": "s", "temperature_scaled": "^", "proxy": "o"}
_MAX_COLUMNS = 2


def plot_candidates(selection: Selection) -> Figure:
    """The finalists' scores beside that of zero, one panel for each group of rows.

    What is drawn is the difference to zero: intervals of the scores themselves would mostly show that some rows are
    harder than others, for all candidates alike.
    """
    from matplotlib.figure import Figure  # a second to import, which only a selection's end needs

    groups = sorted({candidate.group for candidate in selection.candidates})
    columns = min(len(groups), _MAX_COLUMNS)
    lines = -(-len(groups) // columns)
    tallest = max(sum(candidate.group == group for candidate in selection.candidates) for group in groups)
    figure = Figure(figsize=(7.5 * columns, lines * (1.5 + 0.23 * tallest)), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    for panel, group in zip(panels, groups, strict=False):
        _draw_group(panel, [candidate for candidate in selection.candidates if candidate.group == group])
        if len(groups) > 1:
            gain = selection.groups[group]
            panel.set_title(f"group {group}, {gain.num_rows:,} rows: {'kept' if gain.is_kept else 'zero is kept'}")
    distance = "squared distance" if selection.params.score == "squared" else "distance"
    figure.supxlabel(
        f"mean {distance} of the proxy teacher to the label, minus that of zero; further left is better\n"
        "bars: 95 % intervals, on the rows that the candidates were chosen on",
        fontsize="medium",
    )
    figure.suptitle(selection.verdict, fontsize="medium", wrap=True)
    return figure


def plot_reliability(selection: Selection) -> Figure:
    """Accuracy against confidence of teacher, temperature-scaled and proxy teacher, on rows that fitted neither."""
    from matplotlib.figure import Figure  # as above

    figure = Figure(figsize=(6.5, 7.5), layout="constrained")
    curves, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curves.plot([0, 1], [0, 1], color="#aaaaaa", linestyle="--", linewidth=1, label="perfectly calibrated")
    for score, curve in zip(selection.scores, selection.reliability, strict=True):
        style = {"color": _COLOURS[score.name], "marker": _MARKERS[score.name], "markersize": 5, "linewidth": 1.2}
        label = f"{PREDICTOR_NAMES[score.name]}, ECE {100 * curve.ece:.2f} %"
        curves.plot(curve.confidence, curve.accuracy, label=label, **style)
        counts.plot(curve.confidence, curve.num_rows, **style)
    curves.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), ylabel="accuracy in the bin")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    counts.set(xlabel="mean confidence in the bin (largest probability)", ylabel="rows in the bin", yscale="log")
    for panel in (curves, counts):
        panel.grid(color="#eeeeee")
    figure.suptitle(
        f"{selection.num_rows:,} validation rows, {selection.num_classes} classes, cross-fitted", fontsize="medium"
    )
    return figure


def _draw_group(panel: Axes, candidates: list[CandidateScore]) -> None:
    for place, candidate in enumerate(candidates):
        is_zero = not any(candidate.coefficients)
        colour = _COLOURS["teacher" if is_zero else "proxy"]
        panel.plot([-candidate.gain.high, -candidate.gain.low], [place, place], color=colour, linewidth=1.5)
        panel.plot(-candidate.gain.mean, place, marker="s" if is_zero else "o", color=colour, markersize=5)
    panel.axvline(0, color=_COLOURS["teacher"], linestyle="--", linewidth=1)
    panel.set_yticks(range(len(candidates)), [_describe(candidate) for candidate in candidates], fontsize="small")
    panel.invert_yaxis()
    panel.set_ylabel("coefficients, best first")
    panel.grid(axis="x", color="#eeeeee")


def _describe(candidate: CandidateScore) -> str:
    if not any(candidate.coefficients):
        return f"zero, the teacher: {candidate.score.mean:.4g}"
    return ", ".join(f"{value:.2f}" for value in candidate.coefficients)
