"""The winner of a search: chosen on validation over fresh seeds, then shown once on test, and kept as a choice."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.config.stored import write_text
from pipeline.evaluation.bootstrap import Interval
from pipeline.evaluation.seeds import mean_over_seeds
from pipeline.report.search import Candidate
from pipeline.search import Draw
from pipeline.trials.configs import TrialConfigs, describe_draw
from pipeline.trials.records import Trial

DEFAULTS = "defaults"
CHOICE = "winner"
_SECTIONS = ("data", "teacher", "student", "loss", "train", "evaluation", "selection", "cache")
_GROUPS = ("data", "teacher", "student", "loss")


@dataclass(frozen=True)
class Confirmed:
    """A point and the runs that trained it again.

    Attributes:
        label: of its trial, or ``defaults``.
        draw: none: the search's own configuration.
        repeats: finished runs by their seed.
    """

    label: str
    draw: Draw | None
    first: float | None
    repeats: Mapping[int, Trial]

    @property
    def values(self) -> dict[int, float]:
        return {seed: trial.value for seed, trial in self.repeats.items() if trial.value is not None}


def confirmations(
    configs: TrialConfigs, best: Sequence[Trial], trials: Mapping[str, Trial]
) -> tuple[list[Confirmed], list[Trial]]:
    """The best trials and the defaults with the runs that confirm them.

    Returns:
        what there is; the runs that are still to be made.
    """
    confirm, first_seed = configs.params.confirm, configs.config.run.seed + 1
    default_point = configs.default_point
    points: list[tuple[str, Draw | None, float | None]] = []
    default_value: float | None = None
    for trial in best:
        if default_point and trial.draw == default_point:
            default_value = trial.value
        elif len(points) < confirm.top and all(trial.draw != draw for _, draw, _ in points):
            points.append((trial.label, trial.draw, trial.value))
    points.append((DEFAULTS, None, default_value))
    confirmed, missing = [], []
    for label, draw, value in points:
        repeats = {}
        for seed in range(first_seed, first_seed + confirm.seeds):
            name = f"{label}-s{seed}"
            trial = trials.get(name, Trial(name, draw, seed, confirms=label))
            if trial.state == "finished":
                repeats[seed] = trial
            else:
                missing.append(trial)
        confirmed.append(Confirmed(label, draw, value, repeats))
    return confirmed, missing


def rank(confirmed: Sequence[Confirmed], maximise: bool) -> list[Confirmed]:
    """By the mean over fresh seeds, the best first; those without a finished run are left out."""
    sign = -1.0 if maximise else 1.0
    present = [point for point in confirmed if point.values]
    return sorted(present, key=lambda point: sign * statistics.fmean(point.values.values()))


def describe(ranked: Sequence[Confirmed], maximise: bool) -> list[Candidate]:
    """With their intervals, and what they gain over the defaults, seed by seed."""
    defaults = next((point for point in ranked if point.label == DEFAULTS), None)
    candidates = []
    for point in ranked:
        gain = None
        if defaults is not None and point is not defaults:
            gain = paired_gain(point.values, defaults.values, maximise)
        values = list(point.values.values())
        candidates.append(Candidate(point.label, point.first, len(values), mean_over_seeds(values), gain))
    return candidates


def paired_gain(values: Mapping[int, float], others: Mapping[int, float], maximise: bool) -> Interval | None:
    """How much better ``values`` are, over the seeds that both have; none where they share none."""
    sign = 1.0 if maximise else -1.0
    shared = sorted(values.keys() & others.keys())
    return mean_over_seeds([sign * (values[seed] - others[seed]) for seed in shared]) if shared else None


def write_choice(configs: TrialConfigs, winner: Confirmed, folder: Path, verdict: str) -> str:
    """Writes the winner's configuration as a choice of the group ``experiment``.

    Returns:
        what to type to train with it.
    """
    config = configs.build(winner.draw, Path("winner"), "winner")
    raw = config.with_values({"evaluation.test": configs.config.evaluation.test}).to_dict()
    conf = folder / "conf"
    command = f"python -m pipeline distill --conf {conf} experiment={CHOICE}"
    head = f"# @package _global_\n# {command}\n# {verdict}\n# {describe_draw(winner.draw or {})}\n"
    defaults = [{f"override /{group}": raw[group]["name"]} for group in _GROUPS]
    content = {"defaults": defaults, **{section: raw[section] for section in _SECTIONS}}
    (conf / "experiment").mkdir(parents=True, exist_ok=True)
    write_text(conf / "experiment" / f"{CHOICE}.yaml", head + yaml.safe_dump(content, sort_keys=False))
    return command
