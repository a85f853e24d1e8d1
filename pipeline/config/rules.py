"""Rules over several fields of a configuration. Each yields what is wrong; all are checked, none stops at the first."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.config.schema import Config

# Commands that ask the teacher, whatever the loss is, and train nothing.
TEACHER_ONLY = frozenset({"select-perturbation", "cache build"})
# Commands whose teacher is the one in the configuration, and not that of a run.
_TAKES_TEACHER = TEACHER_ONLY | {"distill", "search", "validate"}
# Sections that a search may vary.
_SEARCHED = ("loss", "student", "train")
# Beside the loss, what may change between two steps of one network.
_CHANGED_IN_TRAINING = ("train.optimizer.lr",)
# Rows of a block below which their correlation within a class is mostly chance.
_MIN_GROUP_ROWS = 8


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    Attributes:
        path: dotted path of the field to change.
        text: expected, given, and what to do.
    """

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


def check_rules(config: Config, command: str | None) -> list[Problem]:
    """Everything in a valid configuration that cannot work together under ``command``; nothing without one."""
    if command is None:
        return []
    rules = _RULES if command in TEACHER_ONLY or command.startswith("cache ") else _RULES + _TRAINING_RULES
    if command == "search":
        rules += _SEARCH_RULES
    return [problem for rule in rules for problem in rule(config, command)]


def asks_teacher(config: Config, command: str) -> bool:
    """Whether a run of ``command`` asks a teacher for logits."""
    return command in TEACHER_ONLY or (command != "train-teacher" and config.loss.needs_teacher)


def uses_pool(config: Config, command: str) -> bool:
    """Whether the teacher is asked while a run of ``command`` goes on, and not a cache."""
    return asks_teacher(config, command) and (command in TEACHER_ONLY or config.teacher.source != "cached")


def _teacher_is_given(config: Config, command: str) -> Iterator[Problem]:
    if command == "train-teacher" and config.loss.needs_teacher:
        yield Problem(
            "loss", f"{config.loss.name} learns from a teacher, but train-teacher makes one; use loss=cross_entropy"
        )
    if command in _TAKES_TEACHER and asks_teacher(config, command) and not config.teacher.has_weights:
        need, otherwise = f"loss={config.loss.name} learns from a teacher", ", or use loss=cross_entropy"
        if command in TEACHER_ONLY:
            need, otherwise = f"{command} asks one", ""
        yield Problem(
            "teacher.checkpoint",
            f"not set, but {need}; train one with `python -m pipeline train-teacher` and give "
            f"teacher.checkpoint=<its run folder>{otherwise}",
        )


def _cache_is_described(config: Config, command: str) -> Iterator[Problem]:
    cached = asks_teacher(config, command) and config.teacher.source != "online"
    if not (cached or command.startswith("cache ")):
        return
    if config.cache.path is None:
        yield Problem("cache.path", "not set; give the folder that holds caches, as in cache.path=runs/cache")
    if command in ("cache info", "cache prune"):
        return
    if config.data.augment.varies and config.data.num_views is None:
        yield Problem(
            "data.num_views",
            "not set, but a cache holds a fixed number of augmented views; set data.num_views=4, say, and epoch e "
            "shows view e modulo 4, or switch the augmentation off",
        )
    num_views = (config.data.num_views or 1) if config.data.augment.varies else 1
    if cached and config.teacher.source == "fill" and config.train.epochs <= num_views:
        yield Problem(
            "train.epochs",
            f"expected more than {num_views}, the views that teacher.source=fill computes in as many epochs before it "
            f"reads any, got {config.train.epochs}; train longer, set fewer data.num_views, or teacher.source=online",
        )


def _cache_has_what_the_loss_needs(config: Config, command: str) -> Iterator[Problem]:
    loss, cache = config.loss, config.cache
    if cache.format != "topk" or not asks_teacher(config, command) or config.teacher.source == "online":
        return
    if "full" in loss.needs:
        yield Problem(
            "cache.format",
            f"a top-k cache lacks most of the classes that loss={loss.name} compares, and would be wrong without a "
            "word; use cache.format=dense cache.k=null, or loss=kd, or loss=levels loss.level=topk",
        )
    elif len(loss.topk_temperatures) > 1:
        temperatures = ", ".join(f"{temperature:g}" for temperature in sorted(loss.topk_temperatures))
        yield Problem(
            "loss", f"a top-k cache is read at one temperature, but the parts have {temperatures}; give them the same"
        )


def _blocks_per_step(config: Config, command: str) -> Iterator[Problem]:
    blocks, workers = config.train.blocks_per_step, config.cluster.num_workers
    if blocks is not None and blocks % workers:
        yield Problem(
            "train.blocks_per_step",
            f"expected a multiple of cluster.num_workers={workers}, got {blocks}; "
            "the workers share the blocks of a step equally",
        )


def _one_worker(config: Config, command: str) -> Iterator[Problem]:
    cluster = config.cluster
    if cluster.name != "ray" and cluster.num_workers != 1:
        yield Problem(
            "cluster.num_workers",
            f"cluster={cluster.name} trains in one process, so expected 1, got {cluster.num_workers}; "
            "use cluster=ray for several workers",
        )


def _selection_metric(config: Config, command: str) -> Iterator[Problem]:
    yield from _check_metric(config, command, "train.select_by", config.train.select_by)


def _check_metric(config: Config, command: str, path: str, given: str) -> Iterator[Problem]:
    from pipeline.evaluation.metrics import METRIC_DIRECTIONS, TEACHER_METRICS

    has_teacher = asks_teacher(config, command)
    known = [f"val/{name}" for name in METRIC_DIRECTIONS if has_teacher or name not in TEACHER_METRICS]
    if given not in known:
        near = difflib.get_close_matches(given, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield Problem(path, f"expected one of {', '.join(known)}, got {given!r}{hint}")


def _warmup_fits(config: Config, command: str) -> Iterator[Problem]:
    warmup, epochs = config.train.optimizer.warmup_epochs, config.train.epochs
    if warmup > epochs:
        yield Problem("train.optimizer.warmup_epochs", f"expected at most train.epochs={epochs}, got {warmup:g}")


def _synchronised_batchnorm(config: Config, command: str) -> Iterator[Problem]:
    if config.train.sync_batchnorm and config.cluster.num_gpus_per_worker == 0:
        yield Problem(
            "train.sync_batchnorm",
            "torch has it for GPUs only, but cluster.num_gpus_per_worker=0; give the workers GPUs or set it to false",
        )


def _no_gpu_is_shared_by_workers(config: Config, command: str) -> Iterator[Problem]:
    share, workers = config.cluster.num_gpus_per_worker, config.cluster.num_workers
    if workers > 1 and 0 < share <= 0.5:
        yield Problem(
            "cluster.num_gpus_per_worker",
            f"expected more than 0.5 for {workers} workers, got {share:g}; two of them may come to share a GPU, over "
            "which NCCL refuses to average gradients; give each its own, or use one worker, whose steps are the same",
        )


def _group_is_large_enough(config: Config, command: str) -> Iterator[Problem]:
    rows = config.train.batch_size
    if config.loss.couples_batch and rows < _MIN_GROUP_ROWS:
        yield Problem(
            "train.batch_size",
            f"expected at least {_MIN_GROUP_ROWS}, got {rows}; loss={config.loss.name} correlates the rows of a block, "
            "and of so few a correlation says nothing",
        )


def _labels_may_be_mixed(config: Config, command: str) -> Iterator[Problem]:
    terms = config.loss.one_label_terms
    if config.data.augment.mixes and terms:
        yield Problem(
            "data.augment",
            f"mixup and cutmix give a row two labels, but {' and '.join(terms)} of loss={config.loss.name} takes one; "
            "set both to 0, or choose another loss",
        )


def _search_is_meant(config: Config, command: str) -> Iterator[Problem]:
    if config.search is not None and command not in ("search", "validate"):
        yield Problem("search", f"is for the command search, and {command} would not look at it; leave it out")


def _no_password(config: Config, command: str) -> Iterator[Problem]:
    """It would be stored in the run folder and shown in the tracker."""
    from pipeline.data.storage import holds_secret

    for path, address, example, variables in (
        (
            "tracking.uri",
            config.tracking.uri,
            "http://host:5000 or sqlite:///mlflow.db",
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
        ),
        (
            "data.path",
            getattr(config.data, "path", None),
            "s3://bucket/folder",
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        ("cache.path", config.cache.path, "s3://bucket/folder", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ):
        try:
            if address is not None and holds_secret(address):
                yield Problem(
                    path,
                    f"holds a password, which would be stored with the run; give it in the environment ({variables})",
                )
        except ValueError:
            yield Problem(path, f"expected an address such as {example}")


def _search_is_described(config: Config, command: str) -> Iterator[Problem]:
    if config.search is None:
        yield Problem(
            "search",
            "not set; choose what is varied, with search=temperature, ptloss, cmkd or losses, or search=FILE.yaml",
        )
    if config.cluster.name != "ray":
        yield Problem("cluster.name", f"trials run on Ray, but cluster={config.cluster.name}; use cluster=ray")
    if asks_teacher(config, command) and config.teacher.source != "cached":
        yield Problem(
            "teacher.source",
            f"a trial never asks the teacher, so expected cached, got {config.teacher.source}; leave it out, and the "
            "cache is built where there is none",
        )


def _search_can_be_judged(config: Config, command: str) -> Iterator[Problem]:
    from pipeline.evaluation.metrics import METRIC_DIRECTIONS

    if config.search is None:
        return
    metric, mode = config.search.metric, config.search.mode
    unknown = list(_check_metric(config, command, "search.metric", metric))
    yield from unknown
    better = METRIC_DIRECTIONS.get(metric.removeprefix("val/"))
    if not unknown and mode is not None and mode != better:
        yield Problem("search.mode", f"expected {better}, which is better for {metric}, got {mode}; leave it out")


def _search_space_fits(config: Config, command: str) -> Iterator[Problem]:
    from pipeline.search import Space, flatten_start

    search = config.search
    if search is None:
        return
    space = Space.parse(search.space)
    for axis in space.axes:
        section = axis.path.split(".")[0]
        if section not in _SEARCHED:
            yield Problem(
                f"search.space.{axis.path}",
                f"expected a key of {', '.join(_SEARCHED)}; {section} is the same for all trials of a search, "
                "which read one cache and are compared on the same rows",
            )
    for index, point in enumerate(search.start):
        try:
            space.project(flatten_start(point))
        except ValueError as error:
            yield Problem(f"search.start.{index}", str(error))
    size = len(space.grid()) if search.searcher == "grid" else 0
    if size > search.num_trials:
        yield Problem(
            "search.num_trials",
            f"expected at least {size}, the points of the grid, got {search.num_trials}; raise it, lower the axes' "
            "points, or use search.searcher=optuna",
        )


def _population_can_be(config: Config, command: str) -> Iterator[Problem]:
    from pipeline.search import Space

    search = config.search
    if search is None or search.scheduler != "pbt":
        return
    for axis in Space.parse(search.space).axes:
        if axis.path.split(".")[0] != "loss" and axis.path not in _CHANGED_IN_TRAINING:
            yield Problem(
                f"search.space.{axis.path}",
                "search.scheduler=pbt changes values while a network trains, so expected a key of loss, or "
                f"{' or '.join(_CHANGED_IN_TRAINING)}; leave it out, or use search.scheduler=asha",
            )
    if search.time_budget_s is not None:
        yield Problem(
            "search.time_budget_s",
            "the trials of search.scheduler=pbt come to their end together, so none would be finished when the time "
            "is up; leave it out, or use search.scheduler=asha",
        )


_Rules = tuple[Callable[[Config, str], Iterator[Problem]], ...]

_RULES: _Rules = (_teacher_is_given, _cache_is_described, _search_is_meant, _no_password)
_TRAINING_RULES: _Rules = (
    _cache_has_what_the_loss_needs,
    _blocks_per_step,
    _one_worker,
    _selection_metric,
    _warmup_fits,
    _synchronised_batchnorm,
    _no_gpu_is_shared_by_workers,
    _group_is_large_enough,
    _labels_may_be_mixed,
)
_SEARCH_RULES: _Rules = (_search_is_described, _search_can_be_judged, _search_space_fits, _population_can_be)
