"""What a run amounts to once its configuration, data and teacher are known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config.rules import TEACHER_ONLY, asks_teacher
from pipeline.config.runs import Run
from pipeline.config.schema import Config
from pipeline.contracts.columns import SplitName
from pipeline.contracts.own_code import Code
from pipeline.data import BlockPlanner, DataSource, SplitReader
from pipeline.data.cache import LogitsDecoder, LogitsReader
from pipeline.errors import DataError
from pipeline.execution.caching import Fill, cache_key, is_complete, open_cached, plan_fill
from pipeline.execution.own_network import check_fresh
from pipeline.execution.teacher import CheckedTeacher
from pipeline.losses import Perturbation
from pipeline.models import (
    CustomParams,
    ModelParams,
    build_classifier,
    load_initial_weights,
)
from pipeline.training import RunPlan, RunSpec, make_plan, make_planner, open_training


@dataclass(frozen=True)
class Work:
    """A training run, resolved.

    Attributes:
        network: the parameters of the network that is trained.
        teacher: none where nobody teaches.
        reader: the training split.
        cached: reads the teacher's logits out of a cache, and decodes them; none where the teacher itself is asked.
        fill: the cache that is filled while training, if any.
    """

    run: Run
    source: DataSource
    network: ModelParams
    teacher: CheckedTeacher | None
    reader: SplitReader
    planner: BlockPlanner
    plan: RunPlan
    cached: tuple[LogitsReader, LogitsDecoder] | None = None
    fill: Fill | None = None

    @property
    def config(self) -> Config:
        return self.run.config

    def spec(self, validation_logits: Path | None, perturbation: Perturbation | None = None) -> RunSpec:
        """What the workers are sent.

        Args:
            perturbation: what was selected for the loss, where it wants that.
        """
        config = self.config
        return RunSpec(
            config.data,
            self.network,
            config.loss if perturbation is None else config.loss.with_perturbation(perturbation),
            config.train,
            config.evaluation,
            config.run.seed,
            self.plan,
            None if validation_logits is None else str(validation_logits),
            None if self.teacher is None else self.teacher.class_similarity,
        )


def trained_network(config: Config, command: str) -> tuple[str, ModelParams]:
    """Which group's network a command trains, and its parameters."""
    return ("teacher", config.teacher) if command == "train-teacher" else ("student", config.student)


def collect_own_code(configs: Iterable[Config], command: str) -> Mapping[str, Code]:
    """The user's modules that networks of these configurations are built by, for each role: teacher, student.

    Raises:
        ModelError: one of them cannot be imported.
    """
    found: dict[str, dict[str, bytes]] = {}
    seen: set[tuple[str, str, str | None]] = set()
    for config in configs:
        roles = {"teacher"} if asks_teacher(config, command) else set()
        for role in roles if command in TEACHER_ONLY else roles | {trained_network(config, command)[0]}:
            params = getattr(config, role)
            if isinstance(params, CustomParams) and (key := (role, params.factory, params.code)) not in seen:
                seen.add(key)
                found.setdefault(role, {}).update(params.collect_code())
    return found


def check_labels(config: Config, source: DataSource, *, training: bool = True) -> None:
    """Refuses rows without label where labels are needed: in train by the loss, elsewhere by the metrics.

    Args:
        training: whether there is a run to be trained; otherwise only the metrics count.

    Raises:
        DataError: how many rows of which split have none, the first of them, who needs it, and what to do.
    """
    terms = config.loss.label_terms if training else ()
    if terms:
        _refuse_unlabelled(source, "train", f"loss term {' and '.join(map(repr, terms))} needs them", _advise(config))
    check_validation_labels(config, source, "the metrics need them")
    if config.evaluation.test:
        _refuse_unlabelled(source, "test", "the metrics need them", "label them, or set evaluation.test=false")


def check_validation_labels(config: Config, source: DataSource, need: str) -> None:
    """Refuses rows of validation without label.

    Args:
        need: who needs the labels, for messages.

    Raises:
        DataError: as ``check_labels``.
    """
    carved = "validation" in source.carved and "train" in source.unlabelled
    place = "data.files.validation" if "files" in type(config.data).model_fields else "a folder validation"
    given = f"give labelled files for it in {place}" if carved else "label them"
    origin = ", which is carved out of train" if carved else ""
    _refuse_unlabelled(source, "validation", f"{need}{origin}", given)


def _refuse_unlabelled(source: DataSource, split: SplitName, need: str, advice: str) -> None:
    if split in source.unlabelled:
        found = source.unlabelled[split]
        raise DataError(
            f"{found.num_rows:,} of {found.num_split_rows:,} rows of {split} have no label (the first: {found.first}), "
            f"but {need}; {advice}."
        )


def _advise(config: Config) -> str:
    """What to do about train rows without label."""
    if "ce_weight" in type(config.loss).model_fields:
        return "label them, or set loss.ce_weight=0 to learn from the teacher alone"
    return "label them, or use a loss that learns from a teacher alone (loss=kd loss.ce_weight=0)"


def prepare_work(run: Run, source: DataSource, teacher: CheckedTeacher | None) -> Work:
    """Order and length of the run; the network is built and tried here, so that what is wrong with it shows now."""
    config = run.config
    role, network = trained_network(config, run.command)
    classifier = build_classifier(network, source.spec)
    load_initial_weights(classifier, network, role=role)
    if not run.resumed and not run.finished:
        check_fresh(network, classifier, source)
    reader = open_training(source)
    work = plan_work(run, source, teacher, reader)
    if teacher is None or config.teacher.source == "online":
        return work
    key = cache_key(config, source, teacher)
    if config.teacher.source == "fill" and not is_complete(config, key):
        return replace(work, fill=plan_fill(run, work.plan, reader, key))
    return replace(work, cached=open_cached(config, key, reader))


def plan_work(run: Run, source: DataSource, teacher: CheckedTeacher | None, reader: SplitReader) -> Work:
    """Order and length of a run on a training split that is open, without its cache."""
    config = run.config
    planner = make_planner(config.data, reader, config.train, config.run.seed)
    network = trained_network(config, run.command)[1]
    return Work(run, source, network, teacher, reader, planner, make_plan(planner, config.train))
