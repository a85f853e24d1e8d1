"""``evaluate run=RUN``: the network that a run kept, on validation and test."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.load import load_config, take_run
from pipeline.config.request import Request
from pipeline.config.results import write_result
from pipeline.config.schema import Config
from pipeline.config.stored import StoredRun, find_run, read_run
from pipeline.contracts.columns import SplitName
from pipeline.data.logits import save_logits
from pipeline.errors import ConfigError
from pipeline.models import Teacher, resolve_checkpoint
from pipeline.stages.training import metrics_table
from pipeline.stages.work import check_teacher, learns_from_teacher, logits_path, trained_network
from pipeline.training import EvaluationSpec, compute_logits, evaluate_weights, open_test, teacher_arguments


def evaluate(request: Request) -> int:
    """Evaluates in this process, on its GPU if it has one; returns 0.

    The result goes to ``evaluate/result.json`` of the run folder; the run itself is not changed.

    Raises:
        PipelineError: no such run, or one without kept weights.
    """
    stored, config = _load_run(request)
    weights = resolve_checkpoint(str(stored.dir))
    source = config.data.open()
    _, network = trained_network(config, stored.command)
    checked = check_teacher(config, source) if learns_from_teacher(config, stored.command) else None
    teacher = None
    metrics: dict[str, float] = {}
    splits: tuple[SplitName, ...] = ("validation", "test") if config.evaluation.test else ("validation",)
    for split in splits:
        reader = open_test(source, "asked for by the evaluate command") if split == "test" else source.split(split)
        logits: Path | None = None
        if checked is not None:
            logits = logits_path(stored.dir, checked, source, split, reader)
            if not logits.exists():
                teacher = teacher or Teacher(**teacher_arguments(config.teacher, source, config.train.batch_size))
                save_logits(logits, compute_logits(teacher, source.decoder(split), reader, config.train.batch_size))
        job = EvaluationSpec(
            network, str(weights), source.spec, source.decoder(split), reader, split, config.evaluation,
            None if logits is None else str(logits), config.train.precision,
        )  # fmt: skip
        metrics |= evaluate_weights(job).metrics
    print(metrics_table(stored.name, metrics))
    path = stored.dir / "evaluate" / "result.json"
    path.parent.mkdir(exist_ok=True)
    write_result(path, stored.dir, stored.config_hash, "finished", metrics, {"exit_code": 0})
    print(path, flush=True)
    return 0


def _load_run(request: Request) -> tuple[StoredRun, Config]:
    """The run that ``run=RUN`` names, and its configuration with the other overrides on top."""
    run, others = take_run(request.overrides, "run")
    if run is None:
        raise ConfigError("evaluate needs run=RUN: a run folder, or its name under runs/")
    stored = read_run(find_run(run))
    resume = Request(stored.command, (f"resume={stored.dir}", *others), request.conf_dirs, request.debug)
    return stored, load_config(resume).config
