"""The calls to MLflow. Everything here may block or raise; the sender thread deals with that."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.tracking.address import is_http, sqlite_path
from pipeline.tracking.batches import MAX_POINTS, WARNINGS_FILE, Batch, Point
from pipeline.tracking.model import log_classifier
from pipeline.tracking.progress import Progress
from pipeline.tracking.quiet import import_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)
RUN_KEY_TAG = "run_key"
_MAX_TAGS = 100  # MLflow's limit of params, and of tags, in one request
_MAX_PARAM_LENGTH = 6000
_MAX_TAG_LENGTH = 5000  # older servers refuse more


# MLflow's pages show training runs first for this kind; without it they open on traces of language models.
_TRAINING_EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}


@dataclass(frozen=True)
class RunInfo:
    """What a new MLflow run is created with; ``params`` are flat."""

    experiment: str
    run_name: str
    params: dict[str, str]
    tags: dict[str, str]
    dataset: dict[str, Any]
    parent_run_id: str | None
    start_time_ms: int


class Connection:
    """One MLflow run on one server, through a client of its own: no global tracking address is set."""

    def __init__(self, uri: str, run_dir: Path) -> None:
        self._uri = uri
        self._run_dir = run_dir
        self._client: MlflowClient = import_mlflow().MlflowClient(tracking_uri=uri)
        self._run_id = ""

    def open_run(self, info: RunInfo, progress: Progress) -> Progress:
        """Finds the run or creates it, and completes its params, tags and data set.

        Returns ``progress`` with the run's id; a fresh one if the run is no longer on the server.
        """
        run = self._find_run(info.experiment, progress)
        if run is None and progress.run_id:
            log.warning(
                "the MLflow run %s is gone from %s; a new one gets the whole record", progress.run_id, progress.uri
            )
            progress = Progress(progress.uri)
        if run is None:
            run = self._create_run(info, progress)
        self._run_id = run.info.run_id
        self._complete_params(run, info.params)
        self._log_tags(info.tags)
        if info.dataset and not (run.inputs and run.inputs.dataset_inputs):
            self._log_dataset(info.dataset)
        progress = progress.copy()
        progress.run_id = self._run_id
        return progress

    def log_records(self, batch: Batch) -> None:
        """Sends metrics and tags."""
        for points in _chunks(batch.points, MAX_POINTS):
            self._log_points(points)
        self._log_tags(batch.tags)

    def upload(self, batch: Batch, all_warnings: Sequence[str]) -> None:
        """Sends files, documents and models; a file that is gone is left out, with a warning in the log."""
        if batch.warnings:
            self._client.log_text(self._run_id, "\n".join(all_warnings) + "\n", WARNINGS_FILE)
        for name, document in batch.documents.items():
            self._client.log_dict(self._run_id, document, name)
        for file, folder in batch.files:
            if path := self._find_file(file):
                self._client.log_artifact(self._run_id, str(path), folder or None)
        for file in batch.models:
            if path := self._find_file(file):
                log_classifier(self._client, self._run_id, path, batch.progress.step)

    def set_status(self, batch: Batch) -> None:
        if batch.status is None:
            return
        status, time_ms = batch.status
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status, end_time=time_ms)

    def _find_file(self, path: Path) -> Path | None:
        found = self._run_dir / path
        if found.exists():
            return found
        log.warning("%s is gone and was not sent to MLflow", found)
        return None

    def _find_run(self, experiment: str, progress: Progress) -> Run | None:
        if progress.run_id:
            return self._get_run(progress.run_id)
        # It may have been created, and the answer or the driver lost before the id was stored.
        known = self._client.get_experiment_by_name(experiment)
        if known is None:
            return None
        query = f"tags.{RUN_KEY_TAG} = '{progress.run_key}'"
        found = self._client.search_runs([known.experiment_id], query, max_results=1)
        return self._get_run(found[0].info.run_id) if found else None

    def _get_run(self, run_id: str) -> Run | None:
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _create_run(self, info: RunInfo, progress: Progress) -> Run:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        experiment = self._client.get_experiment_by_name(info.experiment)
        if experiment is None:
            experiment_id = self._client.create_experiment(
                info.experiment, artifact_location=_artifact_root(self._uri), tags=_TRAINING_EXPERIMENT
            )
        else:
            experiment_id = experiment.experiment_id
        tags = {RUN_KEY_TAG: progress.run_key}
        if info.parent_run_id:
            tags[MLFLOW_PARENT_RUN_ID] = info.parent_run_id
        return self._client.create_run(experiment_id, start_time=info.start_time_ms, tags=tags, run_name=info.run_name)

    def _complete_params(self, run: Run, params: dict[str, str]) -> None:
        """Params cannot be changed in MLflow: what a resumed run changed is kept as a tag beside them."""
        from mlflow.entities import Param

        params = {key: value[:_MAX_PARAM_LENGTH] for key, value in params.items()}
        logged = run.data.params
        missing = [Param(key, value) for key, value in params.items() if key not in logged]
        for chunk in _chunks(missing, _MAX_TAGS):
            self._client.log_batch(self._run_id, params=chunk)
        changed = {f"resumed.{key}": value for key, value in params.items() if logged.get(key, value) != value}
        self._log_tags(changed)

    def _log_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        for chunk in _chunks([RunTag(key, value[:_MAX_TAG_LENGTH]) for key, value in tags.items()], _MAX_TAGS):
            self._client.log_batch(self._run_id, tags=chunk)

    def _log_dataset(self, dataset: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(
            name=str(dataset["name"]),
            digest=str(dataset["fingerprint"])[:36],
            source_type="local",
            source=json.dumps({"uri": str(dataset["path"])}),
            profile=json.dumps({"num_rows": dataset["num_rows"]}),
        )
        self._client.log_inputs(self._run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])

    def _log_points(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        metrics = [Metric(point.key, point.value, point.time_ms, point.step) for point in points]
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(points) == 1:
                log.warning("MLflow refused the metric %s (%s); it is only in the journal", points[0], error)
                return
            for point in points:  # one value that the server refuses must not hold up all that follow
                self._log_points([point])


def _artifact_root(uri: str) -> str | None:
    """Where a database without a server keeps artifacts: beside it. A server decides for itself."""
    return None if is_http(uri) else (sqlite_path(uri).resolve().parent / "mlartifacts").as_uri()


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
