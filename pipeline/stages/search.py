"""``search``: many students over one cache of the teacher's logits, the best of them confirmed over fresh seeds."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.config.request import Request
from pipeline.config.results import read_run_id
from pipeline.config.runs import Run
from pipeline.config.schema import Config
from pipeline.contracts.events import Event
from pipeline.data import DataSource, SplitReader
from pipeline.data.cache import LogitsReader
from pipeline.errors import TrainingError
from pipeline.execution.caching import open_logits
from pipeline.execution.completing import CacheWork, complete_cache, open_teacher, prepare_cache
from pipeline.execution.joining import connect, join_cluster
from pipeline.execution.logits import logits_path
from pipeline.execution.own_network import check_fresh
from pipeline.execution.selection import select
from pipeline.execution.session import RunSession
from pipeline.execution.story import Story, tell
from pipeline.execution.teacher import CheckedTeacher, check_teacher
from pipeline.execution.ways import list_demands, worker_bundle
from pipeline.execution.work import check_labels
from pipeline.models import CustomParams, build_classifier
from pipeline.search.study import PastTrial
from pipeline.training import open_training
from pipeline.trials.board import FAILED_SHARE, TrialBoard
from pipeline.trials.configs import TrialConfigs
from pipeline.trials.population import Population
from pipeline.trials.records import Trial, best_trials, past_trials, read_trials, trial_folder, unfinished
from pipeline.trials.result import conclude, render_state
from pipeline.trials.tracking import TrialTrackers, list_unsent
from pipeline.trials.trial import TrialInputs, run_trial
from pipeline.trials.winner import confirmations

# What the command starts from.
SEARCH_DEFAULTS = ("teacher.source=cached", "cache.path=runs/cache")


@dataclass(frozen=True)
class _Work:
    """A search, resolved.

    Attributes:
        reader: the training split.
        cache: what the trials read; none where nobody teaches.
        num_epochs: of the longest trial.
    """

    run: Run
    source: DataSource
    teacher: CheckedTeacher | None
    reader: SplitReader
    configs: TrialConfigs
    cache: CacheWork | None
    num_epochs: int

    @property
    def config(self) -> Config:
        return self.run.config


def search(request: Request) -> int:
    """Returns 0; the run folder holds every trial, what came of them, and the winner."""
    story = Story(
        _check, _prepare, _carry_out, _show, extend="search.num_trials=+N extends it",
        variants=lambda config: [config, *TrialConfigs(config).check()],
    )  # fmt: skip
    return tell(story, request, SEARCH_DEFAULTS)


def _check(config: Config, source: DataSource) -> None:
    check_labels(config, source)
    TrialConfigs(config).check()


def _prepare(run: Run, source: DataSource, teacher: CheckedTeacher | None) -> _Work:
    configs = TrialConfigs(run.config)
    built = configs.check()
    num_epochs = max(config.train.epochs for config in built)
    if not run.resumed and not run.finished:
        _check_own_networks([run.config, *built], source)
    if teacher is None:
        return _Work(run, source, None, open_training(source), configs, None, num_epochs)
    wanting = next((config for config in built if "last_layer" in config.loss.needs), None)
    if wanting is not None and teacher.class_similarity is None:
        teacher = check_teacher(wanting, source)
    cache = prepare_cache(run, source, teacher)
    return _Work(run, source, teacher, cache.reader, configs, cache, num_epochs)


def _check_own_networks(configs: Iterable[Config], source: DataSource) -> None:
    """Tries a network of each factory of the user's that the trials use."""
    networks = [config.student for config in configs]
    for params in {params.factory: params for params in networks if isinstance(params, CustomParams)}.values():
        check_fresh(params, build_classifier(params, source.spec), source)


def _show(run: Run) -> None:
    _send_unsent(run)
    print(render_state(run.dir, TrialConfigs(run.config), finished=run.finished))
    print(run.result_path, flush=True)


def _carry_out(work: _Work, session: RunSession) -> None:
    with _on_ray(work, session):
        session.began = True
        inputs = _share(work, session)
        trackers = TrialTrackers(work.run, {})
        session.before_kill(trackers.kill)
        try:
            _search(work, inputs, session, trackers)
            metrics, extra = conclude(work.run, work.configs, work.source, session)
        finally:
            problem = trackers.close()
            if problem:
                session.journal.emit(Event("warning", {"message": f"tracking: {problem}"}))
    session.finish(metrics, extra)


@contextmanager
def _on_ray(work: _Work, session: RunSession) -> Iterator[None]:
    """One Ray for all phases; one that cannot hold a trial is refused before anything is computed."""
    from pipeline.cluster.preflight import check_demand, total_demand

    phases = [list_demands(work.config, command) for command in ("search", "cache build")]
    largest = max(phases, key=lambda demands: total_demand(demands, at_most=True).get("CPU", 0.0))
    with connect(work.run, session, largest):
        check_demand(phases[0], resuming=work.run.resumed)
        yield


# --- the teacher --------------------------------------------------------------------------------------------------


def _share(work: _Work, session: RunSession) -> TrialInputs:
    """What the trials read; the teacher is asked for what no cache has."""
    config, cache = work.config, work.cache
    facts = work.run.read_provenance()
    logits: LogitsReader | None = None
    path = None
    if cache is not None and work.teacher is not None:
        _, rows = complete_cache(cache, session)
        metrics = {f"cache/rows_{name}": float(number) for name, number in rows.items()}
        message = f"{rows['computed']:,} rows of the cache were computed by the teacher"
        session.journal.emit(Event("figures", {"message": message, "metrics": metrics}))
        validation = work.source.split("validation")
        path = logits_path(work.run.dir, work.teacher, work.source, "validation", validation)
        if not path.exists():
            with open_teacher(cache, session) as teacher:
                path = teacher.compute("validation", validation)
        logits = open_logits(config, cache.key, work.reader)
    return TrialInputs(
        source=work.source,
        reader=work.reader,
        teacher=work.teacher,
        cache=None if logits is None or cache is None else (logits, cache.key),
        validation_logits=None if path is None else str(path),
        metric=work.configs.params.metric,
        provenance={name: facts.get(name) for name in ("data", "teacher")},
    )


def _select_start(work: _Work, inputs: TrialInputs, session: RunSession) -> tuple[float, ...]:
    """PTLoss's coefficients from the teacher's validation logits, where the space wants to begin with them."""
    if not work.configs.params.start_from_selection or inputs.validation_logits is None:
        return ()
    params = work.config.selection.model_copy(update={"scope": "shared", "fit_temperature": False})
    return select(params, work.source, Path(inputs.validation_logits), session).perturbation.coefficients[0]


# --- trials -------------------------------------------------------------------------------------------------------


def _search(work: _Work, inputs: TrialInputs, session: RunSession, trackers: TrialTrackers) -> None:
    """Runs what is left of the trials, and of the runs that confirm the best of them.

    Raises:
        TrainingError: a third of the trials failed, or none came to its end.
    """
    trials = {trial.label: trial for trial in read_trials(work.run.dir)}
    board = _make_board(work, inputs, session, trackers, trials)
    over = sum(trial.is_over and not trial.confirms for trial in board.trials.values())
    session.say("search", detail=f"{board.total} trials" + (f", {over} of them over" if over else ""))
    _run(work, inputs, session, board, past_trials(board.trials.values()))
    if board.must_stop():
        trackers.kill()  # those that are paused
        failed = board.failed
        raise TrainingError(
            f"{len(failed)} of {board.total} trials failed, which ends the search; the last, {failed[-1].label}, "
            f"because: {failed[-1].message.rstrip('.')}. Correct the space or what failed, then resume: they are "
            "tried again."
        )
    if not best_trials(board.trials.values(), work.configs.maximises):
        raise TrainingError(
            "no trial came to its end, so there is nothing to confirm; give the search more time "
            "(search.time_budget_s) or trials (search.num_trials=+N), and resume"
        )
    session.say("confirm", "finished")


def _make_board(
    work: _Work, inputs: TrialInputs, session: RunSession, trackers: TrialTrackers, trials: dict[str, Trial]
) -> TrialBoard:
    from pipeline.cluster.sampler import Sampler

    configs, params, run = work.configs, work.configs.params, work.run
    population, seed = None, run.config.run.seed
    if params.scheduler == "pbt":
        population = Population(run.dir, configs.space, work.num_epochs, configs.maximises, seed)
        for trial in population.settle(trials):  # the last start did not come to it
            trial.save(run.dir)
            trackers.follow(trial)
            trackers.end(trial)
            population.forget(trial)
    over = [trial for trial in trials.values() if trial.state in ("finished", "pruned")]
    own = [trial for trial in trials.values() if not trial.confirms]
    going_on = list(unfinished(own, None if population is None else population.pauses))
    for trial in going_on:
        if trial.state == "paused":  # it may give way before it goes on
            trackers.follow(trial)
    drawn = [trial for trial in own if not trial.copy_of]
    starts = configs.starts(_select_start(work, inputs, session))
    total = len(starts) if params.searcher == "grid" else params.num_trials
    sampler = Sampler(
        configs.space, params.searcher, _mode(configs), seed, starts[len(drawn) :], past_trials(drawn), len(drawn)
    )
    num_copies = len(own) - len(drawn)
    labels = (f"{number:04d}" for number in range(len(own), total + num_copies))

    def draw_next() -> Trial | None:
        label = next(labels, None)
        return None if label is None else Trial(label, sampler.ask(label))

    def tell_sampler(trial: Trial) -> None:
        sampler.tell(trial.label, trial.draw or {}, trial.value if trial.state != "failed" else None)

    def choose(finished: Mapping[str, Trial]) -> list[Trial]:
        session.say("search", "finished")
        best = best_trials(finished.values(), configs.maximises)
        missing = confirmations(configs, best, finished)[1] if best else []
        if missing:
            confirm = params.confirm
            session.say("confirm", detail=f"the best {confirm.top} and the defaults, {confirm.seeds} fresh seeds each")
        return [replace(trial, state="waiting") for trial in missing]

    def configure(trial: Trial) -> str:
        return configs.build(trial.draw, trial_folder(run.dir, trial.label), trial.label, trial.seed).model_dump_json()

    return TrialBoard(
        run_dir=run.dir,
        journal=session.journal,
        total=total + num_copies,
        maximise=configs.maximises,
        configure=configure,
        waiting=deque(trial for trial in going_on if trial.state == "waiting"),
        draw_next=draw_next,
        tell=tell_sampler,
        choose=choose,
        max_failed=max(2, math.ceil((total + num_copies) * FAILED_SHARE)),
        deadline=None if params.time_budget_s is None else time.time() + params.time_budget_s,
        on_start=trackers.follow,
        on_end=trackers.end,
        trials={trial.label: trial for trial in (*over, *going_on) if trial.state != "waiting"},
        population=population,
    )


def _run(work: _Work, inputs: TrialInputs, session: RunSession, board: TrialBoard, past: list[PastTrial]) -> None:
    from pipeline.cluster.search import TrialsPlan, count_concurrent, run_trials

    params, config = work.configs.params, work.config
    bundle = worker_bundle(config)
    with join_cluster(work.run, session, list_demands(config, "search"), "trial"):
        plan = TrialsPlan(
            bundle=bundle,
            num_workers=config.cluster.num_workers,
            max_concurrent=count_concurrent(bundle, config.cluster.num_workers, params.max_concurrent, board.total),
            scheduler="none" if params.scheduler == "pbt" else params.scheduler,
            num_epochs=work.num_epochs,
            mode=_mode(work.configs),
            storage=work.run.dir / "ray" / "search",
        )
        run_trials(run_trial, inputs, board, plan, past)


def _mode(configs: TrialConfigs) -> Literal["max", "min"]:
    return "max" if configs.maximises else "min"


def _send_unsent(run: Run) -> None:
    """Of a finished search, whose tracking server was away."""
    unsent = list_unsent(run, read_trials(run.dir))
    if not unsent or read_run_id(run.dir) is None:
        return
    trackers = TrialTrackers(run, {})
    for trial in unsent:
        trackers.follow(trial)
    problem = trackers.close()
    print(f"tracking: {problem or f'what was missing of {len(unsent)} trials is sent'}")
