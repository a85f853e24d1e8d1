"""Losses: plain functions of tensors, and parameter models that combine them into objectives.

A loss is one module here: its function, and a parameter model registered under its ``name``.
"""

from pipeline.losses.objective import LOSSES, LossParams, Objective, Signals, TeacherNeed, Term
from pipeline.losses.perturbation import Perturbation

__all__ = ["LOSSES", "LossParams", "Objective", "Perturbation", "Signals", "TeacherNeed", "Term"]
