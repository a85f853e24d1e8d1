"""Pictures of a search that can be moved about in: one page of HTML that needs no network."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import optuna
from optuna import visualization

if TYPE_CHECKING:
    from optuna.study import Study

_HEIGHT = 460
_CHARTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("Optimisation history", "The value of every trial, and the best so far.", visualization.plot_optimization_history),
    (
        "Parallel coordinates",
        "A line a trial; drag along an axis to pick some.",
        visualization.plot_parallel_coordinate,
    ),
    ("Slices", "The value over each hyper-parameter by itself.", visualization.plot_slice),
    ("Curves", "The value after each epoch; trials stopped early end early.", visualization.plot_intermediate_values),
)


def importances(study: Study) -> dict[str, float]:
    """Share of each hyper-parameter in what differs between trials, the largest first; empty with too few trials.

    By fANOVA, over the hyper-parameters that every finished trial has.
    """
    values = {trial.value for trial in _finished(study)}
    if len(_finished(study)) < 4 or len(values) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        try:
            return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
        except (RuntimeError, ValueError):  # a hyper-parameter that never varied
            return {}


def render_charts(title: str, metric: str, study: Study) -> str:
    """The page; with fewer than two finished trials it says so."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if len(_finished(study)) < 2:
        parts.append("<p>Fewer than two trials have finished: there is nothing to compare yet.</p>")
    else:
        figures = [(heading, note, _draw(chart, study, metric)) for heading, note, chart in _CHARTS]
        if shares := importances(study):
            figures.append(("Importance", "Share of each hyper-parameter, by fANOVA.", _bars(shares)))
        for index, (heading, note, figure) in enumerate(figures):
            figure.update_layout(title=None, template="plotly_white", height=_HEIGHT, margin={"t": 30})
            parts.append(f"<h2>{heading}</h2><p>{note}</p>")
            parts.append(figure.to_html(full_html=False, include_plotlyjs=index == 0))
    style = (
        "body{font-family:sans-serif;max-width:1100px;margin:1em auto}h2{margin:1.2em 0 0}p{margin:.2em 0;color:#555}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return f"<!DOCTYPE html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _finished(study: Study) -> list[Any]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _draw(chart: Callable[..., Any], study: Study, metric: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna marks some charts as experimental
        if chart is visualization.plot_intermediate_values:
            return chart(study)
        return chart(study, target_name=metric)


def _bars(shares: dict[str, float]) -> Any:
    from plotly import graph_objects

    names = list(shares)[::-1]
    return graph_objects.Figure(graph_objects.Bar(x=[shares[name] for name in names], y=names, orientation="h"))
