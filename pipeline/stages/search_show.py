"""``search show``: the trials of a search, running or finished, without touching it."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.load import take_run
from pipeline.config.request import Request
from pipeline.config.stored import find_run, read_run, write_text
from pipeline.config.validate import build_config
from pipeline.errors import ConfigError, RunError
from pipeline.report.search import trials_csv
from pipeline.trials.configs import TrialConfigs
from pipeline.trials.records import read_trials
from pipeline.trials.result import render_state, trial_row


def show(request: Request) -> int:
    """Prints the tables of a search, or writes its trials as CSV; returns 0."""
    name, rest = take_run(request.overrides, "run")
    out, rest = take_run(rest, "out", "a file for the trials, such as trials.csv")
    if name is None and rest and "=" not in rest[0]:
        name, rest = take_run([f"run={rest[0]}", *rest[1:]], "run")
    if name is None:
        raise ConfigError("run: not set; give the run folder of a search, as in run=runs/search")
    if rest:
        raise ConfigError(f"{rest[0]}: search show takes run=RUN and out=FILE.csv only")
    stored = read_run(find_run(name))
    if stored.command != "search":
        raise RunError(f"run={name}: {stored.dir} holds a run of {stored.command}, not a search")
    configs = TrialConfigs(build_config(stored.raw, None))
    if out is not None:
        write_text(Path(out), trials_csv([trial_row(trial) for trial in read_trials(stored.dir)]))
        print(out)
        return 0
    print(render_state(stored.dir, configs, finished=stored.status == "finished"))
    return 0
