"""Sends the record of a run to MLflow; the only package that imports mlflow."""

from pipeline.tracking.client import Tracker

__all__ = ["Tracker"]
