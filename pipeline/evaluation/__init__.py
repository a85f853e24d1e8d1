"""Evaluation: metrics of a classifier, added up exactly over batches and workers; selection of coefficients."""

from pipeline.evaluation.metrics import METRIC_DIRECTIONS, Tally
from pipeline.evaluation.params import EvaluationParams
from pipeline.evaluation.selection import Selection, SelectionParams

__all__ = ["METRIC_DIRECTIONS", "EvaluationParams", "Selection", "SelectionParams", "Tally"]
