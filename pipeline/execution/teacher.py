"""The teacher as a run knows it: read once, checked, and what its logits depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.config.schema import Config
from pipeline.data import DataSource
from pipeline.models import (
    build_classifier,
    class_similarity,
    describe_preprocessing,
    fingerprint_state,
    load_teacher_weights,
)


@dataclass(frozen=True)
class CheckedTeacher:
    """A teacher whose checkpoint was read once and fits its network and the data.

    Attributes:
        fingerprint: of its weights.
        architecture: what its network is built from.
        preprocessing: of its input.
        precision: of its forward pass, resolved: logits in bf16 are not those in fp32.
        class_similarity: (C, C) float32 cosines of its last layer; none where the loss does not need them.
    """

    fingerprint: str
    architecture: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    precision: str
    class_similarity: np.ndarray | None = None

    @property
    def key(self) -> str:
        """Of everything its logits depend on but the rows."""
        parts = [self.fingerprint, self.architecture, self.preprocessing, self.precision]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def check_teacher(config: Config, source: DataSource) -> CheckedTeacher:
    """Builds the teacher on this machine's CPU and loads its weights, so that what is wrong shows now.

    Raises:
        CheckpointError, ModelError: see ``load_teacher_weights`` and ``build_classifier``.
    """
    params = config.teacher
    classifier = build_classifier(params, source.spec)
    load_teacher_weights(classifier, params)
    return CheckedTeacher(
        fingerprint_state(classifier.network.state_dict()),
        params.architecture(),
        describe_preprocessing(params, source.spec),
        compute_dtype(config),
        class_similarity(classifier) if "last_layer" in config.loss.needs else None,
    )


def compute_dtype(config: Config) -> Literal["fp32", "bf16"]:
    """The teacher's precision, resolved."""
    precision = config.teacher.precision
    if precision != "auto":
        return precision
    if config.cluster.name == "inprocess":
        import torch

        return "bf16" if torch.cuda.is_available() else "fp32"
    return "bf16" if config.teacher.pool.num_gpus else "fp32"
