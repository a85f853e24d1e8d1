"""Distributed knowledge distillation on Ray: a streaming teacher pool, exact resumption, tracking."""

__version__ = "0.1.0"
