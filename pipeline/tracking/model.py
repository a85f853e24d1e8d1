"""Stores a trained classifier as an MLflow model of its run, ready to be loaded and served."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pipeline
from pipeline.contracts.columns import InputSpec
from pipeline.contracts.own_code import CODE_FOLDER, list_distributions
from pipeline.tracking.quiet import import_mlflow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

MODEL_NAME = "model"
LOADER_MODULE = "pipeline.tracking.served"
_FINGERPRINT_TAG = "fingerprint"
# What pipeline.models imports; named, because finding out takes MLflow a second process and a minute.
_REQUIREMENTS = ("mlflow", "numpy", "pydantic", "safetensors", "torch", "torchvision")


def log_classifier(client: MlflowClient, run_id: str, folder: Path, step: int) -> str:
    """Stores the classifier of ``folder`` as a model of the run, once for each set of weights.

    The model holds the weights, the card, this package's source and the user's own modules, no pickle. It takes uint8
    pixels (rows, channels, height, width), or float32 (rows, features), and returns float32
    probabilities (rows, num_classes).

    Args:
        client: connected to the server that has the run.
        run_id: the run that the model belongs to.
        folder: holds ``model.safetensors``, ``model.json`` and, for a network of the user's own, ``code/``.
        step: optimizer step at which the weights were taken.

    Returns:
        MLflow's id of the model (``models:/<id>``).
    """
    import_mlflow()
    from mlflow.entities import LoggedModelStatus

    from pipeline.models import read_card

    card = read_card(folder)
    model = _find_model(client, run_id, card.fingerprint) or _create_model(client, run_id, card.fingerprint, step)
    if model.status == LoggedModelStatus.READY:
        return model.model_id
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / MODEL_NAME
        save_pyfunc(
            path, folder, artifact_path=model.artifact_location, run_id=run_id, model_uuid=model.model_id,
            model_id=model.model_id,
        )  # fmt: skip
        client.log_model_artifacts(model.model_id, str(path))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model.model_id


def _version(package: str) -> str:
    # It may have come by its smaller distribution, mlflow-skinny, which has the same versions.
    return import_mlflow().__version__ if package == "mlflow" else version(package)


def save_pyfunc(path: Path, folder: Path, **identity: Any) -> None:
    """Writes the classifier of ``folder`` as a model of MLflow's to ``path``, with all the code that it needs.

    Args:
        folder: as for ``log_classifier``.
        identity: what MLflow knows the model by; nothing: it belongs to no run.
    """
    import_mlflow()
    from mlflow import pyfunc
    from mlflow.models import Model

    from pipeline.models import MODELS, read_card
    from pipeline.models.weights import CARD_FILE, WEIGHTS_FILE

    card = read_card(folder)
    metadata = {"class_names": list(card.input["class_names"]), _FINGERPRINT_TAG: card.fingerprint}
    code = folder / CODE_FOLDER
    requirements = [*_REQUIREMENTS, *MODELS.get(card.params["name"]).requirements, *list_distributions(code)]
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / MODEL_NAME
        data.mkdir()
        for name in (WEIGHTS_FILE, CARD_FILE):  # links: MLflow copies what they mean
            (data / name).symlink_to((folder / name).resolve())
        pyfunc.save_model(
            path=path,
            mlflow_model=Model(**identity, metadata=metadata),
            loader_module=LOADER_MODULE,
            data_path=str(data),
            code_paths=[str(Path(pipeline.__file__).parent), *map(str, sorted(code.glob("*")))],
            signature=build_signature(InputSpec.from_dict(card.input)),
            pip_requirements=[f"{name}=={_version(name).partition('+')[0]}" for name in dict.fromkeys(requirements)],
        )


def build_signature(spec: InputSpec) -> ModelSignature:
    """Tensor signature: inputs as ``spec`` says, outputs one probability per class."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    dtype = np.dtype(np.uint8) if spec.kind == "image" else np.dtype(np.float32)
    return ModelSignature(
        inputs=Schema([TensorSpec(dtype, (-1, *spec.shape))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, spec.num_classes))]),
    )


def _find_model(client: MlflowClient, run_id: str, fingerprint: str) -> LoggedModel | None:
    """The run's model with these weights, complete or left half-uploaded by a lost connection."""
    outputs = client.get_run(run_id).outputs
    for output in outputs.model_outputs if outputs else []:
        model = client.get_logged_model(output.model_id)
        if model.tags.get(_FINGERPRINT_TAG) == fingerprint:
            return model
    return None


def _create_model(client: MlflowClient, run_id: str, fingerprint: str, step: int) -> LoggedModel:
    from mlflow.entities import LoggedModelOutput

    experiment_id = client.get_run(run_id).info.experiment_id
    tags = {_FINGERPRINT_TAG: fingerprint}
    model = client.create_logged_model(
        experiment_id, MODEL_NAME, source_run_id=run_id, tags=tags, model_type="classifier"
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
    return model
