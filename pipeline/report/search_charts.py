"""Pictures of a search that can be moved about in: one page of HTML that needs no network."""

from __future__ import annotations

import html
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import optuna
from optuna import visualization

if TYPE_CHECKING:
    from optuna.study import Study

_HEIGHT = 460
_MARGINS = {"t": 30, "b": 60}
_PARALLEL_MARGINS = {"t": 40, "b": 60, "l": 90, "r": 60}  # values stand beside the axes


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
    """The page; with fewer than two finished trials, or without plotly's script, it says so."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if len(_finished(study)) < 2:
        parts.append("<p>Fewer than two trials have finished: there is nothing to compare yet.</p>")
    elif not _has_script():
        parts.append(
            "<p>No charts: this installation of plotly lacks its script (plotly.min.js); install it whole.</p>"
        )
    else:
        for index, (heading, note, figure) in enumerate(_figures(study, metric)):
            figure.update_layout(title=None, template="plotly_white", height=_HEIGHT)
            parts.append(f"<h2>{html.escape(heading)}</h2><p>{note}</p>")
            parts.append(figure.to_html(full_html=False, include_plotlyjs=index == 0))
    style = (
        "body{font-family:sans-serif;max-width:1100px;margin:1em auto}h2{margin:1.2em 0 0}p{margin:.2em 0;color:#555}"
    )
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
    return f"<!DOCTYPE html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _has_script() -> bool:
    from plotly.offline import get_plotlyjs

    try:
        return bool(get_plotlyjs())
    except FileNotFoundError:  # an installation that was made smaller
        return False


def _finished(study: Study) -> list[Any]:
    return study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))


def _figures(study: Study, metric: str) -> Iterator[tuple[str, str, Any]]:
    """Heading, what is to be seen, and the figure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna marks some charts as experimental
        history = visualization.plot_optimization_history(study, target_name=metric)
        yield "Optimisation history", "The value of every trial, and the best so far.", _spaced(history, _MARGINS)
        for condition, part in _parts(study):
            lines = visualization.plot_parallel_coordinate(part, target_name=metric)
            heading = f"Parallel coordinates: {condition}" if condition else "Parallel coordinates"
            yield heading, "A line a trial; the darker, the higher its value.", _spaced(lines, _PARALLEL_MARGINS)
        slices = visualization.plot_slice(study, target_name=metric)
        yield "Slices", "The value over each hyper-parameter by itself.", _spaced(slices, _MARGINS)
        curves = visualization.plot_intermediate_values(study)
        note = "The value after each epoch; trials stopped early end early."
        yield "Curves", note, _spaced(curves, _MARGINS)
        if shares := importances(study):
            yield "Importance", "Share of each hyper-parameter, by fANOVA.", _spaced(_bars(shares), _MARGINS)


def _parts(study: Study) -> Iterator[tuple[str, Study]]:
    """What all trials have, then what only those of an option have, under the names of its keys."""
    trials = _finished(study)
    conditions = dict.fromkeys(name.rpartition(": ")[0] for trial in trials for name in trial.params)
    for condition in sorted(conditions):
        part = optuna.create_study(direction=study.direction)
        for trial in trials:
            names = {name: name.rpartition(": ")[2] for name in trial.params if name.rpartition(": ")[0] == condition}
            if names:
                part.add_trial(
                    optuna.trial.create_trial(
                        value=trial.value,
                        params={short: trial.params[name] for name, short in names.items()},
                        distributions={short: trial.distributions[name] for name, short in names.items()},
                    )
                )
        if len(part.trials) > 1:
            yield condition, part


def _spaced(figure: Any, margins: dict[str, int]) -> Any:
    return figure.update_layout(margin=margins)


def _bars(shares: dict[str, float]) -> Any:
    from plotly import graph_objects

    names = list(shares)[::-1]
    return graph_objects.Figure(graph_objects.Bar(x=[shares[name] for name in names], y=names, orientation="h"))
