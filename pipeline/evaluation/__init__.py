"""Evaluation: metrics of a classifier, added up exactly over batches and workers."""

from pipeline.evaluation.metrics import METRIC_DIRECTIONS, Tally
from pipeline.evaluation.params import EvaluationParams

__all__ = ["METRIC_DIRECTIONS", "EvaluationParams", "Tally"]
