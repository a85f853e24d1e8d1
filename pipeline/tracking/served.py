"""Loads a logged classifier again: the module that ``mlflow.pyfunc.load_model`` and model servers import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.contracts.columns import InputSpec
from pipeline.models import MODELS, build_classifier, load_weights, read_card
from pipeline.models.weights import WEIGHTS_FILE


class ServedClassifier:
    """What MLflow calls ``predict`` on."""

    def __init__(self, classifier: nn.Module, dtype: np.dtype[Any]) -> None:
        self._classifier = classifier.eval()
        self._dtype = dtype

    @torch.inference_mode()
    def predict(self, data: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        """Probabilities, float32 (rows, num_classes), for uint8 pixels or float32 features.

        Args:
            data: (rows, channels, height, width), or (rows, features).
            params: not used; part of MLflow's interface.
        """
        rows = np.require(data, self._dtype, ["C", "W"])  # torch warns of arrays that cannot be written to
        inputs = torch.from_numpy(rows)
        probabilities: np.ndarray = self._classifier(inputs).float().softmax(dim=-1).numpy()
        return probabilities


def _load_pyfunc(data_path: str) -> ServedClassifier:
    """Called by MLflow, under this name, with the folder that was logged."""
    folder = Path(data_path)
    card = read_card(folder)
    spec = InputSpec.from_dict(card.input)
    values = {**card.params, "mean": card.mean, "std": card.std, "image_size": card.image_size}
    if "factory" in values:
        values["code"] = str(folder.parents[1] / "code")  # where MLflow puts it: beside data/, which holds the folder
    params = MODELS.get(card.params["name"]).model_validate(values)
    classifier = build_classifier(params, spec)
    load_weights(classifier.network, folder / WEIGHTS_FILE)
    return ServedClassifier(classifier, np.dtype(np.uint8 if spec.kind == "image" else np.float32))
