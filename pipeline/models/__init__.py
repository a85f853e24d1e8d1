"""Models: parameter models that build networks, the classifier around them, weights, and the teacher.

A network is one module here: its parameter model, registered under its ``name``, builds it.
"""

from pipeline.models.classifier import Classifier, build_classifier, class_similarity, describe_preprocessing
from pipeline.models.custom import CustomParams
from pipeline.models.params import MODELS, ModelParams, PoolParams, TeacherParams
from pipeline.models.teacher import Teacher
from pipeline.models.weights import (
    ModelCard,
    fingerprint_state,
    load_checkpoint,
    load_initial_weights,
    load_teacher_weights,
    load_weights,
    read_card,
    resolve_checkpoint,
    save_model,
)

__all__ = [
    "MODELS",
    "Classifier",
    "CustomParams",
    "ModelCard",
    "ModelParams",
    "PoolParams",
    "Teacher",
    "TeacherParams",
    "build_classifier",
    "class_similarity",
    "describe_preprocessing",
    "fingerprint_state",
    "load_checkpoint",
    "load_initial_weights",
    "load_teacher_weights",
    "load_weights",
    "read_card",
    "resolve_checkpoint",
    "save_model",
]
