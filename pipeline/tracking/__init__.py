"""Sends the record of a run to MLflow; the only package that imports mlflow."""

from pipeline.tracking.client import Tracker, has_unsent

__all__ = ["Tracker", "has_unsent"]
