"""Our errors inside what Ray makes of them; no cluster is needed for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError

from pipeline.cluster import train as train_module
from pipeline.cluster.tasks import find_pipeline_error
from pipeline.errors import ModelError, PipelineError, StorageError, StreamError, TrainingError


def shipped(cause: Exception) -> Exception:
    """As it arrives from a task in another process, and is raised there."""
    wrapped = RayTaskError("function", "Traceback ...", cause)
    error: Exception = cloudpickle.loads(cloudpickle.dumps(wrapped)).as_instanceof_cause()
    return error


@pytest.mark.parametrize("depth", [1, 3])
def test_error_of_ours_is_found_as_itself(depth: int) -> None:
    error: Exception = ModelError("the teacher is wrong", rows=3)
    for _ in range(depth):
        error = shipped(error)
    found = find_pipeline_error(error)
    assert type(found) is ModelError
    assert (found.message, found.details) == ("the teacher is wrong", {"rows": 3})
    assert find_pipeline_error(shipped(ValueError("not ours"))) is None


def test_fatal_error_is_kept_for_the_driver(tmp_path: Path) -> None:
    path = tmp_path / "fatal.json"
    for passing in (StreamError("another block"), StorageError("the storage service was not available")):
        train_module._record_fatal(shipped(passing), path)
        assert not path.exists()  # a restart may mend it
    train_module._record_fatal(shipped(ModelError("the teacher is wrong", rows=3)), path)
    assert json.loads(path.read_text())["type"] == "ModelError"
    explained = train_module._explain(RuntimeError("a worker failed"), path)
    assert type(explained) is ModelError
    assert explained.details == {"rows": 3}
    with pytest.raises(TrainingError, match="a restart would only repeat"):
        train_module._cursor_unless_fatal(lambda: 0, str(path))


def test_reason_of_another_error_is_not_the_advice_behind_it(tmp_path: Path) -> None:
    text = (
        "RuntimeError: bad luck\nFailed to apply UDF transform after 1/1 attempts.\n"
        "To change retry attempts, configure something.\n"
    )
    explained: PipelineError = train_module._explain(RuntimeError(text), tmp_path / "fatal.json")
    assert explained.message.startswith("training failed: RuntimeError: bad luck; see ray.log")
